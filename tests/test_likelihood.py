"""Bits per code: what training calls the loss, and gains that are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, MADE_WITH, make_prepared, make_record
from flax import nnx

from l2m_jax.checkpoint import load_model
from l2m_jax.data import Dataset, Example, make_example
from l2m_jax.likelihood import (
    CONDITIONS,
    GAINS,
    STRETCH,
    Text,
    _song_bits,
    choose_donors,
    measure,
    nats_of_targets,
    summarise,
)
from l2m_jax.model import SoundTransformer
from l2m_jax.step import losses
from l2m_jax.tokens import make_layout
from l2m_jax.train import train

TIMES = np.array([[0.0, 0.1, np.nan], [0.1, 0.2, 0.2]])


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Eight songs of different words, some with times; the last has no genre and another is alone in its own."""
    records = [make_record(i, frames=20 + 4 * i)._replace(lyrics=f"la {i}") for i in range(8)]
    records[2] = records[2]._replace(word_times=TIMES)
    records[6] = records[6]._replace(genre="tango")
    records[7] = records[7]._replace(genre="", genre_states=np.zeros((0, MADE_WITH.text_width)))
    return Dataset(make_prepared(tmp_path_factory.mktemp("likelihood") / "songs", records))


def a_model(layout="delay", **fields):
    config = dataclasses.replace(CONFIG.model, layout=layout, **fields)
    return SoundTransformer(config, rngs=nnx.Rngs(0)), make_layout(config)


@pytest.mark.parametrize("layout", ["flatten", "delay"])
def test_nats_are_what_training_sums(songs, layout):
    model, layout = a_model(layout)
    batch = Example(*map(np.stack, zip(*(make_example(songs[i], layout, 10) for i in (0, 6)))))
    keep = jnp.array([[True, True], [False, True]])
    nats = nats_of_targets(model, batch, keep, layout, chunk=32)
    totals = losses(model, batch, keep, layout, 64, CONFIG.train.remat)
    assert nats.shape == batch.targets.shape
    error = float(jnp.abs(nats.sum((0, 1)) / totals.nats - 1).max())
    print(f"relative error {error:.1e}; tolerance 1e-6")
    assert error < 1e-6 and (np.asarray(nats) > 0).sum() == totals.codes.sum()


@pytest.mark.parametrize("layout", ["flatten", "delay"])
def test_songs_are_measured_in_any_window_as_in_the_whole_one(songs, layout):
    """Song 0 has 20 frames, half a window of 40, song 6 has 44, of which END and 4 frames lie outside."""
    model, layout = a_model(layout)
    found = measure(model, layout, songs, [0, 6], 75.0, batch=1)
    for bits, i in zip(found, (0, 6)):
        batch = Example(*(x[None] for x in make_example(songs[i], layout, 10)))
        totals = losses(model, batch, jnp.ones((1, 2), bool), layout, 64, CONFIG.train.remat)
        sums = bits.codes[0].sum() + np.nan_to_num(bits.end[0])
        assert sums == pytest.approx(float(totals.nats.sum()) / np.log(2), rel=1e-5)
        assert bits.frames == min(20 + 4 * i, 40) and bits.cut == (4 if i else 0) and np.isnan(bits.end[0]) == (i > 0)
        np.testing.assert_allclose(bits.stretches.sum(1), bits.codes.sum(1))


def test_each_codebook_and_stretch_has_its_own_bits(songs, monkeypatch):
    """A model without weights gives every id the same chance: log2 of their number, everywhere."""
    model, layout = a_model("flatten")
    model = jax.tree.map(jnp.zeros_like, model)
    monkeypatch.setattr("l2m_jax.likelihood.STRETCH", 0.1)
    known = np.log2(layout.pad + 1)
    figures = summarise(measure(model, layout, songs, range(8), 75.0, batch=3))
    for per_code in figures["bits_per_code"].values():
        assert per_code["all_codebooks"].value == pytest.approx(known, rel=1e-6)
        assert [book.value for book in per_code["each_codebook"]] == pytest.approx([known, known], rel=1e-6)
    assert figures["bits_of_the_end"]["right"].value == pytest.approx(known, rel=1e-6)
    assert figures["bits_of_the_end"]["right"].songs == 6 and figures["songs_cut"] == 2
    assert figures["frames_outside_of_the_window"] == 4 + 8 and figures["sung_words"] == 2
    assert figures["over_time"]["songs"][:3] == [8, 8, 8]  # 20 frames are 0.27 s
    np.testing.assert_allclose(figures["over_time"]["bits_per_code"]["right"], known, rtol=1e-6)
    assert figures["codes"] == 2 * sum(min(20 + 4 * i, 40) for i in range(8))


