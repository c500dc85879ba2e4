"""Attention a block at a time, with a backward pass of its own: memory grows with T. After `data`, before `attention`.

Forwards, each block of queries goes over the blocks of keys with a running maximum and sum, and keeps its result and
log-sum-exp; backwards, the scores are computed anew (FlashAttention-2: Dao, 2023). Blocks above the diagonal are never
touched. The query heads that share a key head stand together in one block.

Letters: K key heads, R = B K rows, I blocks of Q queries (positions of each head of a group), J blocks of G keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512  # positions of queries, and keys, at a time; measured against 256, 384, 768 and 1,024
ROWS = 2048  # queries of all heads of a group at a time: larger products run faster, up to here
KEPT = "attention"  # what a remat policy can keep of the forward pass: result and log-sum-exp
LOWEST = -1e30  # below every score, and finite: differences are numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    start: Int[Array, ""] | None = None,
    seen: Bool[Array, "B C"] | None = None,
    together: bool = False,
) -> Float[Array, "B N T H"]:
    """softmax(q k^T / sqrt(H)) v, scores and softmax in float32. Query head n reads key head n // (N / K).

    With `start` it is causal: query t stands at position start + t and sees the keys up to there. With `seen`, only
    these keys are seen, one at least. `together` computes all rows at once, for accelerators; a CPU takes them in turn.
    """
    return _forward(q, k, v, start, seen, together)[0]


def _forward(q: Array, k: Array, v: Array, start: Array | None, seen: Array | None, together: bool) -> list[Array]:
    """The result, and the log-sum-exp of every query's scores, [R, I, Q]."""
    count, q = _positions(q, k), _scaled(q)

    def row(q: Array, k: Array, v: Array, bias: Array | None) -> tuple[Array, Array]:
        def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
            i, q = part

            def add(position: Array | None, j: Array, carry: tuple) -> tuple:
                out, top, total = carry
                scores = _dot("qh,gh->qg", q, _at(k, j))
                if bias is not None:
                    scores += _at(bias, j)
                if position is not None:
                    scores = jnp.where(_keys(k, j) <= position[:, None], scores, -jnp.inf)
                higher = jnp.maximum(top, scores.max(1))
                weights, fade = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
                new = _dot("qg,gh->qh", weights.astype(v.dtype), _at(v, j))
                return out * fade[:, None] + new, higher, total * fade + weights.sum(1)

            empty = jnp.zeros(q.shape, jnp.float32), jnp.full(len(q), LOWEST), jnp.zeros(len(q))
            out, top, total = _over_keys(add, _first(start, i, count), count, q, k, empty)
            return (out / total[:, None]).astype(q.dtype), top + jnp.log(total)

        return jax.lax.map(block, (jnp.arange(len(q)), q))

    parts = _queries(q, k), _keys_in_blocks(k), _keys_in_blocks(v), _bias(start is not None, seen, k)
    out, lse = _over_rows(row, together, parts)
    return [_whole(out, q, k), lse]


def _kept_forward(q: Array, k: Array, v: Array, start: Array | None, seen: Array | None, together: bool) -> tuple:
    out, lse = (checkpoint_name(x, KEPT) for x in _forward(q, k, v, start, seen, together))
    return out, (q, k, v, start, seen, out, lse)


def _backward(together: bool, kept: tuple, grad: Array) -> tuple:
    """Gradients of q, k and v. Scores stand as [G, Q] and q's gradient as [H, Q]: no product turns its left side."""
    q, k, v, start, seen, out, lse = kept
    count, q = _positions(q, k), _scaled(q)

    def row(
        q: Array, k: Array, v: Array, bias: Array | None, out: Array, lse: Array, grad: Array
    ) -> tuple[Array, Array, Array]:
        turned = k.swapaxes(1, 2)

        def block(carry: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Array]:
            i, q, out, lse, grad = part
            shift = (out.astype(jnp.float32) * grad).sum(1)

            def add(position: Array | None, j: Array, carry: tuple) -> tuple:
                dq, dk, dv = carry
                scores = _dot("gh,qh->gq", _at(k, j), q)
                if bias is not None:
                    scores += _at(bias, j)[:, None]
                if position is not None:
                    scores = jnp.where(_keys(k, j)[:, None] <= position, scores, -jnp.inf)
                weights = jnp.exp(scores - lse)
                ds = (weights * (_dot("gh,qh->gq", _at(v, j), grad) - shift)).astype(q.dtype)
                dk = _add_at(dk, j, _dot("gq,qh->gh", ds, q))
                dv = _add_at(dv, j, _dot("gq,qh->gh", weights.astype(q.dtype), grad))
                return dq + _dot("hg,gq->hq", _at(turned, j), ds), dk, dv

            empty = jnp.zeros(q.shape[::-1], jnp.float32)
            dq, dk, dv = _over_keys(add, _first(start, i, count), count, q, k, (empty, *carry))
            return (dk, dv), dq.T.astype(q.dtype)

        empty = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(block, empty, (jnp.arange(len(q)), q, out, lse, grad))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    parts = _queries(q, k), _keys_in_blocks(k), _keys_in_blocks(v), _bias(start is not None, seen, k)
    dq, dk, dv = _over_rows(row, together, (*parts, _queries(out, k), lse, _queries(grad, k)))
    dk, dv = (x.reshape(*k.shape[:2], -1, k.shape[3])[:, :, : k.shape[2]] for x in (dk, dv))
    return _scaled(_whole(dq, q, k)), dk, dv, None, None


