"""Lyrics: words, sections, pieces, windows."""

import csv
import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l2m_jax.bert import Bert, BertConfig
from l2m_jax.config import UserError
from l2m_jax.lyrics import (
    SECTIONS,
    TextEncoder,
    check_memory,
    encode_genre,
    encode_text,
    normalise_genre,
    parse_lyrics,
    read_tokenizer,
    split_pieces,
)

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] la lu ##na ##la sol [ ] sep ' t don e 月 folk hip - hop".split()


def tiny_encoder(folder: Path, positions: int) -> TextEncoder:
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    tokenizer = read_tokenizer(folder)
    return TextEncoder("tiny", "", 8, positions, 2, tokenizer, tiny_bert(positions))


@functools.cache
def tiny_bert(positions: int) -> Bert:
    config, rng = BertConfig(len(PIECES), 8, 2, 2, 16, positions, 2, 1e-12), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


@pytest.fixture
def encoder(tmp_path):
    return tiny_encoder(tmp_path, 34)


run = jax.jit(lambda module, ids: module(ids, jnp.ones(ids.shape, bool), 2))


def names(sections):
    return [SECTIONS[i] for i in sections]


def run_window(encoder, ids):
    """States of one window, without padding."""
    window = jnp.array([[2, *ids, 3]])
    return np.asarray(run(encoder.module, window))[0, 1:-1]


def test_sections_govern_words_until_the_next_tag():
    lyrics = parse_lyrics("oh la\n\n[Verse 1]\nuna luna\n  [Chorus 2: Ana]  \nsol\n\nmar\n[bridge]\nfin")
    assert lyrics.words == ("oh", "la", "una", "luna", "sol", "mar", "fin")
    assert lyrics.lines == (0, 0, 3, 3, 5, 7, 9)
    assert names(lyrics.sections) == ["none", "none", "verse", "verse", "chorus", "chorus", "bridge"]
    assert not lyrics.empty_tags and not lyrics.warnings


@pytest.mark.parametrize(
    "tag, section",
    [
        ("verse", "verse"), ("VERSE2", "verse"), ("Pre-Chorus", "verse"), ("pre chorus 2", "verse"), ("Hook", "chorus"),
        ("Refrain: both", "chorus"), ("Final Chorus", "chorus"), ("Post-Chorus", "chorus"), ("Intro", "intro"),
        ("Outro", "outro"), ("Guitar Solo", "instrumental"), ("instrumental", "instrumental"), ("none", "none"),
        ("other", "other"),
    ],
)  # fmt: skip
def test_known_tags(tag, section):
    lyrics = parse_lyrics(f"[{tag}]\nla")
    assert names(lyrics.sections) == [section] and not lyrics.warnings


@pytest.mark.parametrize("tag", ["universe", "", "laughs", "Ana: verse", "припев"])
def test_unknown_tag_is_other_with_a_warning(tag):
    lyrics = parse_lyrics(f"la\n[{tag}]\nsol", "song_001/lyrics.txt")
    assert lyrics.words == ("la", "sol") and names(lyrics.sections) == ["none", "other"]
    assert lyrics.warnings == (f"song_001/lyrics.txt, line 2: section tag [{tag}] is not known, taken as [other]",)


def test_only_a_whole_line_is_a_tag():
    assert parse_lyrics("[verse] la\n[a] [b]\n[verse").words == ("[verse]", "la", "[a]", "[b]", "[verse")


def test_tags_without_words_keep_their_place(encoder):
    lyrics = parse_lyrics("[intro]\n[verse]\nla luna\n[instrumental]\n[bridge]\nsol\n[outro]\n")
    assert lyrics.empty_tags == ((0, 4), (2, 6), (3, 5))
    encoded = encode_text(encoder, lyrics)
    assert encoded.word.tolist() == [-1, 0, 1, 1, -1, 2, -1]
    assert names(encoded.section) == ["intro", "verse", "verse", "verse", "instrumental", "bridge", "outro"]
    assert encoded.states.dtype == np.float32 and encoded.word.dtype == encoded.section.dtype == np.int32
    np.testing.assert_array_equal(np.abs(encoded.states).sum(1) == 0, encoded.word < 0)
    np.testing.assert_allclose(encoded.states[encoded.word >= 0], run_window(encoder, [5, 6, 7, 9]), atol=1e-5)


def test_song_without_words(encoder):
    encoded = encode_text(encoder, parse_lyrics("[Instrumental]"))
    assert encoded.states.tolist() == [[0.0] * 8] and encoded.word.tolist() == [-1]
    assert names(encoded.section) == ["instrumental"]


