"""Scaled dot-product attention whose memory grows with T, not with T squared. After `data`, before `model`.

Heads stand before positions, [B, N, T, H]: a decode step then reads each head's cache as one contiguous block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512  # queries at a time: scores of 512 x 18,432 float32 are 36 MiB a head
PARTS = 8  # stretches of queries that see only the keys up to their own end: 9/16 of the square instead of all of it


def attend(
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B N C H"],
    v: Float[Array, "B N C H"],
    seen: Bool[Array, "#B 1 #Q C"],
) -> Float[Array, "B N Q H"]:
    """softmax(q k^T / sqrt(H)) v over the keys `seen`, scores and softmax in float32 (Vaswani et al., 2017)."""
    scores = jnp.einsum("bnqh,bnch->bnqc", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqc,bnch->bnqh", weights.astype(v.dtype), v)


def causal_attention(
    q: Float[Array, "B N T H"], k: Float[Array, "B N T H"], v: Float[Array, "B N T H"]
) -> Float[Array, "B N T H"]:
    """Each position attends to itself and to those before it, `BLOCK` queries at a time, recomputed backwards."""
    length = q.shape[2]
    size = next(b for b in (BLOCK, 256, 128, length) if length % b == 0)
    blocks = length // size
    ends = [size * (blocks * (part + 1) // min(PARTS, blocks)) for part in range(min(PARTS, blocks))]
    parts = []
    for start, end in zip([0, *ends], ends):
        parts.append(_causal_blocks(q[:, :, start:end], k[:, :, :end], v[:, :, :end], start, size))
    return jnp.concatenate(parts, axis=2)


def _causal_blocks(q: Array, k: Array, v: Array, start: int, size: int) -> Array:
    """Attention of the queries that begin at position `start`, `size` of them at a time."""
    keys = jnp.arange(k.shape[2])

    @jax.checkpoint
    def block(i: Array, q_block: Array) -> Array:
        queries = start + i * size + jnp.arange(size)
        return attend(q_block, k, v, (keys <= queries[:, None])[None, None])

    count = q.shape[2] // size
    if count == 1:
        return block(jnp.array(0), q)
    split = q.reshape(*q.shape[:2], count, size, q.shape[-1])
    out = jax.lax.map(lambda x: block(*x), (jnp.arange(count), jnp.moveaxis(split, 2, 0)))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)


def to_pages(x: Float[Array, "B N C H"], page: int) -> Float[Array, "P G H"]:
    """Keys or values of C positions as pages of G: the B N rows of the first page, then those of the second."""
    rows = x.reshape(-1, x.shape[2] // page, page, x.shape[3])
    return rows.swapaxes(0, 1).reshape(-1, page, x.shape[3])


def write_page(pages: Float[Array, "P G H"], x: Float[Array, "B N 1 H"], at: Int[Array, ""]) -> Float[Array, "P G H"]:
    """The pages with position `at` set to x: in place, where the pages are the state of a compiled loop."""
    rows, page = x.shape[0] * x.shape[1], pages.shape[1]
    return jax.lax.dynamic_update_slice(
        pages, x.reshape(rows, 1, -1).astype(pages.dtype), (at // page * rows, at % page, 0)
    )


def cached_attention(
    q: Float[Array, "B N 1 H"], k: Float[Array, "P G H"], v: Float[Array, "P G H"], at: Int[Array, ""]
) -> Float[Array, "B N 1 H"]:
    """`attend` of the query of position `at` to the pages up to itself; the rest is not yet written.

    One product a page and row, so that the keys and values are read where they lie: any other shape (and long dot
    products) costs XLA's CPU compiler a copy of the cache, or the second core.
    """
    rows, page = q.shape[0] * q.shape[1], k.shape[1]
    tall = jnp.tile(q.reshape(rows, -1), (k.shape[0] // rows, 1))
    scores = jnp.einsum("ph,pgh->pg", tall, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = scores.reshape(-1, rows, page)
    position = jnp.arange(scores.shape[0])[:, None, None] * page + jnp.arange(page)
    weights = jax.nn.softmax(jnp.where(position <= at, scores, -jnp.inf), axis=(0, 2))
    parts = jnp.einsum("pg,pgh->ph", weights.reshape(-1, page).astype(v.dtype), v)
    return parts.reshape(-1, *q.shape).sum(0)