blockwise_attention.defvjp(_kept_forward, _backward)


def _over_rows(row: Callable, together: bool, parts: tuple) -> Any:
    return jax.vmap(row)(*parts) if together else jax.lax.map(lambda part: row(*part), parts)


def _over_keys(add: Callable, first: Array | None, count: int, q: Array, k: Array, carry: tuple) -> tuple:
    """add(position, j, carry) over the key blocks that the block of queries at position `first` sees.

    `position` [Q] is None where all keys of a block are before all queries: no mask is needed.
    """
    if first is None:
        return jax.lax.fori_loop(0, len(k), functools.partial(add, None), carry)
    size = k.shape[1]
    before = jnp.minimum((first + 1) // size, len(k))
    touched = jnp.minimum((first + count - 1) // size + 1, len(k))
    carry = jax.lax.fori_loop(0, before, functools.partial(add, None), carry)
    return jax.lax.fori_loop(before, touched, functools.partial(add, first + jnp.arange(len(q)) % count), carry)


def _scaled(q: Array) -> Array:
    """Queries over sqrt(H): cheaper than the scores over it, of which there are C / H times as many."""
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _positions(q: Array, k: Array) -> int:
    """Positions of a block of queries, which holds them for all heads of a group."""
    return _even(q.shape[2], max(min(BLOCK, ROWS * k.shape[1] // q.shape[1]), 8))


def _even(length: int, size: int) -> int:
    """The size of equal blocks of about `size` at most: 576 are twice 288, not 512 and a block of padding."""
    blocks = -(-length // size)
    return min(-(-length // blocks // 8) * 8, length) if blocks > 1 else length


def _first(start: Any, i: Array, count: int) -> Array | None:  # a constant start may come as an int
    return None if start is None else start + i * count


def _queries(x: Float[Array, "B N T H"], k: Float[Array, "B K C H"]) -> Float[Array, "R I Q H"]:
    count, group = _positions(x, k), x.shape[1] // k.shape[1]
    x = _padded(x, count, 2).reshape(-1, group, -(-x.shape[2] // count), count, x.shape[3])
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1, x.shape[4])


def _whole(x: Float[Array, "R I Q H"], q: Float[Array, "B N T H"], k: Float[Array, "B K C H"]) -> Array:
    """What `_queries` took apart."""
    x = x.reshape(*x.shape[:2], q.shape[1] // k.shape[1], -1, x.shape[3]).swapaxes(1, 2)
    return x.reshape(*q.shape[:2], -1, q.shape[3])[:, :, : q.shape[2]]


def _keys_in_blocks(x: Float[Array, "B K C H"]) -> Float[Array, "R J G H"]:
    size = _even(x.shape[2], BLOCK)
    return _padded(x, size, 2).reshape(x.shape[0] * x.shape[1], -1, size, x.shape[3])


def _bias(causal: bool, seen: Bool[Array, "B C"] | None, k: Array) -> Float[Array, "R J G"] | None:
    """What is added to the scores: -inf where a key is not seen. Causal queries do not reach the keys that pad."""
    if seen is None:
        if causal:
            return None
        seen = jnp.ones((k.shape[0], k.shape[2]), bool)
    size = _even(k.shape[2], BLOCK)
    bias = jnp.where(_padded(seen, size, 1), 0.0, -jnp.inf).reshape(len(k), -1, size)
    return jnp.repeat(bias, k.shape[1], axis=0)


def _padded(x: Array, size: int, axis: int) -> Array:
    return jnp.pad(x, [(0, -x.shape[a] % size if a == axis else 0) for a in range(x.ndim)])


def _keys(k: Float[Array, "J G H"], j: Array) -> Int[Array, " G"]:
    return j * k.shape[1] + jnp.arange(k.shape[1])


def _dot(dims: str, a: Array, b: Array) -> Array:
    return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32)


def _at(x: Array, j: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, j, 0, keepdims=False)


def _add_at(x: Array, j: Array, y: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, _at(x, j) + y, j, 0)