@pytest.mark.parametrize("text", ["", " \n\t\r\n", "\ufeff", "\u3000\n\u00a0"])
def test_empty_lyrics_are_refused(text):
    with pytest.raises(UserError, match=r"song_001/lyrics.txt: no words; write .*\[instrumental\]"):
        parse_lyrics(text, "song_001/lyrics.txt")


def test_line_ends_bom_tabs_and_composition():
    lyrics = parse_lyrics("\ufeff[verse]\r\nla\tde\u0301ja\u0300\u3000月\r\n👨‍👩‍👧 قمر\r\n")
    assert lyrics.words == ("la", "déjà", "月", "👨‍👩‍👧", "قمر")
    assert lyrics.lines == (1, 1, 1, 2, 2) and set(names(lyrics.sections)) == {"verse"}


def test_pieces_know_word_and_section(encoder):
    pieces = split_pieces(encoder, parse_lyrics("[verse]\nlunala don't\n[chorus]\n\u200b É月 zzz \u0007"))
    assert pieces.ids.tolist() == [6, 7, 8, 15, 13, 14, -1, 16, 17, 1, -1]
    assert pieces.word.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 4, 5]  # no word is without a row
    assert names(pieces.section) == ["verse"] * 6 + ["chorus"] * 5


def test_tokenizer_neither_cuts_nor_pads_nor_obeys_the_lyrics(encoder, tmp_path):
    saved = encoder.tokenizer  # becomes a tokenizer.json with the settings that published ones often carry
    saved.add_special_tokens(["[CLS]", "[SEP]"])
    saved.enable_truncation(8)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    encoder = dataclasses.replace(encoder, tokenizer=read_tokenizer(tmp_path))
    pieces = split_pieces(encoder, parse_lyrics("la [SEP] " + "sol " * 20))
    assert pieces.ids.tolist() == [5, 10, 12, 11] + [9] * 20
    assert len(encode_genre(encoder, "folk")) == 1


@pytest.mark.parametrize("count", [1, 31, 32, 33, 47, 48, 49, 65, 100])
def test_each_piece_is_kept_once_from_its_best_window(encoder, count):
    size = 32  # 34 positions
    ids = np.random.default_rng(count).choice([5, 9, 15, 16, 17], count)
    encoded = encode_text(encoder, parse_lyrics(" ".join(PIECES[i] for i in ids)))
    assert encoded.word.tolist() == list(range(count))
    starts = sorted({*range(0, max(count - size, 0), size // 2), max(count - size, 0)})
    windows = {start: run_window(encoder, ids[start : start + size]) for start in starts}
    for i in range(count):
        inside = [start for start in starts if start <= i < start + size]
        best = max(inside, key=lambda start: min(i - start, start + size - 1 - i))  # the first of equals
        np.testing.assert_allclose(encoded.states[i], windows[best][i - best], atol=1e-5, err_msg=f"piece {i}")


@pytest.mark.parametrize("count", [62, 63, 126, 127])
def test_padding_to_a_bucket_changes_nothing(tmp_path, count):
    encoder = tiny_encoder(tmp_path, 150)
    ids = np.random.default_rng(count).choice([5, 9, 15, 16, 17], count)
    encoded = encode_text(encoder, parse_lyrics(" ".join(PIECES[i] for i in ids)))
    np.testing.assert_allclose(encoded.states, run_window(encoder, ids), atol=1e-5)


def test_huge_lyrics(tmp_path):
    encoded = encode_text(tiny_encoder(tmp_path, 512), parse_lyrics("la sol\n" * 25_000))
    assert encoded.word.tolist() == list(range(50_000))
    assert np.isfinite(encoded.states).all() and np.abs(encoded.states).sum(1).min() > 0


def test_genre(encoder):
    assert normalise_genre("  Hip-Hop \t FOLK\n") == "hip-hop folk" and normalise_genre("cafe\u0301") == "café"
    assert encode_genre(encoder, " \t").shape == (0, 8)
    np.testing.assert_allclose(encode_genre(encoder, "Hip-Hop  Folk"), run_window(encoder, [19, 20, 21, 18]), atol=1e-5)
    with pytest.raises(UserError, match="UTF-8"):
        normalise_genre("caf\udce9")


def test_memory_cap():
    check_memory(500, 12, 512, "song_001")
    with pytest.raises(UserError, match=r"song_001: 530 lyric .* 3 genre .* are 21 more than the 512 .* to 533"):
        check_memory(530, 3, 512, "song_001")


def test_words_of_real_songs_match_their_timings():
    if not os.environ.get("L2M_SONGS"):
        pytest.skip("needs real songs: set L2M_SONGS to a folder of songs with words.csv")
    files = sorted(Path(os.environ["L2M_SONGS"]).glob("*/words.csv"))
    assert files
    for file in files:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        assert len(parse_lyrics(file.with_name("lyrics.txt").read_text(encoding="utf-8")).words) == len(rows), file
