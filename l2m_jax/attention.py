"""Attention of whole sequences, by the platform that it is for, and of single steps to a cache. After `blockwise`.

Heads stand before positions, [B, N, T, H]: a decode step then reads each head's cache as one contiguous block.
K key heads are shared by N / K query heads each, one after the other (grouped queries: Ainslie et al., 2023).

A CPU runs `blockwise_attention`, a TPU Pallas splash attention, a GPU cuDNN's where that can (whole causal
self-attention in half precision) and else the blockwise one. cuDNN's ran on an H100 (`scripts/check_accelerator.py`);
the tests lower its call. The TPU's kernel has not run on hardware yet: it is tested by interpreting it on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from l2m_jax.blockwise import KEPT, blockwise_attention
from l2m_jax.sharding import SONGS

SMALL = 1 << 22  # scores (16 MiB) up to which the plain formula is taken
LANES = 128  # what the TPU's kernel wants head width and positions to be multiples of; its memory pads to them anyway
HEADS, POSITIONS = ("tensor",), ("context",)  # axes of the mesh


def attend(
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    seen: Bool[Array, "#B #Q C"],
) -> Float[Array, "B N Q H"]:
    """softmax(q k^T / sqrt(H)) v over the keys `seen`, scores and softmax in float32 (Vaswani et al., 2017).

    The queries that share a key head stand in one row, and axes of one are left out: beside such an axis XLA's CPU
    compiler sums at a tenth of the rate.
    """
    ones = tuple(axis for axis, size in enumerate(k.shape[:2]) if size == 1)
    heads, k, v = k.shape[1], k.squeeze(ones), v.squeeze(ones)
    if seen.shape[1] > 1:
        seen = jnp.tile(seen, (1, q.shape[1] // heads, 1))
    rows = q.reshape(*k.shape[:-2], -1, q.shape[-1])
    scores = jnp.einsum("...qh,...ch->...qc", rows, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None].squeeze(ones), scores, -jnp.inf), axis=-1)
    return jnp.einsum("...qc,...ch->...qh", weights.astype(v.dtype), v).reshape(q.shape)


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    seen: Bool[Array, "B C"] | None = None,
) -> Float[Array, "B N T H"]:
    """`attend` to the keys `seen`, or causally without it, in memory that grows with T and not with T C.

    Under a mesh each device computes its own songs, heads and positions; it gathers the keys and values that its
    positions see. Axes that do not divide what they would split are left out.
    """
    mesh, on, causal = jax.sharding.get_abstract_mesh(), platform(), seen is None
    songs, positions = _axes(mesh, SONGS, len(q)), _axes(mesh, POSITIONS, q.shape[2])
    heads, key_heads = _axes(mesh, HEADS, q.shape[1]), _axes(mesh, HEADS, k.shape[1])
    if heads and not key_heads and _size(mesh, heads) % k.shape[1]:
        heads = None  # a device's query heads would belong to parts of two groups
    group = q.shape[1] // k.shape[1]

    def local(q: Array, k: Array, v: Array, seen: Array | None, kernel: Any) -> Array:
        start = jnp.array(0)
        if causal and positions:
            start = jax.lax.axis_index(positions) * q.shape[2]
            k, v = (jax.lax.all_gather(x, positions, axis=2, tiled=True) for x in (k, v))
        if heads and not key_heads:
            mine = jax.lax.axis_index(heads) * q.shape[1] // group
            k, v = (jax.lax.dynamic_slice_in_dim(x, mine, 1, axis=1) for x in (k, v))
        return _local(q, k, v, start, seen, kernel, on, whole=not positions)

    if mesh.empty or mesh.size == 1:
        return local(q, k, v, seen, _splash_kernel(q, k, causal, on, 1, 1))
    kernel = _splash_kernel(q, k, causal, on, _size(mesh, heads), _size(mesh, positions))
    of_kernel = kernel and kernel.manual_sharding_spec(
        NamedSharding(mesh, PartitionSpec(None, positions if causal else None))
    )
    of_keys = PartitionSpec(songs, key_heads, positions if causal else None)
    of_queries = PartitionSpec(songs, heads, positions)
    specs = (of_queries, of_keys, of_keys, PartitionSpec(songs), of_kernel)
    # Pallas calls do not say over which axes their results vary: the check is left out.
    return jax.shard_map(local, in_specs=specs, out_specs=of_queries, check_vma=False)(q, k, v, seen, kernel)


def platform() -> str:
    """Of the mesh that is set, else of this process: a step for TPUs can be compiled where there are none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _local(q: Array, k: Array, v: Array, start: Array, seen: Array | None, kernel: Any, on: str, whole: bool) -> Array:
    """Attention on one device, causal without `seen`; `start` is its first query's position, `whole`: it has all."""
    if kernel is not None:
        return _splash_attention(kernel, q, k, v, seen)
    width = q.shape[-1]
    cudnn = on == "gpu" and q.dtype.itemsize == 2 and width % 8 == 0 and width <= 128
    if cudnn and seen is None and whole:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)
    if q.size // width * k.shape[2] <= SMALL:
        before = (jnp.arange(k.shape[2]) <= start + jnp.arange(q.shape[2])[:, None])[None]
        return attend(q, k, v, before if seen is None else seen[:, None])
    return blockwise_attention(q, k, v, start if seen is None else None, seen, on != "cpu")


