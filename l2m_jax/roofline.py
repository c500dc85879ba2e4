"""What a step costs by formula, and how fast a chip could be at best. After `train`, before `plan`.

A roofline (Williams et al., 2009): a step takes at least its FLOPs over the chip's peak, at least its bytes over the
memory's bandwidth, at least what it sends over the links'. The largest of the three is the bound; no step is quicker.

FLOPs of a song, forward, with T positions, M rows of memory, S of them from the prompt (M = S + 2), queries A wide, L
layers:

    2 T x (weights of the products)                 weights of cross-attention's keys and values see M rows, `project` S
    + L 2 T^2 A                                     self-attention: scores and sums, of which causality leaves half
    + L 4 T M A                                     cross-attention

Backward is twice forward: 6 N T for N weights, plus attention (Kaplan et al., 2020; Chowdhery et al., 2022).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from l2m_jax.attention import LANES
from l2m_jax.chips import Chip, Topology
from l2m_jax.collectives import Collective
from l2m_jax.config import Config, ModelConfig
from l2m_jax.model import KINDS
from l2m_jax.sharding import path_name
from l2m_jax.tokens import make_layout

STATE = 12  # bytes a parameter: itself and Adam's two moments, float32
UPDATE = 28  # bytes a parameter that AdamW moves: reads it, its gradient and its moments, writes it and these back
COMPUTE = 2  # bytes of bfloat16


class Product(NamedTuple):
    """The products of all layers with one kernel, for one song."""

    rows: int
    inputs: int
    outputs: int
    layers: int
    head: bool  # of the logits, which are recomputed in the backward pass whatever `remat` is

    @property
    def flops(self) -> float:
        """Forward."""
        return 2.0 * self.rows * self.weights

    @property
    def weights(self) -> int:
        """How many."""
        return self.inputs * self.outputs * self.layers


class Work(NamedTuple):
    """A step by formula."""

    model: float  # FLOPs of its mathematics, on all chips
    executed: float  # FLOPs of a chip (the busiest one), with what is computed twice
    traffic: float  # bytes between a chip and its memory, at least: each product reads its operands, writes its result
    sent: float  # bytes that a chip sends


class Traffic(NamedTuple):
    """The collectives of one kind along the same axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int  # of the whole arrays
    sent: float  # bytes that a chip sends
    seconds: float | None  # that they take at least; None where the chip's links are not known


class Roofline(NamedTuple):
    """Seconds that a step takes at least."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The largest."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which that is."""
        return self._fields[self.index(self.seconds)]


def products(model: Any, config: ModelConfig) -> list[Product]:
    """Every product with a kernel of the model (arrays or their shapes)."""
    positions = make_layout(config).positions
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = path_name(path)
        if name.endswith("kernel"):
            prompt = "cross_attention/key" in name or "cross_attention/value" in name
            rows = config.memory + KINDS if prompt else config.memory if name == "project/kernel" else positions
            inputs, outputs = leaf.shape[-2:]
            found.append(Product(rows, inputs, outputs, math.prod(leaf.shape[:-2]), name == "head/kernel"))
    return found


def attention(config: ModelConfig) -> tuple[float, float]:
    """FLOPs of one of the two products of self-attention (causal half) and of cross-attention, all layers, one song."""
    positions = make_layout(config).positions
    own = config.layers * positions**2 * config.query_width
    return float(own), 2.0 * config.layers * positions * (config.memory + KINDS) * config.query_width


