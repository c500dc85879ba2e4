"""Attention of every platform against the formula, forwards and backwards; decode steps; grouped heads."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from l2m_jax import attention as module
from l2m_jax.attention import as_columns, as_rows, attend, attention, step_attention, write
from l2m_jax.config import MeshConfig
from l2m_jax.sharding import make_mesh

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
    errors = [jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))]
    error = float(np.max(errors))  # max() would pass over a NaN
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


@pytest.mark.parametrize("songs", [1, 2])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("at", [0, 3, 15])
def test_a_step_attends_to_the_cache(at, key_heads, songs):
    """The query of `at` equals that of the whole sequence, whatever lies in the cache behind it."""
    q, *kv = random(songs, 4, 16, 4), random(songs, key_heads, 16, 4, seed=1), random(songs, key_heads, 16, 4, seed=2)
    behind = (jnp.arange(24) >= at)[:, None]
    cache = [as_columns(jnp.where(behind, 1e4, jnp.pad(x, ((0, 0), (0, 0), (0, 8), (0, 0))))) for x in kv]
    now = slice(at, at + 1)
    cache = [write(c, x[:, :, now], jnp.array(at)) for c, x in zip(cache, kv)]
    ours = step_attention(q[:, :, now], *cache, jnp.arange(24) <= at)
    check("step", ours, plain(q, *kv)[:, :, now])


@pytest.mark.parametrize("songs, key_heads", [(1, 1), (1, 2), (3, 2)])
def test_a_step_attends_to_what_each_song_sees(songs, key_heads):
    q, *kv = random(songs, 4, 1, 4), random(songs, key_heads, 9, 4, seed=1), random(songs, key_heads, 9, 4, seed=2)
    seen = random_seen(songs, 9)
    of_heads = as_rows(jnp.broadcast_to(seen[:, None], (songs, key_heads, 9)))
    check("step", step_attention(q, *map(as_columns, kv), of_heads), plain(q, *kv, seen))


def test_unseen_keys_change_nothing():
    q, k, v = random(2, 2, 3, 4), random(2, 2, 5, 4, seed=1), random(2, 2, 5, 4, seed=2)
    seen = jnp.array([[True] * 5, [True, False, True, False, False]])[:, None]
    other = jnp.where(seen[..., None].reshape(2, 1, 5, 1), k, 77.0)
    np.testing.assert_array_equal(attend(q, k, v, seen), attend(q, other, v, seen))
    only = attend(q[1:], k[1:, :, ::2], v[1:, :, ::2], jnp.array([[[True, True, False]]]))
    check("seen keys alone", attend(q, k, v, seen)[1:], only)


def test_a_gpu_calls_cudnn(monkeypatch):
    """Lowered for one, in 16 bits; what asks the driver for its version is answered in its place."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def calls(heads: int, key_heads: int, dtype: str) -> int:
        q, k = (jax.ShapeDtypeStruct((1, n, 256, 64), dtype) for n in (heads, key_heads))
        step = jax.jit(jax.grad(lambda *x: attention(*x).sum().astype(float), (0, 1, 2)))
        return step.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text().count("custom_call @__cudnn$fmha")

    assert calls(4, 2, "bfloat16") == 2  # forwards and backwards
    assert calls(4, 2, "float32") == 0


SPLITS = {  # mesh, query heads, key heads, platform
    "songs": (MeshConfig(data=2, fsdp=-1), 4, 4, "cpu"),
    "heads": (MeshConfig(data=2, tensor=4), 8, 4, "cpu"),
    "shared heads": (MeshConfig(data=2, tensor=4), 8, 2, "cpu"),
    "one key head": (MeshConfig(data=2, tensor=4), 4, 1, "cpu"),
    "positions": (MeshConfig(data=2, context=4), 4, 2, "cpu"),
    "all": (MeshConfig(data=1, fsdp=2, tensor=2, context=2), 4, 1, "cpu"),
    "what does not divide": (MeshConfig(data=8), 3, 1, "cpu"),
    "TPU": (MeshConfig(data=1, fsdp=2, tensor=2, context=2), 4, 2, "tpu"),
}


@pytest.fixture(scope="module")
def on_eight_devices() -> dict[str, list[float]]:
    """What `compare` measured, in a process of its own: JAX counts its devices once."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SPLITS)
def test_split_over_devices(on_eight_devices, name):
    """The TPU's kernel is interpreted, for heads of half its lanes."""
    for what, error in zip(("causal", "causal gradient", "seen", "seen gradient"), on_eight_devices[name]):
        print(f"{name}: {what} error {error:.1e}, tolerance {TOLERANCE:.0e}")
        assert error <= TOLERANCE


def compare() -> dict[str, list[float]]:
    """Errors of attention and of its gradients on every mesh."""
    module.SMALL = 0
    splash.make_splash_mha = functools.partial(splash.make_splash_mha, interpret=True)
    measured = {}
    for name, (mesh_config, heads, key_heads, platform) in SPLITS.items():
        module.platform = lambda platform=platform: platform
        length, width = (256, 64) if platform == "tpu" else (24, 4)
        songs = 3 if name == "what does not divide" else 8
        q, grad = (random(songs, heads, length, width, seed=i) for i in (0, 3))
        k, v = (random(songs, key_heads, length, width, seed=i) for i in (1, 2))
        measured[name] = []
        for seen in (None, random_seen(songs, length)):
            with jax.set_mesh(make_mesh(mesh_config)):
                ours = jax.jit(lambda q, k, v, grad, s=seen: _value_and_gradient(attention, q, k, v, s, grad))
                ours = jax.tree.map(np.asarray, ours(q, k, v, grad))
            theirs = _value_and_gradient(plain, q, k, v, seen, grad)
            for a, b in zip(ours, theirs):
                pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
                measured[name].append(float(np.max([np.abs(x - y).max() for x, y in pairs])))
    return measured


def _value_and_gradient(function, q, k, v, seen, grad):
    value, back = jax.vjp(lambda q, k, v: function(q, k, v, seen), q, k, v)
    return value, back(grad)


if __name__ == "__main__":
    print(json.dumps(compare()))
