"""The decode loop: the cache against the whole forward pass, what is given, and where songs end."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l2m_jax import sample
from l2m_jax.config import ModelConfig, SampleConfig, UserError
from l2m_jax.data import prompt_rows
from l2m_jax.model import Cache, Prompt, SoundTransformer
from l2m_jax.rule import make_rule, variants
from l2m_jax.sample import Context, Song, cache_size, said, sample_codes, sample_states
from l2m_jax.tokens import Layout, make_layout

V = 16  # both are of 64 positions
FLATTEN = ModelConfig(
    codebooks=2, entries=V, frames=31, memory=6, text_width=8, width=16, heads=2, layers=2, norm="pre"
)
DELAY = dataclasses.replace(FLATTEN, layout="delay", codebooks=3, frames=60, norm="post", rotary=True)
each_model = pytest.mark.parametrize("config", [FLATTEN, DELAY], ids=["flatten", "delay"])
GREEDY = SampleConfig(temperature=0.0, guidance_lyrics=1.0)
FREE = SampleConfig(temperature=1.0, top_k=0, guidance_lyrics=1.0)


@functools.cache
def make_model(config: ModelConfig, end_bias: float = 0.0) -> SoundTransformer:
    """Random, with a head sharp enough that the draw matters; `end_bias` is the logit of END, wherever it stands."""
    model, end = _random_model(config), make_layout(config).end
    model.head.kernel = nnx.Param(model.head.kernel[...].at[:, end].set(0))
    model.head.bias = nnx.Param(model.head.bias[...].at[end].set(end_bias))
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
    return said(state, layout, frames), np.asarray(state.said)


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
    """Logits position by position through `Layer.step`, from nothing and from a prefilled cache."""
    stacked, layout, prompt, keep = make_model(config), make_layout(config), make_prompt(2), jnp.ones((2, 2), bool)
    model = stacked.unstacked()
    rng = np.random.default_rng(5)
    ids = jnp.asarray(
        np.stack([layout.encode(rng.integers(0, V, (8, config.codebooks))).ids for _ in range(2)])[:, :11]
    )
    expected = np.asarray(forward(stacked, layout, ids, prompt, keep))[..., : layout.pad + 1]

    @jax.jit
    def step(caches: list[Cache], ids, position):
        memory = model.memory(prompt, keep)
        x, new = model.embed(ids, layout.place(position[None])), []
        for layer, cache in zip(model.layers, caches):
            x, cache = layer.step(x, cache, layer.lyrics(memory), position)
            new.append(cache)
        return model.logits(x), new

    for known in (0, 7):
        caches = [Cache(*(jnp.full((4, 8, 16), 9.0) for _ in range(2))) for _ in range(2)]
        if known:  # what lies behind the known positions is written before it is read
            heard = jnp.where(jnp.arange(64)[None, :, None] < known, jnp.pad(ids[:, 1:], ((0, 0), (0, 54), (0, 0))), -1)
            context = Context([], model.memory(prompt, keep), make_rule(FREE), *[heard] * 4)
            caches = list(sample._prefill(model, context, layout, 16))
        got = []
        for i in range(known, 11):
            logits, caches = step(caches, ids[:, i : i + 1], jnp.array(i))
            got.append(np.asarray(logits)[..., : layout.pad + 1])
        error = np.abs(np.concatenate(got, 1) - expected[:, known:]).max() / np.abs(expected).max()
        print(f"logits from the cache, {known} prefilled: relative error {error:.1e}, tolerance 1e-05")
        assert error <= 1e-5


@pytest.mark.parametrize(
    "config, count",
    [(FLATTEN, 4), (DELAY, 4), (dataclasses.replace(FLATTEN, key_heads=1, attention_width=8, rotary=True), 1)],
    ids=["flatten", "delay", "one-row"],
)
@pytest.mark.parametrize("rule, room", [(GREEDY, 16), (FREE, 64)], ids=["greedy-growing", "free"])
def test_songs_equal_the_whole_forward_pass(monkeypatch, config, count, rule: SampleConfig, room: int):
    """A greedy song is the argmax of the forward pass on it, a drawn one has its probability, as caches grow."""
    monkeypatch.setattr(sample, "ROOM", room)
    monkeypatch.setattr(sample, "FIRST", 10)
    layout, prompt, frames = make_layout(config), make_prompt(count), config.frames
    least = 3 if rule is FREE and count > 1 else frames
    songs, targets = run(config, prompt, rule, [1, 2, 3, 4][:count], frames, least)
    assert layout.length(max(len(song.codes) for song in songs)) > 48
    ids = np.stack([layout.encode(song.codes).ids for song in songs])
    np.testing.assert_array_equal(targets, np.stack([layout.encode(song.codes).targets for song in songs]))
    length = layout.length(frames)
    logits = np.asarray(forward(make_model(config), layout, jnp.asarray(ids), prompt, jnp.ones((count, 2), bool)))
    allowed = masks(layout, songs, frames, least, length)
    logits, targets = np.where(allowed, logits[:, :length], -np.inf), targets[:, :length]
    if rule is GREEDY:
        np.testing.assert_array_equal(logits.argmax(-1), targets)
        assert len(np.unique(targets)) > 5 and not any(song.ended for song in songs)
    logprob = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits, -1)), targets[..., None], -1).sum((1, 2, 3))
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
    songs = said(state, layout, 30)
    codes = np.stack([song.codes for song in songs]).reshape(4, -1).T
    assert np.abs(np.corrcoef(codes.T) - np.eye(4)).max() < 0.35
    assert np.abs(np.corrcoef(codes[:-1].T, codes[1:].T)[:4, 4:]).max() < 0.35
    counts = np.bincount(codes.ravel(), minlength=V)
    assert ((counts - codes.size / V) ** 2).sum() / (codes.size / V) < 45  # chi-squared: 99.99 % lie below
    np.testing.assert_allclose([song.logprob for song in songs], -len(codes) * np.log(V), rtol=1e-4)


def test_guided_songs():
    """Variants keep nothing, genre, all: a guided greedy song is the argmax of the guided forward passes."""
    rule = dataclasses.replace(GREEDY, guidance_lyrics=2.5, guidance_genre=1.5)
    assert variants(rule).tolist() == [[False, False], [True, False], [True, True]] and variants(GREEDY).all()
    layout, prompt = make_layout(DELAY), make_prompt(4)
    songs, targets = run(DELAY, prompt, rule, [1, 2, 3, 4], 12, least=12)
    ids = jnp.asarray(np.stack([layout.encode(song.codes).ids for song in songs]))
    none, genre, both = (
        np.asarray(forward(make_model(DELAY), layout, ids, prompt, jnp.tile(jnp.asarray(kept), (4, 1))))
        for kept in variants(rule)
    )
    with np.errstate(invalid="ignore"):
        guided = none + 1.5 * (genre - none) + 2.5 * (both - genre)
    length = layout.length(12)
    logits = np.where(masks(layout, songs, 12, 12, length), guided[:, :length], -np.inf)
    np.testing.assert_array_equal(logits.argmax(-1), targets[:, :length])
    plain, _ = run(DELAY, prompt, GREEDY, [1, 2, 3, 4], 12, least=12)
    assert any(a.codes.tolist() != b.codes.tolist() for a, b in zip(songs, plain))


@each_model
def test_where_songs_end(config: ModelConfig):
    """A model that says END at once: at `least`, at 0 without it; one that never does: at the limit."""
    layout, prompt, seeds = make_layout(config), make_prompt(4), [1, 2, 3, 4]
    for least in (0, 5, 12):
        songs, targets = run(config, prompt, FREE, seeds, 12, least, end_bias=200.0)
        assert [(len(song.codes), song.ended) for song in songs] == [(least, least < 12)] * 4
        assert ((targets == layout.end).sum((1, 2)) == 1).all()
    songs = sample_codes(make_model(config, -200.0), layout, prompt, FREE, seeds, 12)
    assert [(song.codes.shape, song.ended) for song in songs] == [((12, config.codebooks), False)] * 4
    assert all(0 <= song.codes.min() and song.codes.max() < V for song in songs)


@each_model
def test_each_song_ends_on_its_own(monkeypatch, config: ModelConfig):
    """Songs of one batch end at their own times, what comes after changes none of them, and the loop stops early."""
    monkeypatch.setattr(sample, "FIRST", 8)
    layout, prompt, seeds = make_layout(config), make_prompt(4), [8, 9, 11, 13]
    states = sample_states(make_model(config, 1.5), layout, prompt, FREE, seeds, config.frames)
    lasts = [int(state.position) for state in states]
    songs, targets = run(config, prompt, FREE, seeds, config.frames, end_bias=1.5)
    lengths = [len(song.codes) for song in songs]
    print(f"frames of each song: {lengths}; positions after each segment: {lasts}")
    assert len(set(lengths)) > 2 and max(lengths) < config.frames and all(song.ended for song in songs)
    assert lasts[-1] == layout.length(max(lengths))
    for song, row in zip(songs, targets):
        np.testing.assert_array_equal(row, layout.encode(song.codes).targets)
    fewer = run(config, prompt, FREE, seeds, sorted(lengths)[2], end_bias=1.5)[0]
    for song, short in zip(songs, fewer):  # a limit cuts the longer songs and leaves the others as they are
        np.testing.assert_array_equal(short.codes, song.codes[: len(short.codes)])


@each_model
def test_songs_begin_with_what_is_given(monkeypatch, config: ModelConfig):
    """Prefilled or said step by step, what is given stays, and the songs go on as if they had said it themselves."""
    monkeypatch.setattr(sample, "ROOM", 16)
    layout, prompt, seeds, model = make_layout(config), make_prompt(4), [1, 2, 3, 4], make_model(config)
    *_, state = sample_states(model, layout, prompt, FREE, seeds, 24, least=24)
    songs = said(state, layout, 24)
    for lengths in ([20, 20, 20, 20], [24, 9, 11, 17], [0, 1, 24, 12]):  # prefilled to the shortest
        given = [song.codes[:n] for song, n in zip(songs, lengths)]
        *_, state = sample_states(model, layout, prompt, FREE, seeds, 24, 24, given)
        for song, again, n in zip(songs, said(state, layout, 24), lengths):
            np.testing.assert_array_equal(again.codes, song.codes)
            assert again.logprob == 0 if n == 24 else song.logprob < again.logprob < 0 or n == 0
    other = [np.full((n, config.codebooks), n % V, np.int32) for n in (3, 7, 5, 9)]
    *_, state = sample_states(model, layout, prompt, FREE, seeds, 24, 0, other)
    for song, codes in zip(said(state, layout, 24), other):
        np.testing.assert_array_equal(song.codes[: len(codes)], codes)
        assert len(song.codes) >= len(codes)


@each_model
def test_each_song_has_its_limits(config: ModelConfig):
    """Limits of one song change no other, and three songs are padded to four."""
    layout, prompt, model = make_layout(config), make_prompt(3), make_model(config, 1.5)
    plain = sample_codes(model, layout, prompt, FREE, [8, 9, 11], 30)
    *_, state = sample_states(model, layout, prompt, FREE, [8, 9, 11], [30, 4, 30], [0, 0, 29])
    songs = said(state, layout, [30, 4, 30])
    assert len(songs) == 3 and len(songs[1].codes) <= 4 and len(songs[2].codes) >= 29
    np.testing.assert_array_equal(songs[0].codes, plain[0].codes)
    shared = min(len(songs[1].codes), len(plain[1].codes))
    np.testing.assert_array_equal(songs[1].codes[:shared], plain[1].codes[:shared])
    assert songs[1].ended == (len(songs[1].codes) < 4)


@each_model
def test_what_is_said_midway_is_how_the_song_begins(monkeypatch, config: ModelConfig):
    """Of any state, also after the loop has gone on; nothing is taken back."""
    monkeypatch.setattr(sample, "FIRST", 4)
    layout, prompt, frames = make_layout(config), make_prompt(4), [config.frames, 30, 7, 20]
    states = list(sample_states(make_model(config, 1.5), layout, prompt, FREE, [8, 9, 11, 10], frames))
    last = said(states[-1], layout, frames)
    assert len(states) > 2 and len(said(states[0], layout, frames)[0].codes) in (0, 4 - (config.layout == "delay") * 2)
    for state in states:
        for song, whole in zip(said(state, layout, frames), last):
            np.testing.assert_array_equal(song.codes, whole.codes[: len(song.codes)])
            assert whole.ended if song.ended else True
            complete = int(layout.target_frames(state.position)[-1])
            assert len(song.codes) == max(min(complete, len(whole.codes)), 0)


@each_model
def test_repetition_control_looks_back_over_its_window(config: ModelConfig):
    """Greedy with a crushing penalty says no code of a codebook twice in a window, and without it does."""
    prompt = make_prompt(2)
    rule = dataclasses.replace(GREEDY, repetition_penalty=1e30, repetition_window=V // 2)

    def repeats(rule: SampleConfig) -> int:
        count = 0
        for song in run(config, prompt, rule, [0, 0], 30, least=30)[0]:
            for t, k in np.ndindex(30, config.codebooks):
                count += song.codes[t, k] in song.codes[max(t - V // 2, 0) : t, k]
        return count

    print(f"repeated codes: {repeats(GREEDY)} without, {repeats(rule)} with the penalty")
    assert repeats(rule) == 0 < repeats(GREEDY)


@pytest.mark.parametrize("key_heads, songs", [(1, 1), (2, 2)])
def test_a_step_copies_no_cache(key_heads, songs):
    """The compiled loop writes into the cache: nothing of its size is copied or turned, whatever the number of rows."""
    config = dataclasses.replace(FLATTEN, key_heads=key_heads, frames=500)
    layout, model, prompt = make_layout(config), make_model(config).unstacked(), make_prompt(songs)
    none = [np.zeros((0, 2), np.int32)] * songs
    context = sample._start(model, layout, prompt, FREE, range(songs), [500] * songs, [500] * songs, none)
    state = sample._first(context.given, np.int32(0), songs, layout)
    cache = sample.empty_cache(model, context, layout.positions)
    program = sample._segment.lower(model, context, state, cache, np.int32(9), layout, 0).compile().as_text()
    *rows, width, size = cache[0].keys.shape
    ours, turned = (rf"f32\[(1,)?{','.join(map(str, (*rows, *sides)))}\]" for sides in ((width, size), (size, width)))
    assert re.search(ours, program)
    moved = re.compile(rf"= ({ours}|{turned})\S* (copy|transpose)\(")
    assert not [line for line in program.splitlines() if moved.search(line)]


def test_the_cache_grows_in_steps():
    """It has room for what is said, is never larger than the window needs, and few sizes serve all songs."""
    layout = make_layout(ModelConfig())
    sizes = [cache_size(n, layout) for n in range(1, layout.positions + 1)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and max(sizes) == layout.positions
    assert len(set(sizes)) <= 14 and sizes[0] == 512 and sizes[15_999] <= 16_384
    assert {cache_size(n, make_layout(FLATTEN)) for n in range(1, 65)} == {64}
    assert cache_size(1, make_layout(ModelConfig(layout="delay", frames=575))) == 576


@pytest.mark.parametrize(
    "given, wrong", [((13, 0), "13 frames are given and the song may get 12"), ((3, V), f"to {V};")]
)
def test_what_cannot_be_given(given, wrong):
    length, code = given
    codes = [np.full((length, 2), code, np.int32)]
    with pytest.raises(UserError, match=wrong):
        next(sample_states(make_model(FLATTEN), make_layout(FLATTEN), make_prompt(1), FREE, [0], 12, 0, codes))


@pytest.mark.parametrize("frames", [0, -1, 32])
def test_a_limit_outside_of_the_window(frames):
    with pytest.raises(UserError, match=f"limit is {frames} frames; allowed: 1 to the model's window of 31"):
        next(sample_states(make_model(FLATTEN), make_layout(FLATTEN), make_prompt(1), FREE, [0], frames))