def step_work(model: Any, config: Config, mesh: Mapping[str, int]) -> Work:
    """One train step over a mesh of these sizes (`mesh.shape`)."""
    songs = config.train.batch
    data, fsdp, tensor, context = (mesh[axis] for axis in ("data", "fsdp", "tensor", "context"))
    chips = data * fsdp * tensor * context
    again = int(config.train.remat != "none")  # passes that compute once more what was forgotten
    attended = int(config.train.remat == "layer")  # the same, of attention
    layout = make_layout(config.model)
    all_products, (own, cross) = products(model, config.model), attention(config.model)
    forward = sum(p.flops for p in all_products) + 2 * own + 2 * cross

    computed = sum(p.flops * (3 + (1 if p.head else again)) for p in all_products)
    # The backward pass of splash attention makes seven products (two kernels, each of which computes the scores anew);
    # of contiguous parts of the positions the last one sees the most keys.
    lanes = -(-config.model.head_width // LANES) * LANES / config.model.head_width  # heads are padded to them
    busiest = computed + lanes * (own * (2 - 1 / context) + cross) * (2 * (1 + attended) + 7)

    passes = 3 + again
    local = songs / (data * fsdp)  # songs of a chip, which it may share with others along tensor and context
    parameters = sum(x.size for x in jax.tree.leaves(model))
    traffic = UPDATE * parameters / (fsdp * tensor)
    for p in all_products:
        traffic += passes * COMPUTE * p.weights / tensor * config.train.accumulate
        traffic += passes * COMPUTE * p.layers * p.rows * (p.inputs + p.outputs) * local / (tensor * context)

    weights = sum(p.weights for p in all_products)
    split = tensor if (config.model.key_heads or config.model.heads) % tensor == 0 else 1
    array = COMPUTE * config.model.layers * layout.positions * local  # a number for each position, all layers
    sent = config.train.accumulate * (fsdp - 1) / fsdp * COMPUTE * weights / tensor * 2  # forwards and backwards
    sent += config.train.accumulate * (fsdp - 1) / fsdp * 4 * weights / tensor
    copies = data * context
    sent += 2 * (copies - 1) / copies * 4 * parameters / (fsdp * tensor)
    sent += 2 * (tensor - 1) / tensor * 3 * array * config.model.width / context * (2 + again)  # three sums a layer
    sent += (context - 1) / context * 2 * array * config.model.key_width / split * (2 + again)  # keys and values
    return Work(3 * songs * forward, songs * busiest / chips, traffic, sent)


def decode_work(model: Any, config: ModelConfig, rows: int, cache: int, chips: int) -> Work:
    """One step of the decode loop of each chip: a position of each row (song x variant of guidance), `cache` before."""
    kernels = [p for p in products(model, config) if p.rows == make_layout(config).positions]
    flops = rows * (
        sum(2.0 * p.weights for p in kernels) + 4.0 * config.layers * config.query_width * (cache + config.memory)
    )
    kept = 2 * config.layers * config.key_width * (cache + config.memory + KINDS) * rows
    return Work(flops * chips, flops, COMPUTE * (sum(p.weights for p in kernels) + kept), 0.0)


def roofline(work: Work, chip: Chip, exchange: float | None = None) -> Roofline:
    """The bounds of the work; `exchange` are the seconds of the collectives where they are known better."""
    return Roofline(
        work.executed / chip.flops,
        work.traffic / chip.bandwidth,
        work.sent / chip.link if exchange is None else exchange,
    )


def sum_up(found: list[Collective], topology: Topology, mesh: Mesh) -> list[Traffic]:
    """The collectives by kind and axes, those that send most first."""
    together: dict[tuple, list[Collective]] = collections.defaultdict(list)
    for c in found:
        together[c.kind, c.axes(mesh.shape)].append(c)

    def seconds(c: Collective) -> float:
        return c.sent * c.times / rate([mesh.devices.flat[i].coords for i in c.groups[0]], topology)

    traffic = [
        Traffic(
            kind,
            axes,
            sum(c.times for c in group),
            sum(c.bytes * c.times for c in group),
            sum(c.sent * c.times for c in group),
            sum(map(seconds, group)) if topology.chip else None,
        )
        for (kind, axes), group in together.items()
    ]
    return sorted(traffic, key=lambda t: -t.sent)


def rate(places: Sequence[Sequence[int]], topology: Topology) -> float:
    """Bytes/s that each of the chips at these places can send the others, all links between them in use.

    Along each axis of the torus in which they extend: one link of a line, two of a ring; other groups' chips that stand
    between theirs share the links.
    """
    assert topology.chip is not None
    total = 0.0
    for axis in range(topology.chip.dimensions):
        along = np.unique([place[axis] for place in places])
        if len(along) > 1:
            shared = (along[-1] - along[0]) / (len(along) - 1)
            ring = topology.closes(axis) and len(along) * shared == topology.shape[axis]
            total += topology.chip.link * (2 if ring else 1) / shared
    return float(total)
