"""Where every parameter and every batch lives: one table, outside of the model. After `model`, before `optim`.

Axes: `data` copies the model, `fsdp` splits parameters and songs, `tensor` splits heads and columns, `context` splits
the positions of a song. `jax.jit` with these shardings does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l2m_jax.config import MeshConfig, UserError

AXES = ("data", "fsdp", "tensor", "context")
P = PartitionSpec

# Path of a parameter (a suffix of it, as the optimizer's moments carry the same names) -> axes of its last dimensions.
# Stacked layers have one more dimension in front, which is never split.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(token|position)_embedding$", P(None, "fsdp")),
    (r"(codebook|kind|section|null)_embedding$", P(None, None)),
    (r"(query|key|value|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|up)/bias$", P("tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"(out|down|project)/bias$", P(None)),
    (r"project/kernel$", P(None, "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"head/bias$", P("tensor")),
    (r"norm\d?/(scale|bias)$", P(None)),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the config over all devices; raises UserError where the product does not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = int(np.prod([s for s in sizes if s > 0]))
    if sizes.count(-1) == 1 and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        asked = ", ".join(f"mesh.{a} {s}" for a, s in zip(AXES, sizes))
        raise UserError(f"{asked}: the product must be the number of devices, {len(devices)} (one axis may be -1)")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/up/kernel` of a pytree path; the inner `value` of NNX variables is left out."""
    names = [str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", "")))) for p in path]
    return "/".join(names[:-1] if names and names[-1] == "value" else names)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a model or of a train state (arrays or their shapes).

    Scalars are on every device; any other leaf must match a rule, or ValueError names it.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        name = path_name(path)
        for pattern, spec in RULES:
            if re.search(pattern, name):
                return NamedSharding(mesh, P(*(None,) * (len(leaf.shape) - len(spec)), *spec))
        raise ValueError(f"no sharding rule matches {name} {leaf.shape}: add one to l2m_jax/sharding.py RULES")

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Songs over `data` and `fsdp`; what follows the first dimension is whole until `context` splits it in the step."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def position_sharding(mesh: Mesh) -> NamedSharding:
    """[B, T, ...]: songs over `data` and `fsdp`, positions over `context`."""
    return NamedSharding(mesh, P(("data", "fsdp"), "context"))


def check_divides(mesh: Mesh, songs: int, heads: int, width: int, positions: int, key_heads: int = 0) -> None:
    """Raises UserError where a dimension does not divide over its axis. `songs` are those of one micro-batch."""
    size = dict(mesh.shape)
    for what, number, axis, parts in (
        ("train.batch / train.accumulate", songs, "data x mesh.fsdp", size["data"] * size["fsdp"]),
        ("model.heads", heads, "tensor", size["tensor"]),
        ("model.width", width, "fsdp", size["fsdp"]),
        ("positions of the window", positions, "context", size["context"]),
    ):
        if number % parts:
            raise UserError(f"{what} is {number}, which does not divide over mesh.{axis} = {parts}")
    keys, parts = key_heads or heads, size["tensor"]
    if keys % parts and (
        parts % keys or width // heads * keys % parts
    ):  # devices may share a key head, not parts of two
        raise UserError(f"model.key_heads is {keys}: it must divide over mesh.tensor = {parts}, or divide {parts}")