def _splash_kernel(q: Array, k: Array, causal: bool, on: str, head_shards: int, position_shards: int) -> Any:
    """The TPU's kernel for the shards of a device, or None where it is not a TPU or the shapes do not suit it."""
    length, keys = q.shape[2], -(-k.shape[2] // LANES) * LANES
    if on != "tpu" or length % (position_shards * LANES) or (causal and length != keys):
        return None
    tile_q, tile_k = math.gcd(length // position_shards, 512), math.gcd(keys, 512)
    if not causal:  # the mask of all shards is the same
        length, position_shards = length // position_shards, 1
    mask = splash.CausalMask((length, keys), shard_count=position_shards) if causal else splash.FullMask((length, keys))
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (q.shape[1] // head_shards)),
        block_sizes=splash.BlockSizes(
            block_q=tile_q,
            block_kv=tile_k,
            block_q_dkv=tile_q,
            block_kv_dkv=tile_k,
            block_q_dq=tile_q,
            block_kv_dq=tile_k,
        ),
        head_shards=1,
        q_seq_shards=position_shards,
        residual_checkpoint_name=KEPT,
    )


def _splash_attention(kernel: Any, q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """Heads and keys are padded to whole lanes; keys that are not seen are of another segment than the queries."""
    width, beside, pad = q.shape[-1], -q.shape[-1] % LANES, -k.shape[2] % LANES if seen is not None else 0
    q = jnp.pad(q * jnp.asarray(width**-0.5, q.dtype), ((0, 0), (0, 0), (0, 0), (0, beside)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, beside))) for x in (k, v))
    if seen is None:
        return jax.vmap(kernel)(q, k, v)[..., :width]
    other = jnp.pad(~seen, ((0, 0), (0, pad)), constant_values=True).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.zeros((len(q), q.shape[2]), jnp.int32), other)
    return jax.vmap(kernel)(q, k, v, segments)[..., :width]


def _axes(mesh: AbstractMesh, axes: tuple[str, ...], number: int) -> tuple[str, ...] | None:
    """The axes, where they split and divide `number`."""
    return axes if _size(mesh, axes) > 1 and number % _size(mesh, axes) == 0 else None


def _size(mesh: AbstractMesh, axes: tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape.get(axis, 1) for axis in axes or ())


def as_rows(x: Shaped[Array, "B K *X"]) -> Shaped[Array, "*R *X"]:
    """Songs and key heads as decode steps have them: one axis R = B K, and none where R is 1.

    With an axis of one XLA's CPU compiler copies the whole cache four times a step.
    """
    return x.reshape(*([-1] if x.shape[0] * x.shape[1] > 1 else []), *x.shape[2:])


def as_columns(x: Float[Array, "B K C H"]) -> Float[Array, "*R H C"]:
    """Keys or values as decode steps read them: a column a position."""
    return as_rows(x).swapaxes(-1, -2)


def write(cache: Float[Array, "*R H C"], x: Float[Array, "B K 1 H"], at: Int[Array, ""]) -> Float[Array, "*R H C"]:
    """The cache with position `at` set to x: in place, where it is the state of a compiled loop."""
    return jax.lax.dynamic_update_slice_in_dim(cache, as_columns(x).astype(cache.dtype), at, axis=-1)


def step_attention(
    q: Float[Array, "B N 1 H"], k: Float[Array, "*R H C"], v: Float[Array, "*R H C"], seen: Bool[Array, "*#R C"]
) -> Float[Array, "B N 1 H"]:
    """`attend` of a decode step: one query a head, keys and values as `as_columns`.

    They are read where they lie. With positions last, scores come as rows of C and no product turns anything over:
    on CPUs that is 1.3 to 1.8 times as fast as [C, H]. What is normalised is the result, not the C weights.
    """
    grouped = q.reshape(*k.shape[:-2], -1, q.shape[3])  # [*R, N / K, H]
    scores = jnp.einsum("...qh,...hc->...qc", grouped, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(seen[..., None, :], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    parts = jnp.einsum("...hc,...qc->...hq", v, weights.astype(v.dtype), preferred_element_type=jnp.float32)
    return (parts / weights.sum(-1)[..., None, :]).swapaxes(-1, -2).astype(v.dtype).reshape(q.shape)