def test_the_frame_in_which_a_word_begins_is_its_own(songs):
    """And the one in which it ends belongs to what follows; a word that ends at the end of the sound is all there."""
    rng, layout = np.random.default_rng(0), make_layout(dataclasses.replace(CONFIG.model, layout="flatten"))
    bits = rng.random((7, layout.positions, 1))
    times = np.array([[0.1399, 0.2, np.nan], [0.2, 20 / 75 + 1e-3, np.nan]], np.float32)  # frames 10.5 to 15 to 20
    found = _song_bits(songs[0]._replace(word_times=times), layout, 75.0, bits)
    frames = np.stack([layout.by_frame(condition, 20) for condition in bits]).sum(2)
    np.testing.assert_allclose(found.words, frames[:, 10:20].sum(1))
    assert found.sung == 2


def test_a_model_that_does_not_look_gains_exactly_nothing(songs):
    model, layout = a_model()
    out = model.layers.cross_attention.out
    out.kernel[...], out.bias[...] = jnp.zeros_like(out.kernel[...]), jnp.zeros_like(out.bias[...])
    figures = summarise(measure(model, layout, songs, range(8), 75.0))
    for name in GAINS:
        assert figures["gain_per_code"][name]["all_codebooks"][:3] == (0, 0, 0)
        assert figures["gain_per_sung_word"][name][:3] == (0, None, None)


def test_the_order_of_songs_changes_nothing(songs):
    model, layout = a_model()
    assert summarise(measure(model, layout, songs, range(8), 75.0)) == summarise(
        measure(model, layout, songs, [3, 1, 7, 0, 2, 6, 5, 4], 75.0)
    )


def test_conditions_that_a_song_does_not_have_are_not_counted(songs):
    figures = summarise(measure(*a_model(), songs, range(8), 75.0))["bits_per_code"]
    counts = {name: per_code["all_codebooks"].songs for name, per_code in figures.items()}
    assert counts == dict(zip(CONDITIONS, (8, 8, 8, 7, 7, 8)))
    alone = summarise(measure(*a_model(), songs, [0], 75.0))
    assert alone["bits_per_code"]["shuffled_lyrics"]["all_codebooks"] is None
    assert alone["gain_per_code"]["genre_against_other"]["all_codebooks"] is None
    assert alone["gain_per_code"]["lyrics_against_none"]["all_codebooks"].low is None


def test_what_lyrics_are_worth_is_found(tmp_path):
    """Songs of one code, which the lyrics alone tell, of four: 2 bits."""
    shape = dict(codebooks=1, entries=4, frames=1)
    made_with = MADE_WITH._replace(codebooks=1, entries=4)
    rng, states = np.random.default_rng(0), np.eye(4, 12) * 3
    records = [
        make_record(i, frames=1, pieces=1)._replace(
            lyrics="do re mi fa".split()[i % 4],
            genre="march",
            genre_states=np.ones((1, 12)),  # one for all: it must not tell the songs apart
            codes=np.full((1, 1), i % 4),
            lyric_states=states[i % 4][None] + rng.normal(size=(1, 12)) * 0.1,
            word_times=np.array([[0, 1 / 75, 1 / 75]]),
        )
        for i in range(32)
    ]
    dataset = Dataset(make_prepared(tmp_path / "songs", records, made_with))
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **shape),
        train=dataclasses.replace(CONFIG.train, batch=16, steps=120, dropout=(0.3, 0.0, 0.1), checkpoint_every=120),
    )
    assert not train(config, dataset, tmp_path / "run", None)
    model, info, _ = load_model(tmp_path / "run")
    figures = summarise(measure(model, make_layout(info.config.model), dataset, range(32), 75.0))
    code, word = figures["gain_per_code"]["lyrics_against_none"], figures["gain_per_sung_word"]["lyrics_against_none"]
    print(f"gain {code['all_codebooks'].value:.3f} bits; known: 2, tolerance 0.2")
    assert code["all_codebooks"].value == pytest.approx(2, abs=0.2) and word == code["all_codebooks"]
    assert figures["gain_per_code"]["lyrics_against_shuffled"]["all_codebooks"].low > 2


def test_donors_are_of_the_same_genre_and_have_other_words():
    texts = [Text(f"song_{i}", (f"{i // 2}",), ("waltz", "march")[i % 2]) for i in range(12)]
    texts += [Text("alone", ("la",), "tango"), Text("plain", ("lu",), "")]
    donors = choose_donors(texts)
    for text, (lyrics, genre) in zip(texts, donors):
        assert texts[lyrics].words != text.words
        if text.genre in ("waltz", "march"):
            assert texts[lyrics].genre == text.genre
        assert genre is None if not text.genre else texts[genre].genre not in ("", text.genre)
    assert len({lyrics for lyrics, _ in donors[:12]}) == 12
    assert choose_donors(texts[:1]) == [(None, None)]
    assert choose_donors([Text("a", ("la",), ""), Text("b", ("la",), "")]) == [(None, None)] * 2


def test_five_seconds_a_stretch():
    assert STRETCH == 5
