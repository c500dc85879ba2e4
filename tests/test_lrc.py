"""The times of words as a file, and where songs, lyrics and heads come from."""

import json
import shutil

import numpy as np
import pytest

from l2m_jax.config import UserError
from l2m_jax.data import Dataset
from l2m_jax.lrc import choose_reading, labels, read_reading, read_source, time_words, to_lrc, write_lrc
from l2m_jax.singer import load

LYRICS = "\ufeff[Verse 1]\nla luna \n\n\n[instrumental]\n[x] y\n"


@pytest.fixture(scope="module")
def singer(singer_run, tmp_path_factory):
    """Of a copy of the run, which alignment.json may be written to."""
    return load(shutil.copytree(singer_run, tmp_path_factory.mktemp("lrc") / "run"))


def test_lrc():
    times = np.array([[0.004, 0.5], [0.5, 1.0], [59.996, 61], [61.255, 6001.0]], np.float32)
    assert to_lrc(LYRICS, times).splitlines() == [
        "[re:l2m_jax]",
        "# [Verse 1]",
        "[00:00.00] <00:00.00> la <00:00.50> luna",
        "[00:01.00]",
        "# [instrumental]",
        "[01:00.00] <01:00.00> [x] <01:01.26> y",
        "[100:01.00]",
    ]
    cut = np.where(np.arange(4)[:, None] < 1, times, np.nan)
    assert to_lrc(LYRICS, cut).splitlines()[2:] == ["[00:00.00] <00:00.00> la", "[00:00.50]"]
    assert to_lrc(LYRICS, cut * np.nan) == "[re:l2m_jax]\n" and [label.text for label in labels(LYRICS, cut)] == ["la"]
    assert to_lrc("[instrumental]", times[:0]) == "[re:l2m_jax]\n# [instrumental]\n"
    assert labels("[a]\nla lu", times)[1] == ("lu", 0.5, 1.0)


def test_heads_are_chosen_and_kept(singer, sung, songs, monkeypatch):
    """Without a choice the song itself chooses, with a warning; a choice of another step is told."""
    source = read_source(songs / "song_0001", singer)
    assert source.out == songs / "song_0001" / "song.lrc" and source.genre
    _, warnings = time_words(singer, source.codes[:20], source.lyrics, source.genre)
    assert "no heads were chosen" in warnings[-1] and "--choose DATA" in warnings[-1]
    reading, errors = choose_reading(singer, Dataset(sung), 2)  # songs of a second and more: as far as the window goes
    assert reading.heads and 2 <= errors.words < 6
    assert read_reading(singer.run) == (reading, singer.step, Dataset(sung).fingerprint)
    kept = {"step": singer.step, "heads": [[0, 1]], "blank": 0.3}
    path = singer.run / "alignment.json"
    path.write_text(json.dumps(kept))
    assert read_reading(singer.run) == ((((0, 1),), 0.3), singer.step, "")
    times, warnings = time_words(singer, source.codes[:20], source.lyrics, source.genre)
    assert not warnings and source.starts is not None
    assert times.shape == (len(source.starts), 2) and (np.diff(times[:, 0]) > 0).all()
    path.write_text(json.dumps(kept | {"step": 1}))
    assert "chosen at step 1, this is step 2" in time_words(singer, source.codes[:20], "la", "")[1][-1]
    assert time_words(singer, source.codes[:20], "[instrumental]", "")[0].shape == (0, 2)
    with monkeypatch.context() as patch:
        patch.setattr("l2m_jax.lrc.align_song", lambda *_: np.array([[0.2, 0.7], [0.7, 0.9], [0.8, 0.8]], np.float32))
        times, warnings = time_words(singer, source.codes, "do re mi", "")
    np.testing.assert_allclose(times, [[0.2, 0.7], [0.7, 0.8], [np.nan, np.nan]])
    assert f"has {len(source.codes)} frames and the model sees 60: 1 words after 0.8 s have no times" in warnings[-1]
    path.write_text(json.dumps(kept | {"heads": [[1, 0]]}))
    with pytest.raises(UserError, match="names heads that the model has not: choose again"):
        time_words(singer, source.codes[:20], "la", "")
    for damaged in ("{", "[]", '{"heads": 3}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"alignment.json is damaged .* --choose DATA"):
            read_reading(singer.run)
    path.unlink()


def test_where_songs_come_from(singer, songs, tmp_path):
    """A generated song has its codes and lyrics beside it; whatever else needs --lyrics."""
    song = singer.generate("[verse]\nla sol\n", "march", seconds=0.3)
    song.save(tmp_path / "song.wav")
    for name in ("song.wav", "song.json", "song.npz"):
        source = read_source(tmp_path / name, singer)
        np.testing.assert_array_equal(source.codes, song.codes)
        assert (source.lyrics, source.genre, source.starts) == ("[verse]\nla sol\n", "march", None)
        assert source.out == tmp_path / "song.lrc" and source.sound == tmp_path / "song.wav"
    assert read_source(tmp_path / "song.wav", singer, "other", "waltz")[1:3] == ("other", "waltz")
    shutil.copy(tmp_path / "song.wav", tmp_path / "mine.wav")
    with pytest.raises(UserError, match=r"mine.wav: it has no mine.json .* --lyrics FILE"):
        read_source(tmp_path / "mine.wav", singer)
    (tmp_path / "mine.json").write_text("[]")
    assert read_source(tmp_path / "mine.wav", singer, "la").lyrics == "la"
    with pytest.raises(UserError, match=r"nowhere.wav: no such file"):
        read_source(tmp_path / "nowhere.wav", singer, "la")
    with pytest.raises(UserError, match="lyrics.txt is missing"):
        read_source(tmp_path, singer)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_lrc(tmp_path / "file" / "song.lrc", "la", np.zeros((1, 2), np.float32))
