"""`l2m inspect`: what it counts is what is there."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from conftest import MADE_WITH, make_prepared, make_record

from l2m_jax.codec import decode
from l2m_jax.config import UserError
from l2m_jax.data import Dataset
from l2m_jax.inspection import (
    codebook_use,
    count_codes,
    describe,
    describe_song,
    draw_record,
    find_song,
    main_script,
)
from l2m_jax.prepare import prepare
from l2m_jax.weights import load_codec


@pytest.mark.parametrize(
    "text, script",
    [
        ("[Chorus]\nça va 月", "Latin"), ("Пой, луна la la", "Cyrillic"), ("غنِّ يا قمر", "Arabic"),
        ("唱吧，月亮", "Han"), ("夜のカラオケ 月よ歌え", "Japanese"), ("노래해 달아", "Hangul"), ("ｌａ ｌａ", "Latin"),
        ("[instrumental]", "(none)"), ("💃 123", "(none)"),
    ],
)  # fmt: skip
def test_script_of_most_letters(text, script):
    assert main_script(text) == script


def test_use_of_codebooks():
    codes = np.array([[0, 5], [1, 5], [2, 5], [3, 5]])
    counts = count_codes(codes, 8)
    assert counts.shape == (2, 8) and counts[1, 5] == 4
    assert codebook_use(counts) == [
        "codebook 0: 4 of 8 entries used, entropy 2.00 of 3.00 bits",
        "codebook 1: 1 of 8 entries used, entropy 0.00 of 3.00 bits",
    ]


def test_a_dataset_is_described(tmp_path):
    records = [make_record(i, frames=10 * (i + 1), pieces=2 + i // 3)._replace(genre="Rock ") for i in range(6)]
    records[0] = records[0]._replace(lyrics="месяц", genre="", word_times=np.ones((1, 3)))
    folder = make_prepared(tmp_path / "data", records)
    bad = [{"id": f"bad_{i}", "reason": "lyrics.txt is missing"} for i in range(14)]
    (folder / "report.json").write_text(json.dumps({"left_out": bad, "warnings": ["odd tag"], "gone": ["song_x"]}))
    text = "\n".join(describe(Dataset(folder)))
    hours = sum(10 * (i + 1) for i in range(6)) / 75 / 3600
    assert f"6 songs, {hours:.3g} hours, 1 with word times" in text
    assert "genres: rock 5, (none) 1" in text and "scripts of the lyrics: Latin 5, Cyrillic 1" in text
    assert "seconds: 0.1333 to 0.8, median 0.4667" in text
    assert "lyric pieces: 2 to 3, median 2.5\n  from 2               3 ###" in text
    assert f"codebook 1: 16 of {MADE_WITH.entries} entries used" in text
    assert "left out: 14\n  bad_0: lyrics.txt is missing" in text and "  and 2 more, in report.json" in text
    assert "folders are gone: 1\n  song_x" in text and "warnings: 1\n  odd tag" in text
    (folder / "report.json").unlink()
    assert "left out: not known; " in "\n".join(describe(Dataset(folder)))


def test_a_song_is_described_drawn_and_heard(tmp_path, songs, encoders):
    shutil.copytree(songs / "song_0001", tmp_path / "songs" / "song_0001")
    lyrics = "[intro]\n[verse]\nla luna\n[chorus]\n" + "sol la déjà " * 10
    (tmp_path / "songs" / "song_0001" / "lyrics.txt").write_text(lyrics)
    (tmp_path / "songs" / "song_0001" / "words.csv").unlink()
    prepare(tmp_path / "songs", tmp_path / "data", encoders)
    dataset = Dataset(tmp_path / "data")
    record = find_song(dataset, "song_0001")
    text = "\n".join(describe_song(record, dataset.made_with))
    assert "  [intro] -\n  [verse] la lu ##na\n  [chorus] sol la deja sol" in text
    assert f"{len(record.lyric_states)} lyric rows of 16" in text and "windows of 24 positions: 2; pieces 0 to " in text
    assert f"codes: {len(record.codes)} frames of 2, at 75." in text
    assert f"first of codebook 1: {record.codes[0, 1]} " in text

    wav, png = draw_record(record, dataset.made_with, tmp_path / "out")
    heard, rate = soundfile.read(wav)
    np.testing.assert_allclose(heard, np.clip(decode(load_codec(), record.codes), -1, 1), atol=1e-4)
    assert rate == 24_000 and png.read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match=r"no song 'song_1'; nearest: song_0001"):
        find_song(dataset, "song_1")
    other = dataset.made_with._replace(text_fingerprint="other", codec_fingerprint="other")
    with pytest.raises(UserError, match=r"prepared with text encoder .*\[other\].*--text-encoder"):
        describe_song(record, other)
    with pytest.raises(UserError, match=r"codes of solfege \[other\].*--codec"):
        draw_record(record, other, tmp_path / "out")
