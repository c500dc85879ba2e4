"""Attention maps against the formula, paths and diagonality against all that there are, heads against known ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, make_record
from flax import nnx
from test_model import DEEP, KEEP, POST, PRE, make_ids, make_model, make_prompt

from l2m_jax import align
from l2m_jax import model as model_module
from l2m_jax.align import (
    Errors,
    Reading,
    Teacher,
    align_song,
    alignment_errors,
    attention_maps,
    choose_heads,
    memory_words,
    teacher,
    word_mass,
    word_times,
)
from l2m_jax.config import UserError
from l2m_jax.data import prompt_rows
from l2m_jax.follow import diagonality, frame_weights
from l2m_jax.model import Prompt, SoundTransformer
from l2m_jax.tokens import make_layout

WORDS = np.array([-1, -1, -1, 0, 1, 1, 2, -1], np.int32)  # null rows, a genre, words of one and two pieces, padding


def diagonal(starts: list[int], frames: int, rows: int = 3) -> np.ndarray:
    """Mass [F, W]: word w has all of it from frame starts[w] on, for four frames."""
    mass = np.zeros((frames, rows), np.float32)
    for word, start in enumerate(starts):
        mass[start : start + 4, word] = 1
    return mass


def as_map(mass: np.ndarray, words: np.ndarray = WORDS) -> np.ndarray:
    """An attention map [F, M] of that mass, spread over the pieces of each word; the genre has the rest."""
    pieces = np.bincount(words[words >= 0])
    one = np.zeros((len(mass), len(words)), np.float32)
    for row in np.flatnonzero(words >= 0):
        one[:, row] = mass[:, words[row]] / pieces[words[row]]
    one[:, 2] = 1 - one.sum(1)
    return one


@pytest.mark.parametrize("config", [DEEP, PRE], ids=["deepnorm-delay", "pre-flatten"])
def test_a_look_is_what_the_layer_does(monkeypatch, config):
    """Queries and keys are those that `attention` gets, and the layer's result is the same."""
    seen, attention = [], model_module.attention
    monkeypatch.setattr(model_module, "attention", lambda q, k, *rest: seen.append((q, k)) or attention(q, k, *rest))
    model, layout = make_model(config), make_layout(config)
    memory = model.memory(make_prompt(), jnp.asarray(KEEP))
    ids = jnp.asarray(make_ids(config))
    x = model.embed(ids, layout.place(jnp.arange(ids.shape[1])))
    layer = jax.tree.map(lambda p: p[1], model.layers)
    result, queries, keys = layer.look(x, memory)
    np.testing.assert_array_equal(result, layer(x, memory)[0])
    np.testing.assert_array_equal(queries, seen[-1][0])
    np.testing.assert_array_equal(keys, seen[-1][1])


def test_weights_are_the_formula_and_frames_the_mean_of_their_positions():
    rng = np.random.default_rng(0)
    q, k, seen = rng.normal(size=(7, 4)), rng.normal(size=(5, 4)), np.array([True, False, True, True, False])
    scores = np.exp(q @ k.T / 2) * seen
    weights = scores / scores.sum(1, keepdims=True)
    ours = frame_weights(jnp.float32(q), jnp.float32(k), jnp.asarray(seen), 3)
    np.testing.assert_allclose(ours, weights[:6].reshape(2, 3, 5).mean(1), atol=1e-6)


