"""The SoundTransformer against its equations in numpy float64, what may not depend on what, and the presets' shapes."""

import dataclasses
import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l2m_jax import attention as attention_module
from l2m_jax import model as model_module
from l2m_jax.cli import PRESETS
from l2m_jax.config import Config, ModelConfig
from l2m_jax.data import Example
from l2m_jax.model import KINDS, Memory, Prompt, Remat, SoundTransformer, sinusoids
from l2m_jax.step import Totals, losses
from l2m_jax.tokens import Layout, make_layout

POST = ModelConfig(codebooks=2, entries=8, frames=12, memory=7, text_width=6, width=16, heads=2, layers=2)
DEEP = dataclasses.replace(POST, layout="delay", codebooks=3, norm="deepnorm")
PRE = dataclasses.replace(POST, norm="pre")
ROTARY = dataclasses.replace(DEEP, rotary=True)
each_model = pytest.mark.parametrize(
    "config", [POST, DEEP, PRE, ROTARY], ids=["post-flatten", "deepnorm-delay", "pre-flatten", "rotary-delay"]
)

# Song 0: genre, lyrics, padding; song 1: lyrics alone. Sections and positions as no song has them.
KIND = np.array([[0, 0, 1, 1, 1, -1, -1], [1, 1, 1, 1, -1, -1, -1]])
KEEP = np.array([[True, True], [True, True]])


@functools.cache
def make_model(config: ModelConfig) -> SoundTransformer:
    """Random in every parameter, also in those that begin at 0 or 1."""
    model = SoundTransformer(config, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def make_prompt(kind: np.ndarray = KIND, width: int = 6) -> Prompt:
    rng = np.random.default_rng(2)
    states = rng.normal(size=(*kind.shape, width)).astype(np.float32)
    section, position = (rng.integers(0, 8, kind.shape) for _ in range(2))
    return Prompt(*map(jnp.asarray, (states, kind, section, position)))


def make_ids(config: ModelConfig) -> np.ndarray:
    layout, rng = make_layout(config), np.random.default_rng(3)
    songs = [rng.integers(0, config.entries, (frames, config.codebooks)) for frames in (12, 7)]
    return np.stack([layout.encode(codes).ids for codes in songs])[:, :24]


@functools.partial(jax.jit, static_argnames=("layout", "remat"))
def forward(model: SoundTransformer, layout: Layout, ids, prompt: Prompt, keep, remat: Remat = "none"):
    """Logits [B, T, J, W]."""
    memory = model.memory(prompt, keep)
    return model.logits(model.hidden(ids, layout.place(jnp.arange(ids.shape[1])), memory, remat))


# The equations, one song at a time, as the papers write them.


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turned(x, heads):
    """Pairs as complex numbers."""
    x = x.reshape(len(x), heads, 2, -1)
    pairs = x[:, :, 0] + 1j * x[:, :, 1]
    half = pairs.shape[-1]
    pairs *= np.exp(1j * np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(half) / half)))[:, None]
    return np.stack([pairs.real, pairs.imag], 2).reshape(len(x), -1)


def attention(p, x, memory, seen, heads, rotary=False):
    q, k, v = linear(p["query"], x), linear(p["key"], memory), linear(p["value"], memory)
    q, k = (turned(q, heads), turned(k, heads)) if rotary else (q, k)
    size, out = x.shape[-1] // heads, []
    for h in range(heads):
        s = slice(h * size, (h + 1) * size)
        scores = np.where(seen, q[:, s] @ k[:, s].T / math.sqrt(size), -np.inf)
        out.append(softmax(scores) @ v[:, s])
    return linear(p["out"], np.concatenate(out, -1))


