"""Blocked and cached attention against the formula, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax import attention
from l2m_jax.attention import attend, cached_attention, causal_attention, to_pages, write_page

TOLERANCE = 1e-5


def plain(q, k, v):
    """softmax(q k^T / sqrt(H)) v with every position after the query left out, in one piece."""
    scores = jnp.einsum("bnqh,bnch->bnqc", q, k) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnqc,bnch->bnqh", jax.nn.softmax(scores, -1), v)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def check(what: str, ours, theirs) -> None:
    error = float(max(jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))))
    print(f"{what}: error {error:.1e}, tolerance {TOLERANCE:.0e}")
    assert error <= TOLERANCE


# One position; one block; a length that no block divides; parts of a block each; parts of two and three blocks; the
# smallest block and the real number of parts.
@pytest.mark.parametrize(
    "length, block, parts", [(1, 512, 8), (512, 512, 8), (23, 8, 8), (24, 8, 8), (56, 8, 3), (1152, 512, 8)]
)
def test_causal_attention(monkeypatch, length, block, parts):
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "PARTS", parts)
    q, k, v, out = (random(2, 2, length, 4, seed=i) for i in range(4))
    ours, theirs = jax.vjp(jax.jit(causal_attention), q, k, v), jax.vjp(jax.jit(plain), q, k, v)
    check(f"{length} in blocks of {block}", ours[0], theirs[0])
    check("its gradient", ours[1](out), theirs[1](out))


@pytest.mark.parametrize("at", [0, 3, 4, 5, 15])
def test_cached_attention(at):
    """The query of `at` equals that of the whole sequence, whatever lies in the pages behind it."""
    q, k, v = (random(2, 2, 16, 4, seed=i) for i in range(3))
    behind = (jnp.arange(24) >= at)[:, None]
    pages = [to_pages(jnp.where(behind, 1e4, jnp.pad(x, ((0, 0), (0, 0), (0, 8), (0, 0)))), 4) for x in (k, v)]
    now = slice(at, at + 1)
    pages = [write_page(p, x[:, :, now], jnp.array(at)) for p, x in zip(pages, (k, v))]
    check("cached", cached_attention(q[:, :, now], *pages, jnp.array(at)), plain(q, k, v)[:, :, now])


def test_unseen_keys_change_nothing():
    q, k, v = random(2, 2, 3, 4), random(2, 2, 5, 4, seed=1), random(2, 2, 5, 4, seed=2)
    seen = jnp.array([[True] * 5, [True, False, True, False, False]])[:, None, None]
    other = jnp.where(seen[..., None, :].reshape(2, 1, 5, 1), k, 77.0)
    np.testing.assert_array_equal(attend(q, k, v, seen), attend(q, other, v, seen))
    only = attend(q[1:], k[1:, :, ::2], v[1:, :, ::2], jnp.array([[[[True, True, False]]]]))
    check("seen keys alone", attend(q, k, v, seen)[1:], only)


def test_bfloat16_keeps_float32_scores():
    """Scores and softmax are float32: a bfloat16 result is as near as its inputs allow."""
    q, k, v = (random(1, 2, 64, 8, seed=i).astype(jnp.bfloat16) for i in range(3))
    ours = causal_attention(q, k, v)
    assert ours.dtype == jnp.bfloat16
    error = float(jnp.abs(ours.astype(jnp.float32) - plain(*(x.astype(jnp.float32) for x in (q, k, v)))).max())
    print(f"bfloat16: error {error:.1e}, tolerance 2e-02")
    assert error <= 2e-2