@pytest.mark.parametrize("config", [POST, DEEP], ids=["flatten", "delay"])
def test_maps_of_chosen_heads_are_those_of_all(config):
    """A row a frame of the song, which sums to 1 and looks at nothing that is not there; stacked layers or apart."""
    model, layout = make_model(config), make_layout(config)
    lyrics, genre = np.ones((3, 6)), np.ones((1, 6))
    prompt = Prompt(*(row[None] for row in prompt_rows(lyrics, np.zeros(3), genre, config.memory)))
    codes = np.random.default_rng(1).integers(0, 8, (9, config.codebooks))
    maps = attention_maps(model, layout, codes, prompt)
    assert maps.shape == (4, 9, 2 + config.memory)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert (maps[..., 2:6] > 0).all() and not maps[..., :2].any() and not maps[..., 6:].any()
    some = attention_maps(model.unstacked(), layout, codes, prompt, [(1, 0), (0, 1)])
    np.testing.assert_allclose(some, maps[[1, 2]], atol=1e-6)
    np.testing.assert_allclose(  # what comes later changes nothing
        attention_maps(model, layout, codes[:5], prompt), maps[:, :5], atol=1e-5
    )
    assert memory_words(prompt, np.array([0, 0, 1])).tolist() == [-1, -1, -1, 0, 0, 1, -1, -1, -1]
    long = np.zeros((13, config.codebooks), np.int32)
    with pytest.raises(UserError, match="the song has 13 frames; allowed: the model's window of 12"):
        attention_maps(model, layout, long, prompt)


def test_pieces_are_merged_and_genre_is_left_out():
    maps = np.random.default_rng(2).random((2, 5, 8)).astype(np.float32)
    mean = maps.mean(0)
    expected = np.stack([mean[:, 3], mean[:, 4] + mean[:, 5], mean[:, 6]], axis=1)
    np.testing.assert_allclose(word_mass(maps, WORDS), expected, rtol=1e-6)
    assert word_mass(maps, np.full(8, -1, np.int32)).shape == (5, 0)


def test_the_path_is_the_best_of_all():
    """Of all ways to put two words into six frames."""
    rng, labels = np.random.default_rng(3), np.array([-1, 0, -1, 1, -1])
    for _ in range(20):
        mass, blank = rng.random((6, 2)), rng.random()
        found = align._best_path(mass.astype(np.float32), blank)

        def worth(states, mass=mass, blank=blank):
            return sum(blank if labels[s] < 0 else mass[f, labels[s]] for f, s in enumerate(states))

        ways = [w for w in itertools.combinations_with_replacement(range(5), 6) if {1, 3} <= set(w)]
        assert tuple(found) in ways
        assert worth(found) == pytest.approx(max(map(worth, ways)), abs=1e-5)


def test_word_times():
    """Rests at the beginning, between words and at the end are no part of a word."""
    maps = as_map(diagonal([3, 7, 15], 25))[None]
    np.testing.assert_allclose(word_times(maps, WORDS, 10.0, 0.3), [[0.3, 0.7], [0.7, 1.1], [1.5, 1.9]], atol=1e-6)
    many = word_times(diagonal([*range(0, 1200, 6)], 1200, 200)[None], np.arange(200, dtype=np.int32), 10.0, 0.3)
    np.testing.assert_allclose(many[:, 0], np.arange(200) * 0.6, atol=1e-4)
    # Each word for a frame at least, even where it was never looked at; and more words than frames.
    times = word_times(as_map(diagonal([3, 7], 25))[None], WORDS, 10.0, 0.3)
    assert times[0].tolist() == pytest.approx([0.3, 0.7]) and (np.diff(times) > 0).all()
    times = word_times(maps[:, :2], WORDS, 10.0, 0.3)
    assert (np.diff(times[:, 0]) > 0).all() and times.min() >= 0 and times.max() <= 0.2
    assert word_times(maps[:, :0], WORDS, 10.0, 0.3).tolist() == [[0, 0]] * 3
    assert word_times(maps, np.full(8, -1, np.int32), 10.0, 0.3).shape == (0, 2)


def test_a_song_that_is_cut_may_end_at_any_word():
    maps = as_map(diagonal([3, 7, 15], 25))[None]
    times = word_times(maps[:, :13], WORDS, 10.0, 0.3, cut=True)
    np.testing.assert_allclose(times, [[0.3, 0.7], [0.7, 1.1], [1.3, 1.3]], atol=1e-6)
    np.testing.assert_allclose(word_times(maps[:, :2], WORDS, 10.0, 0.3, cut=True), 0.2)  # none was reached
    record = make_record(1)._replace(word_times=np.stack([np.arange(6)] * 3, axis=1) / 20.0)
    song = teacher(record, CONFIG.model.memory, 10, 75.0)
    assert song.cut and len(song.codes) == 10 and song.starts is not None
    np.testing.assert_array_equal(song.starts, [0, 0.05, 0.1, np.nan, np.nan, np.nan])


