"""The decode loop: the rule against numpy, the cache against the whole forward pass, and where songs end."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l2m_jax import sample
from l2m_jax.config import ModelConfig, SampleConfig, UserError
from l2m_jax.data import prompt_rows
from l2m_jax.model import KeysValues, Prompt, SoundTransformer
from l2m_jax.sample import Song, draw, finished, guide, sample_codes, sample_states, variants
from l2m_jax.tokens import Layout, make_layout

V = 16
FLATTEN = ModelConfig(codebooks=2, entries=V, frames=31, memory=6, text_width=8, width=16, heads=2, layers=2)
DELAY = dataclasses.replace(FLATTEN, layout="delay", codebooks=3, frames=60)  # both are 64 positions
each_model = pytest.mark.parametrize("config", [FLATTEN, DELAY], ids=["flatten", "delay"])
GREEDY = SampleConfig(temperature=0.0)
FREE = SampleConfig(top_k=0)


@functools.cache
def make_model(config: ModelConfig, end_bias: float = 0.0) -> SoundTransformer:
    """Random, with a head sharp enough that the draw matters; `end_bias` is added to the logit of END."""
    model = _random_model(config)
    model.head.bias = nnx.Param(model.head.bias[...].at[make_layout(config).end].add(end_bias))
    return model


@functools.partial(jax.jit, static_argnums=0)
def _random_model(config: ModelConfig) -> SoundTransformer:
    model = SoundTransformer(config, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def make_prompt(songs: int) -> Prompt:
    """Another prompt for every song: genre and lyrics of other lengths."""
    rng = np.random.default_rng(4)
    rows = []
    for i in range(songs):
        lyrics, genre = rng.normal(size=(1 + i % 4, 8)), rng.normal(size=(i % 3, 8))
        rows.append(prompt_rows(lyrics, rng.integers(0, 8, len(lyrics)), genre, 6))
    return Prompt(*map(jnp.stack, zip(*rows)))


@functools.partial(jax.jit, static_argnames="layout")
def forward(model: SoundTransformer, layout: Layout, ids, prompt: Prompt, keep):
    """Logits [B, T, J, W] of the whole songs at once, without a cache."""
    hidden = model.hidden(ids, layout.place(jnp.arange(ids.shape[1])), model.memory(prompt, keep))
    return model.logits(hidden)


def run(config, prompt, rule, seeds, frames, least=0, end_bias=0.0) -> tuple[list[Song], np.ndarray]:
    """Songs, and what was said [B, T, J]."""
    layout = make_layout(config)
    *_, state = sample_states(make_model(config, end_bias), layout, prompt, rule, seeds, frames, least)
    return finished(state, layout, frames), np.asarray(state.said)


def masks(layout: Layout, songs: list[Song], frames: int, least: int, length: int) -> np.ndarray:
    """What was allowed to be said [B, T, J, W], given where each song ended."""
    end = jnp.array([len(song.codes) for song in songs])
    said_at = end * layout.codebooks // layout.streams  # position of END
    limits = (jnp.full(len(songs), min(least, frames)), jnp.full(len(songs), frames))

    def allowed(position):
        known = jnp.where(position > said_at, end, layout.frames + 1)
        return layout.allowed(position, known, *limits)

    return np.asarray(jax.vmap(allowed, out_axes=1)(jnp.arange(length)))


@each_model
def test_steps_equal_the_whole_forward_pass(config: ModelConfig):
    """Logits position by position through `Layer.step`, in strides of one and of five."""
    model, layout, prompt, keep = make_model(config), make_layout(config), make_prompt(2), jnp.ones((2, 2), bool)
    rng = np.random.default_rng(5)
    ids = jnp.asarray(
        np.stack([layout.encode(rng.integers(0, V, (8, config.codebooks))).ids for _ in range(2)])[:, :11]
    )
    expected = np.asarray(forward(model, layout, ids, prompt, keep))[..., : layout.pad + 1]

    @jax.jit
    def step(caches: list[KeysValues], ids, position):
        memory = model.memory(prompt, keep)
        x, new = model.embed(ids, layout.place(position + jnp.arange(ids.shape[1]))), []
        for layer, cache in zip(model.unstacked(), caches):
            lyrics = layer.cross_attention.keys_values(memory.states)
            x, cache = layer.step(x, cache, lyrics, memory.seen, position)
            new.append(cache)
        return model.logits(x), new

    caches, got = [KeysValues(*(jnp.full((2, 2, 16, 8), 9.0) for _ in range(2))) for _ in range(2)], []
    for a, b in itertools.pairwise([0, 1, 6, 7, 8, 9, 10, 11]):
        logits, caches = step(caches, ids[:, a:b], jnp.array(a))
        got.append(np.asarray(logits)[..., : layout.pad + 1])
    error = np.abs(np.concatenate(got, 1) - expected).max() / np.abs(expected).max()
    print(f"logits from the cache: relative error {error:.1e}, tolerance 1e-05")
    assert error <= 1e-5


@each_model
@pytest.mark.parametrize("rule, cache", [(GREEDY, 48), (FREE, 64)], ids=["greedy-growing", "free"])
def test_songs_equal_the_whole_forward_pass(monkeypatch, config: ModelConfig, rule: SampleConfig, cache: int):
    """A greedy song is the argmax of the forward pass on it, a drawn one has its probability, as caches grow."""
    monkeypatch.setattr(sample, "SMALLEST_CACHE", cache)
    monkeypatch.setattr(sample, "SEGMENT", 40)
    layout, prompt, frames = make_layout(config), make_prompt(4), config.frames
    least = frames if rule is GREEDY else 3
    songs, said = run(config, prompt, rule, [1, 2, 3, 4], frames, least)
    assert layout.length(max(len(song.codes) for song in songs)) > 48
    ids = np.stack([layout.encode(song.codes).ids for song in songs])
    np.testing.assert_array_equal(said, np.stack([layout.encode(song.codes).targets for song in songs]))
    length = layout.length(frames)
    logits = np.asarray(forward(make_model(config), layout, jnp.asarray(ids), prompt, jnp.ones((4, 2), bool)))
    allowed = masks(layout, songs, frames, least, length)
    logits, said = np.where(allowed, logits[:, :length], -np.inf), said[:, :length]
    if rule is GREEDY:
        np.testing.assert_array_equal(logits.argmax(-1), said)
        assert len(np.unique(said)) > 5 and not any(song.ended for song in songs)
    logprob = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits, -1)), said[..., None], -1).sum((1, 2, 3))
    np.testing.assert_allclose([song.logprob for song in songs], logprob, rtol=1e-4)


@each_model
def test_a_seed_is_a_song_wherever_it_stands(config: ModelConfig):
    prompt = jax.tree.map(lambda x: jnp.repeat(x[3:4], 4, axis=0), make_prompt(4))
    first, again, moved = (
        run(config, prompt, FREE, seeds, 12)[0] for seeds in ([1, 2, 3, 4], [1, 2, 3, 4], [3, 1, 4, 2])
    )
    for song, same, other in zip(first, again, [moved[1], moved[3], moved[0], moved[2]]):
        np.testing.assert_array_equal(song.codes, same.codes)
        np.testing.assert_array_equal(song.codes, other.codes)
        assert song.logprob == same.logprob == other.logprob
    assert first[0].codes.tolist() != first[1].codes.tolist()


@each_model
def test_every_code_is_drawn_anew(config: ModelConfig):
    """Where all codes are as likely, no position, codebook or song repeats the draw of another."""
    layout, level = make_layout(config), jax.tree.map(jnp.zeros_like, make_model(config))
    *_, state = sample_states(level, layout, make_prompt(4), FREE, [1, 2, 3, 4], 30, least=30)
    songs = finished(state, layout, 30)
    codes = np.stack([song.codes for song in songs]).reshape(4, -1).T
    assert np.abs(np.corrcoef(codes.T) - np.eye(4)).max() < 0.35
    assert np.abs(np.corrcoef(codes[:-1].T, codes[1:].T)[:4, 4:]).max() < 0.35
    counts = np.bincount(codes.ravel(), minlength=V)
    assert ((counts - codes.size / V) ** 2).sum() / (codes.size / V) < 45  # chi-squared: 99.99 % lie below
    np.testing.assert_allclose([song.logprob for song in songs], -len(codes) * np.log(V), rtol=1e-4)


def numpy_rule(logits: np.ndarray, allowed: np.ndarray, rule: SampleConfig) -> np.ndarray:
    """The probabilities [W] that the rule draws from."""
    logits = np.where(allowed, logits.astype(np.float64), -np.inf) / rule.temperature
    order = np.argsort(-logits, kind="stable")[: rule.top_k or None]
    p = np.zeros(len(logits))
    p[order] = np.exp(logits[order] - logits.max())
    p /= p.sum()
    inside = np.cumsum(p[order]) - p[order] < rule.top_p  # of the k likeliest, up to the one that reaches the mass
    p[order[~inside]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "rule",
    [
        SampleConfig(top_k=0),
        SampleConfig(temperature=0.5, top_k=0),
        SampleConfig(top_k=3),
        SampleConfig(top_k=1),
        SampleConfig(top_k=0, top_p=0.7),
        SampleConfig(top_k=4, top_p=0.6, temperature=2.0),
        SampleConfig(top_k=0, top_p=1e-6),
        SampleConfig(),
    ],
    ids=lambda r: f"temperature{r.temperature}-k{r.top_k}-p{r.top_p}",
)
def test_the_rule(rule: SampleConfig):
    """Frequencies of 4,000 draws, and the log-probability that comes with each."""
    rng, count = np.random.default_rng(6), 4000
    logits, allowed = rng.normal(size=(2, 12)).astype(np.float32), rng.random((2, 12)) < 0.8
    logits[:, 3] = -np.inf  # an id that pads the space
    wide = (jnp.broadcast_to(x, (count, 2, 12)) for x in (logits, allowed))
    ids, logprob = (np.asarray(x) for x in draw(*wide, jax.random.split(jax.random.key(7), count), rule))
    for j in range(2):
        expected = numpy_rule(logits[j], allowed[j], rule)
        frequency = np.bincount(ids[:, j], minlength=12) / count
        assert (frequency[expected == 0] == 0).all()
        assert (np.abs(frequency - expected) < 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()
        np.testing.assert_allclose(logprob[:, j], np.log(expected[ids[:, j]]), atol=1e-5)
    if (numpy_rule(logits[0], allowed[0], rule) > 0).sum() > 2:  # streams are drawn apart
        assert abs(np.corrcoef(ids.T)[0, 1]) < 0.1


def test_greedy_takes_the_likeliest_allowed():
    logits = jnp.array([[[3.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]])
    allowed = jnp.array([[[False, True, True]], [[True, True, True]]])
    ids, logprob = draw(logits, allowed, jax.random.split(jax.random.key(0), 2), GREEDY)
    assert ids.tolist() == [[1], [0]]
    np.testing.assert_allclose(logprob[0, 0], -np.log1p(np.exp(-1)), rtol=1e-5)


def test_guidance():
    rng, rule = np.random.default_rng(8), SampleConfig(guidance_lyrics=3.0, guidance_genre=0.5)
    logits = rng.normal(size=(2, 3, 1, 5)).astype(np.float32)
    logits[..., 4] = -np.inf
    none, genre, both = logits[:, 0, :, :4], logits[:, 1, :, :4], logits[:, 2, :, :4]
    guided = np.asarray(guide(jnp.asarray(logits), rule))
    assert (guided[..., 4] == -np.inf).all()
    expected = none + 0.5 * (genre - none) + 3.0 * (both - genre)
    np.testing.assert_allclose(guided[..., :4], expected, rtol=1e-5)
    ones = np.asarray(guide(jnp.asarray(logits), SampleConfig()))
    np.testing.assert_allclose(ones[..., :4], both, atol=1e-6)
    np.testing.assert_array_equal(guide(jnp.asarray(logits[:, 2:]), SampleConfig()), logits[:, 2])


def test_guided_songs():
    """Variants keep nothing, genre, all: a guided greedy song is the argmax of the guided forward passes."""
    rule = dataclasses.replace(GREEDY, guidance_lyrics=2.5, guidance_genre=1.5)
    assert variants(rule).tolist() == [[False, False], [True, False], [True, True]] and variants(GREEDY).all()
    layout, prompt = make_layout(DELAY), make_prompt(4)
    songs, said = run(DELAY, prompt, rule, [1, 2, 3, 4], 12, least=12)
    ids = jnp.asarray(np.stack([layout.encode(song.codes).ids for song in songs]))
    none, genre, both = (
        np.asarray(forward(make_model(DELAY), layout, ids, prompt, jnp.tile(jnp.asarray(kept), (4, 1))))
        for kept in variants(rule)
    )
    with np.errstate(invalid="ignore"):
        guided = none + 1.5 * (genre - none) + 2.5 * (both - genre)
    length = layout.length(12)
    logits = np.where(masks(layout, songs, 12, 12, length), guided[:, :length], -np.inf)
    np.testing.assert_array_equal(logits.argmax(-1), said[:, :length])
    plain, _ = run(DELAY, prompt, GREEDY, [1, 2, 3, 4], 12, least=12)
    assert any(a.codes.tolist() != b.codes.tolist() for a, b in zip(songs, plain))


@each_model
def test_where_songs_end(config: ModelConfig):
    """A model that says END at once: at `least`, at 0 without it; one that never does: at the limit."""
    layout, prompt, seeds = make_layout(config), make_prompt(4), [1, 2, 3, 4]
    for least in (0, 5, 12):
        songs, said = run(config, prompt, FREE, seeds, 12, least, end_bias=200.0)
        assert [(len(song.codes), song.ended) for song in songs] == [(least, least < 12)] * 4
        assert ((said == layout.end).sum((1, 2)) == 1).all()
    songs = sample_codes(make_model(config, -200.0), layout, prompt, FREE, seeds, 12)
    assert [(song.codes.shape, song.ended) for song in songs] == [((12, config.codebooks), False)] * 4
    assert all(0 <= song.codes.min() and song.codes.max() < V for song in songs)


@each_model
def test_each_song_ends_on_its_own(monkeypatch, config: ModelConfig):
    """Songs of one batch end at their own times, what comes after changes none of them, and the loop stops early."""
    monkeypatch.setattr(sample, "SEGMENT", 16)
    layout, prompt, seeds = make_layout(config), make_prompt(4), [8, 9, 10, 11]
    states = sample_states(make_model(config, 1.0), layout, prompt, FREE, seeds, config.frames)
    lasts = [int(state.position) for state in states]
    songs, said = run(config, prompt, FREE, seeds, config.frames, end_bias=1.0)
    lengths = [len(song.codes) for song in songs]
    print(f"frames of each song: {lengths}; positions after each segment: {lasts}")
    assert len(set(lengths)) > 2 and max(lengths) < config.frames and all(song.ended for song in songs)
    assert lasts[-1] == layout.length(max(lengths))
    for song, targets in zip(songs, said):
        np.testing.assert_array_equal(targets, layout.encode(song.codes).targets)
    fewer = run(config, prompt, FREE, seeds, sorted(lengths)[2], end_bias=1.0)[0]
    for song, short in zip(songs, fewer):  # a limit cuts the longer songs and leaves the others as they are
        np.testing.assert_array_equal(short.codes, song.codes[: len(short.codes)])


@pytest.mark.parametrize("frames", [0, -1, 32])
def test_a_limit_outside_of_the_window(frames):
    with pytest.raises(UserError, match=f"limit is {frames} frames; allowed: 1 to the model's window of 31"):
        next(sample_states(make_model(FLATTEN), make_layout(FLATTEN), make_prompt(1), FREE, [0], frames))