def reference_memory(p, prompt, song, keep):
    """The rows that song `song` sees, in any order."""
    states, kind, section, position = (np.asarray(x[song], np.float64) for x in prompt)
    kind, section, rows = kind.astype(int), section.astype(int), []
    for k in range(KINDS):
        mine = np.flatnonzero(kind == k) if keep[k] else []
        if not len(mine):
            rows.append(p["null_embedding"][k])
        for s in mine:
            d = len(p["null_embedding"][k])
            angle = position[s] * 10_000.0 ** (-np.arange(d // 2) / (d // 2))
            row = linear(p["project"], states[s]) + p["kind_embedding"][k] + p["section_embedding"][section[s]]
            rows.append(row + np.concatenate([np.sin(angle), np.cos(angle)]))
    return np.stack(rows)


def reference(config: ModelConfig, model: SoundTransformer, ids, prompt: Prompt, keep) -> np.ndarray:
    """Logits [B, T, J, W] without the ids that pad W."""
    layout = make_layout(config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    deep = config.norm == "deepnorm"
    a, k = ((3 * config.layers) ** 0.25 if deep else 1), config.codebooks
    tables = p["token_embedding"].reshape(layout.streams, layout.id_space, -1)
    songs = []
    for b, song in enumerate(np.asarray(ids)):
        memory = reference_memory(p, prompt, b, keep[b])
        x = []
        for t, tokens in enumerate(song):
            row = sum(table[i] for table, i in zip(tables, tokens))
            frame, codebook = (0, k) if t == 0 else divmod(t - 1, k) if config.layout == "flatten" else (t - 1, 0)
            frame = min(frame, len(p["position_embedding"]) - 1)  # padding beyond the window
            x.append(row + p["codebook_embedding"][codebook] + p["position_embedding"][frame])
        x, causal = np.stack(x), np.tril(np.ones((len(song), len(song)), bool))
        for i in range(config.layers):
            q = jax.tree.map(lambda w, i=i: w[i], p["layers"])
            of_self = functools.partial(attention, q["self_attention"], seen=causal, heads=config.heads)
            for norm, sublayer in (
                (q["norm1"], lambda x, f=of_self: f(x, x, rotary=config.rotary)),
                (q["norm2"], lambda x, q=q, m=memory: attention(q["cross_attention"], x, m, True, config.heads)),
                (q["norm3"], lambda x, q=q: linear(q["down"], gelu(linear(q["up"], x)))),
            ):
                pre = config.norm == "pre"
                x = x + sublayer(layer_norm(norm, x)) if pre else layer_norm(norm, a * x + sublayer(x))
        if config.norm == "pre":
            x = layer_norm(p["final_norm"], x)
        songs.append(linear(p["head"], x).reshape(len(song), layout.streams, layout.id_space))
    return np.stack(songs)[..., : layout.pad + 1]


@each_model
def test_the_equations(config: ModelConfig):
    """Every mixture of kept, dropped and absent conditions."""
    model, ids, prompt, layout = make_model(config), make_ids(config), make_prompt(), make_layout(config)
    for keep in (KEEP, np.array([[True, False], [False, True]]), np.array([[False, False], [True, False]])):
        ours = np.asarray(forward(model, layout, jnp.asarray(ids), prompt, jnp.asarray(keep)))
        assert (ours[..., layout.pad + 1 :] == -np.inf).all()
        theirs = reference(config, model, ids, prompt, keep)
        error = np.abs(ours[..., : layout.pad + 1] - theirs).max() / np.abs(theirs).max()
        print(f"logits: relative error {error:.1e}, tolerance 1e-05")
        assert error <= 1e-5


@each_model
def test_causality(config: ModelConfig):
    """The token at t changes the logits from t on and none before."""
    model, ids, prompt, layout = make_model(config), make_ids(config), make_prompt(), make_layout(config)
    before = np.asarray(forward(model, layout, jnp.asarray(ids), prompt, jnp.asarray(KEEP)))[..., : layout.pad + 1]
    for t in (0, 1, 6, 11):
        for j in range(layout.streams):
            other = ids.copy()
            other[0, t, j] = (ids[0, t, j] + 1) % config.entries
            after = np.asarray(forward(model, layout, jnp.asarray(other), prompt, jnp.asarray(KEEP)))
            changed = np.abs(after[..., : layout.pad + 1] - before).max((2, 3)) > 0
            assert not changed[0, :t].any() and changed[0, t:].all() and not changed[1].any()


@each_model
def test_what_pads_changes_nothing(config: ModelConfig):
    """Rows of kind -1, of dropped kinds, and positions after the song."""
    model, ids, layout = make_model(config), jnp.asarray(make_ids(config)), make_layout(config)
    prompt, run = make_prompt(), lambda *x: np.asarray(forward(model, layout, *x))[..., : layout.pad + 1]
    keep = jnp.array([[True, False], [False, True]])
    expected = run(ids, prompt, keep)
    hidden = (KIND == -1) | (KIND == np.array([[1], [0]]))
    noise = prompt._replace(states=jnp.where(hidden[..., None], 99.0, prompt.states))
    noise = noise._replace(section=jnp.where(hidden, 3, prompt.section), position=jnp.where(hidden, 9, prompt.position))
    np.testing.assert_array_equal(run(ids, noise, keep), expected)
    np.testing.assert_array_equal(run(ids.at[:, 20:].set(0), prompt, keep)[:, :20], expected[:, :20])
    # A dropped kind is an absent kind, and every row that is seen counts.
    absent = prompt._replace(kind=jnp.where(hidden, -1, prompt.kind))
    np.testing.assert_allclose(run(ids, absent, jnp.asarray(KEEP)), expected, atol=1e-5)
    for row in np.argwhere(~hidden):
        other = prompt._replace(states=prompt.states.at[tuple(row)].add(1.0))
        assert np.abs(run(ids, other, keep)[row[0]] - expected[row[0]]).max() > 1e-3


def test_memory_rows():
    """A null row is seen exactly where its kind is not; section, position and kind set lyric rows apart."""
    model, prompt = make_model(POST), make_prompt()
    seen = [
        np.asarray(model.memory(prompt, jnp.array([keep, keep])).seen)
        for keep in ([True, True], [False, True], [True, False], [False, False])
    ]
    assert [s[0, :2].tolist() for s in seen] == [[False, False], [True, False], [False, True], [True, True]]
    assert [s[1, :2].tolist() for s in seen] == [[True, False], [True, False], [True, True], [True, True]]
    assert [s[:, 2:].sum(1).tolist() for s in seen] == [[5, 4], [3, 4], [2, 0], [0, 0]]
    keep = jnp.asarray(KEEP)
    rows = model.memory(prompt, keep).states[0, 2 + 3]
    for change in (
        {"section": (prompt.section + 1) % 8},
        {"position": prompt.position + 1},
        {"kind": jnp.where(prompt.kind == 1, 0, prompt.kind)},
    ):
        assert jnp.abs(model.memory(prompt._replace(**change), keep).states[0, 2 + 3] - rows).max() > 0.05


def test_sinusoids():
    ours = np.asarray(sinusoids(jnp.array([[0, 1, 7]]), 7))[0]
    angles = np.array([0, 1, 7])[:, None] / 10_000 ** (np.arange(4) / 4)
    np.testing.assert_allclose(ours, np.hstack([np.sin(angles), np.cos(angles)])[:, :7], atol=1e-6)


def test_layers_begin_different_and_as_deep_norm_says():
    """Layers are drawn one by one; the gain of DeepNorm is on value, output and MLP weights and on no other."""
    wide = dataclasses.replace(DEEP, width=64, layers=3)
    layers = SoundTransformer(wide, rngs=nnx.Rngs(0)).layers
    gain = (12 * 3) ** -0.25
    for linear, expected in (
        (layers.self_attention.query, 1.0),
        (layers.cross_attention.key, 1.0),
        (layers.self_attention.value, gain),
        (layers.cross_attention.out, gain),
        (layers.up, gain),
        (layers.down, gain),
    ):
        kernel = np.asarray(linear.kernel[...])
        xavier = expected * math.sqrt(2 / sum(kernel.shape[1:]))
        np.testing.assert_allclose(kernel.std(axis=(1, 2)), xavier, rtol=0.06)
        assert np.abs(kernel[0] - kernel[1]).max() > 0


def test_remat_changes_nothing(monkeypatch):
    model, ids, layout = make_model(DEEP), jnp.asarray(make_ids(DEEP)), make_layout(DEEP)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(model: SoundTransformer, remat: Remat):
        def loss(model: SoundTransformer):
            logits = forward(model, layout, ids, make_prompt(), jnp.asarray(KEEP), remat)[..., : layout.pad + 1]
            return (logits**2).mean()

        return jax.value_and_grad(loss)(model)

    monkeypatch.setattr(attention_module, "SMALL", 0)  # the plain formula has nothing that could be kept
    for strip, remat in ((1024, "attention"), (1024, "layer"), (8, "attention"), (8, "layer")):  # of 24 positions
        monkeypatch.setattr(model_module, "STRIP", strip)
        jax.clear_caches()
        for a, b in zip(jax.tree.leaves(gradient(model, "none")), jax.tree.leaves(gradient(model, remat))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def preset(name: str) -> tuple[Config, str]:
    module = importlib.import_module(f"l2m_jax.configs.{name}")
    return module.config, module.__doc__ or ""


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str):
    """Model and loss of every preset at its real size, and the number of parameters that its docstring quotes."""
    config, text = preset(name)
    layout = make_layout(config.model)
    model = jax.eval_shape(lambda: SoundTransformer(config.model, rngs=nnx.Rngs(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
    print(f"{name}: {count / 1e6:.1f} M parameters")
    for number, unit in re.findall(r"([\d.]+) ([MB]) parameters", text):
        assert math.isclose(count, float(number) * {"M": 1e6, "B": 1e9}[unit], rel_tol=0.1)
    batch, s = 2, config.model.memory

    def like(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    tokens, row = like(layout.positions, layout.streams), like(s)
    example = Example(tokens, tokens, like(s, config.model.text_width, dtype=jnp.float32), row, row, row)
    keep = like(KINDS, dtype=jnp.bool_)
    totals = jax.eval_shape(lambda *x: losses(*x, layout, config.train.chunk, config.train.remat), model, example, keep)
    assert totals.nats.shape == totals.codes.shape == (layout.streams,) and isinstance(totals, Totals)
    assert totals.nats.dtype == jnp.float32


def test_compute_type():
    """bfloat16 is what products are computed in; parameters and logits stay float32."""
    config = dataclasses.replace(POST, dtype="bfloat16")
    model = SoundTransformer(config, rngs=nnx.Rngs(0))
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    layout, ids = make_layout(config), jnp.zeros((2, 3, 1), jnp.int32)
    memory: Memory = jax.eval_shape(model.memory, make_prompt(), jnp.asarray(KEEP))
    hidden = jax.eval_shape(lambda m: model.hidden(ids, layout.place(jnp.arange(3)), m), memory)
    assert memory.states.dtype == hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(model.logits, hidden).dtype == jnp.float32