def test_errors():
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    errors = alignment_errors(truth + np.array([0.02, -0.08, 0.2, 1.0]), truth)
    assert errors._asdict() == pytest.approx(Errors(4, 140.0, 325.0, 0.5, 0.75)._asdict())
    assert alignment_errors(truth[:0], truth[:0]).words == 0
    assert alignment_errors(truth, np.array([1.0, np.nan, 3.1, np.nan])).words == 2


def test_diagonality():
    forth = diagonal([0, 5, 9], 14)
    assert diagonality(forth) == pytest.approx(1)
    assert diagonality(forth[::-1]) == pytest.approx(-1)
    assert diagonality(np.ones((6, 4), np.float32)) == pytest.approx(0, abs=1e-6)
    assert diagonality(np.zeros((6, 4), np.float32)) == 0
    mass = np.random.default_rng(4).random((2, 5, 3)).astype(np.float32)
    both = np.asarray(diagonality(mass))
    for one, ours in zip(mass, both):
        balance = total = 0.0
        for (f, g), (a, b) in itertools.product(
            itertools.combinations(range(5), 2), itertools.permutations(range(3), 2)
        ):
            chance = one[f, a] * one[g, b]
            balance, total = balance + np.sign(b - a) * chance, total + chance
        assert ours == pytest.approx(balance / total, abs=1e-5)


@pytest.mark.parametrize("timed", [True, False])
def test_heads_that_follow_are_chosen(monkeypatch, timed):
    """Two that see half of the words each, better together than alone, among some that see nothing or everything."""
    starts = [2, 9, 16]
    halves = diagonal(starts, 24), diagonal(starts, 24)
    halves[0][:, 2], halves[1][:, 0] = 0, 0
    noise = np.random.default_rng(5).random((24, 3)).astype(np.float32) / 6
    masses = {(0, 0): noise, (0, 1): halves[0], (1, 0): noise[::-1], (2, 3): halves[1]}
    if not timed:
        masses[1, 1] = diagonal(starts, 24)
    monkeypatch.setattr(
        align,
        "_each_map",
        lambda model, layout, codes, prompt, heads=None: (
            (head, as_map(mass)) for head, mass in masses.items() if heads is None or head in heads
        ),
    )
    model = nnx.eval_shape(lambda: SoundTransformer(POST, rngs=nnx.Rngs(0)))
    prompt = make_prompt()
    song = Teacher(np.zeros((24, 2), np.int32), prompt, WORDS, np.array(starts) / 10.0 if timed else None)
    reading, errors = choose_heads(model, make_layout(POST), [song], 10.0)
    if timed:
        assert {(0, 1), (2, 3)} <= set(reading.heads)
        assert errors.words == 3 and errors.mean_ms == pytest.approx(0, abs=1e-3) and errors.within_100_ms == 1
    else:
        assert reading == Reading(((1, 1),)) and errors.words == 0
    with pytest.raises(UserError, match="no song has words"):
        choose_heads(model, make_layout(POST), [song._replace(words=np.full(8, -1, np.int32), starts=None)], 10.0)


def test_a_record_is_aligned_whole():
    """From a record to times that go forward within the song."""
    record = make_record(1)._replace(word_times=np.stack([np.arange(6)] * 3, axis=1) / 20.0)
    model, layout = SoundTransformer(CONFIG.model, rngs=nnx.Rngs(0)), make_layout(CONFIG.model)
    song = teacher(record, CONFIG.model.memory, 40, 75.0)
    assert song.words.tolist() == [-1] * 4 + [0, 1, 2, 3, 4, 5, -1, -1] and song.starts is not None
    times = align_song(model, layout, song, Reading(((0, 0), (1, 1))), 75.0)
    assert times.shape == (6, 2) and (np.diff(times[:, 0]) > 0).all() and 0 <= times.min() <= times.max() <= 30 / 75
