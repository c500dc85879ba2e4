"""Attention of every platform against the formula, forwards and backwards; a cache in pages; grouped heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType

from l2m_jax import attention as module
from l2m_jax.attention import attend, attention, cached_attention, to_pages, write_page

TOLERANCE = 1e-5


def plain(q, k, v, seen=None):
    """softmax(q k^T / sqrt(H)) v over the keys `seen`, or those up to the query, in one piece, keys repeated."""
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = jnp.einsum("bnqh,bnch->bnqc", q, k) / jnp.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool)) if seen is None else seen[:, None, None]
    return jnp.einsum("bnqc,bnch->bnqh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1), v)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def random_seen(songs: int, keys: int) -> jax.Array:
    return jax.random.bernoulli(jax.random.key(9), 0.5, (songs, keys)).at[:, -1].set(True)


def check(what: str, ours, theirs, tolerance: float = TOLERANCE) -> None:
    error = float(max(jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))))
    print(f"{what}: error {error:.1e}, tolerance {tolerance:.0e}")
    assert error <= tolerance


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("small", [True, False], ids=["plain", "blocks"])
def test_attention(monkeypatch, small, key_heads):
    """Causal and with keys that are not seen; with the plain formula and with blocks."""
    monkeypatch.setattr(module, "SMALL", 10**9 if small else 0)
    q, k, v = random(2, 4, 9, 4), random(2, key_heads, 9, 4, seed=1), random(2, key_heads, 9, 4, seed=2)
    check("causal", jax.jit(lambda *x: attention(*x))(q, k, v), plain(q, k, v))
    seen = random_seen(2, 9)
    check("seen", jax.jit(lambda *x: attention(*x))(q[:, :, :5], k, v, seen), plain(q[:, :, :5], k, v, seen))


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("at", [0, 3, 4, 15])
def test_cached_attention(at, key_heads):
    """The query of `at` equals that of the whole sequence, whatever lies in the pages behind it."""
    q, k, v = random(2, 4, 16, 4), random(2, key_heads, 16, 4, seed=1), random(2, key_heads, 16, 4, seed=2)
    behind = (jnp.arange(24) >= at)[:, None]
    pages = [to_pages(jnp.where(behind, 1e4, jnp.pad(x, ((0, 0), (0, 0), (0, 8), (0, 0)))), 4) for x in (k, v)]
    now = slice(at, at + 1)
    pages = [write_page(p, x[:, :, now], jnp.array(at)) for p, x in zip(pages, (k, v))]
    ours = cached_attention(q[:, :, now], *pages, 2 * key_heads, jnp.array(at))
    check("cached", ours, plain(q, k, v)[:, :, now])


def test_unseen_keys_change_nothing():
    q, k, v = random(2, 2, 3, 4), random(2, 2, 5, 4, seed=1), random(2, 2, 5, 4, seed=2)
    seen = jnp.array([[True] * 5, [True, False, True, False, False]])[:, None]
    other = jnp.where(seen[..., None].reshape(2, 1, 5, 1), k, 77.0)
    np.testing.assert_array_equal(attend(q, k, v, seen), attend(q, other, v, seen))
    only = attend(q[1:], k[1:, :, ::2], v[1:, :, ::2], jnp.array([[[True, True, False]]]))
    check("seen keys alone", attend(q, k, v, seen)[1:], only)
