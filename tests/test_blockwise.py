"""Attention by blocks against the formula, forwards and backwards, and the memory that it takes."""

import jax
import jax.numpy as jnp
import pytest
from test_attention import check, plain, random, random_seen

from l2m_jax import blockwise
from l2m_jax.blockwise import blockwise_attention


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seen", [False, True], ids=["causal", "seen"])
@pytest.mark.parametrize("length, block, group", [(1, 8, 1), (23, 8, 4), (127, 64, 2), (128, 64, 1), (1000, 512, 2)])
def test_blocks(monkeypatch, length, block, group, seen, together):
    """One position, lengths that no block divides, one that it does; query heads that share a key head."""
    monkeypatch.setattr(blockwise, "BLOCK", block)
    shared = 4 // group
    q, k, v = random(2, 4, length, 4), random(2, shared, length, 4, seed=1), random(2, shared, length, 4, seed=2)
    start, mask = (None, random_seen(2, length)) if seen else (jnp.array(0), None)
    ours = jax.vjp(jax.jit(lambda *x: blockwise_attention(*x, start, mask, together)), q, k, v)
    theirs = jax.vjp(lambda *x: plain(*x, mask), q, k, v)
    check(f"{length} in blocks of {block}", ours[0], theirs[0])
    grad = random(2, 4, length, 4, seed=3)
    check("its gradient", ours[1](grad), theirs[1](grad))


@pytest.mark.parametrize("start", [0, 5, 16, 21])
def test_queries_of_a_part_of_the_positions(monkeypatch, start):
    """As devices that split a song compute them."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    q, k, v = (random(1, 2, 32, 4, seed=i) for i in range(3))
    part = slice(start, start + 11)

    def one(q, k, v):
        return blockwise_attention(q[:, :, part], k, v, jnp.array(start))

    ours, theirs = jax.vjp(one, q, k, v), jax.vjp(lambda *x: plain(*x)[:, :, part], q, k, v)
    check("a part", ours[0], theirs[0])
    check("its gradient", ours[1](ours[0]), theirs[1](theirs[0]))


def test_bfloat16_keeps_float32_scores():
    """Scores and softmax are float32: a bfloat16 result is as near as its inputs allow."""
    q, k, v = (random(1, 2, 64, 8, seed=i).astype(jnp.bfloat16) for i in range(3))
    ours = blockwise_attention(q, k, v, jnp.array(0))
    assert ours.dtype == jnp.bfloat16
    check("bfloat16", ours.astype(jnp.float32), plain(*(x.astype(jnp.float32) for x in (q, k, v))), 2e-2)


def test_memory_grows_with_length():
    """Of a step with its gradient, as compiled: no scores of all queries and all keys, kept or passing."""

    def step(q, k, v):
        return jax.grad(lambda *x: blockwise_attention(*x, jnp.array(0)).sum(), (0, 1, 2))(q, k, v)

    def temporary(length: int) -> int:
        q, k = (jax.ShapeDtypeStruct((1, heads, length, 16), jnp.float32) for heads in (4, 1))
        return jax.jit(step).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    print(f"{short / 2**20:.1f} MiB at 4,096 positions, {long / 2**20:.1f} at 16,384; tolerance 4.2 times")
    assert long <= 4.2 * short
