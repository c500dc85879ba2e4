"""Where every parameter, batch and activation lives: one table. After `data`, before `attention`.

Axes: `data` copies the model, `fsdp` splits parameters and songs, `tensor` splits heads and columns, `context` splits
the positions of a song. `jax.jit` with these shardings does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from l2m_jax.config import MeshConfig, ModelConfig, UserError
from l2m_jax.tokens import make_layout

AXES = ("data", "fsdp", "tensor", "context")
P = PartitionSpec
SONGS = ("data", "fsdp")  # songs are split over both: fsdp is data parallelism whose parameters are split too

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

# What devices may exchange along each axis: kind of collective -> what. Vectors may be summed along any.
# parameters: of one layer, or of what stands outside of the layers, whole or a part; their gradients as well.
# activations: of a device's songs and positions, D wide. keys: keys and values of its songs and heads; their gradients.
# queries: of the one head that `train.guide` is about.
PLAN: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {"all-reduce": ("parameters",)},
    "fsdp": {"all-gather": ("parameters",), "all-reduce": ("parameters",), "reduce-scatter": ("parameters",)},
    "tensor": {"all-reduce": ("activations", "queries"), "collective-permute": ("queries",)},
    "context": {"all-gather": ("keys",), "all-reduce": ("keys", "parameters"), "reduce-scatter": ("keys",)},
}


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
    try:  # not jax.make_mesh: of all TPUs but v5e it refuses to split an axis of the torus
        placed = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    except NotImplementedError as error:
        asked = ", ".join(f"mesh.{a} {s}" for a, s in zip(AXES, sizes))
        raise UserError(f"{asked}: these devices cannot be laid out so ({error})") from error
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/up/kernel` of a pytree path; the inner `value` of NNX variables is left out."""
    names = [str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", "")))) for p in path]
    return "/".join(names[:-1] if names and names[-1] == "value" else names)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a model or of a train state (arrays or their shapes).

    Scalars are on every device; any other leaf must match a rule, or ValueError names it.
    """

    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf)), state)


def _spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    if not leaf.shape:
        return P()
    name = path_name(path)
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return P(*(None,) * (len(leaf.shape) - len(spec)), *spec)
    raise ValueError(f"no sharding rule matches {name} {leaf.shape}: add one to l2m_jax/sharding.py RULES")


def spread(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """`x` with its first dimensions split over these axes of the current mesh (`jax.set_mesh`) and the rest whole.

    Where no mesh is set it stays as it is. Left to itself, XLA splits activations as the parameters are split: it
    then sums partial products of whole batches instead of gathering a layer's parameters.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*axes))


def gathered(parameters: Any) -> Any:
    """The parameters of a layer, or of a model but for its stacked layers, put together from all of `fsdp`.

    Inside of the step: a layer's are gathered when it runs, their gradients scattered when it has run backwards.
    """

    def whole(path: tuple[Any, ...], leaf: Array) -> Array:
        spec = _spec(path, leaf)
        if "fsdp" not in spec or path_name(path).startswith("layers/"):
            return leaf
        return spread(leaf, *(None if axis == "fsdp" else axis for axis in spec))

    return jax.tree_util.tree_map_with_path(whole, parameters)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Songs over `data` and `fsdp`; what follows the first dimension is whole until `context` splits it in the step."""
    return NamedSharding(mesh, P(SONGS))


def position_sharding(mesh: Mesh) -> NamedSharding:
    """[B, T, ...]: songs over `data` and `fsdp`, positions over `context`."""
    return NamedSharding(mesh, P(SONGS, "context"))


def check_divides(mesh: Mesh, songs: int, config: ModelConfig) -> None:
    """Raises UserError where a dimension does not divide over its axis. `songs` are those of one micro-batch."""
    size, layout = dict(mesh.shape), make_layout(config)
    heads, key_heads = config.heads, config.key_heads
    for what, number, axis, parts in (
        ("train.batch / train.accumulate", songs, "data x mesh.fsdp", size["data"] * size["fsdp"]),
        ("model.heads", heads, "tensor", size["tensor"]),
        ("model.width", config.width, "fsdp", size["fsdp"]),
        ("the number of ids of the output", layout.streams * layout.id_space, "tensor", size["tensor"]),
        ("positions of the window", layout.positions, "context", size["context"]),
    ):
        if number % parts:
            raise UserError(f"{what} is {number}, which does not divide over mesh.{axis} = {parts}")
    keys, parts = key_heads or heads, size["tensor"]
    if keys % parts and (
        parts % keys or config.head_width * keys % parts
    ):  # devices may share a key head, not parts of two
        raise UserError(f"model.key_heads is {keys}: it must divide over mesh.tensor = {parts}, or divide {parts}")
