"""Which mesh, batch and remat for these chips: ranked by formula, the best of them compiled. After `plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from l2m_jax.chips import Topology
from l2m_jax.config import Config, MeshConfig, UserError
from l2m_jax.plan import Plan, for_chips, model_shapes, train_plan
from l2m_jax.roofline import STATE, roofline, step_work
from l2m_jax.sharding import AXES, check_divides, make_mesh
from l2m_jax.tokens import make_layout

KEPT = {"layer": 1, "attention": 3, "none": 24}  # arrays T x D that a layer keeps for its backward pass, about
SONGS = (1, 2, 4, 8)  # songs of each part of the mesh that has songs of its own


class Candidate(NamedTuple):
    """A way to train, by formula."""

    config: Config
    seconds: float  # a song, at least
    bytes: float  # of a chip, about


def candidates(config: Config, topology: Topology, batch: int | None) -> list[Candidate]:
    """Every mesh, batch (or this one) and remat that divides, the quickest first. UserError where none does."""
    assert topology.chip is not None
    config = for_chips(config, topology)
    model, found = model_shapes(config), []
    links = topology.links
    for mesh in meshes(len(topology.devices)):
        try:
            made, groups = make_mesh(mesh, topology.devices), mesh.data * mesh.fsdp
        except UserError:
            continue
        for songs in [batch] if batch else [n * groups for n in SONGS]:
            for remat in KEPT:
                # One pass: more songs at a time are what `batch` tries, and micro-batches gather anew.
                train = dataclasses.replace(config.train, batch=songs, accumulate=1, remat=remat)
                one = dataclasses.replace(config, train=train, mesh=mesh)
                try:
                    check_divides(made, songs, config.model)
                except UserError:
                    continue
                work = step_work(model, one, made.shape)
                bounds = roofline(work, topology.chip, work.sent / links if links else 0.0)
                found.append(Candidate(one, bounds.seconds / songs, about(model, one)))
    if not found:
        raise UserError(f"--suggest: no mesh of {len(topology.devices)} chips divides this model and batch")
    return sorted(found, key=lambda c: (c.seconds, c.bytes))


def suggest(config: Config, topology: Topology, batch: int | None, best: int = 3) -> list[Plan]:
    """The plans of the `best` quickest candidates that fit, the quickest first; twice as many are tried at most."""
    if topology.chip is None:
        raise UserError(f"--suggest ranks by a chip's speed and memory, and none are known of {topology.name}")
    limit = topology.chip.memory
    likely = [c for c in candidates(config, topology, batch) if c.bytes <= limit]
    plans = []
    for candidate in likely[: 2 * best]:
        plan = train_plan(candidate.config, topology)
        if plan.roofline is not None:
            plans.append(plan)
        if len(plans) == best:
            break
    if not plans:
        raise UserError(
            f"--suggest: nothing that was tried fits the chips of {topology.name}: "
            "fewer songs (--batch), more chips, or a smaller model"
        )
    return sorted(plans, key=lambda p: p.roofline.seconds / p.songs)  # pyright: ignore[reportOptionalMemberAccess]


def meshes(chips: int) -> Iterator[MeshConfig]:
    """Every way to write the number of chips as a product of the axes."""

    def split(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for size in (n for n in range(1, left + 1) if left % n == 0):
            yield from ((size, *rest) for rest in split(left // size, axes - 1))

    return (MeshConfig(**dict(zip(AXES, sizes))) for sizes in split(chips, len(AXES)))


def about(model: Any, config: Config) -> float:
    """Bytes of a chip by formula: parameters, gradients, moments, and what the layers keep for the backward pass."""
    mesh, layout = config.mesh, make_layout(config.model)
    parameters = sum(x.size for x in jax.tree.leaves(model)) / (mesh.fsdp * mesh.tensor)
    array = 2 * layout.positions / mesh.context * config.model.width * config.train.batch / (mesh.data * mesh.fsdp)
    return (STATE + 4) * parameters + array * (config.model.layers * KEPT[config.train.remat] + KEPT["none"])
