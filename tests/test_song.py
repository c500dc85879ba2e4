"""A song's files: all of them or none, and codes and sound back from what is given."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
import soundfile

from l2m_jax.codec import decode, encode
from l2m_jax.config import UserError
from l2m_jax.ecdc import read_ecdc
from l2m_jax.song import Song, check_output, read_npz, read_sound, write_json
from l2m_jax.weights import load_codec


@pytest.fixture(scope="module")
def codec():
    return load_codec()


@pytest.fixture(scope="module")
def song(codec):
    codes = np.random.default_rng(0).integers(0, 1024, (30, 2)).astype(np.int32)
    return Song(codes, decode(codec, codes), True, {"request": {"lyrics": "la 🌙"}}, codec)


def test_a_song_has_four_files_that_say_the_same(song, codec, tmp_path):
    song.save(tmp_path / "new" / "a.b.wav")
    assert sorted(os.listdir(tmp_path / "new")) == ["a.b.ecdc", "a.b.json", "a.b.npz", "a.b.wav"]
    assert (song.rate, song.seconds) == (24_000, 0.4)
    samples, rate = soundfile.read(tmp_path / "new" / "a.b.wav")
    assert rate == 24_000 and np.abs(samples - np.clip(song.samples, -1, 1)).max() < 1 / 32_767
    for suffix in (".ecdc", ".npz"):
        np.testing.assert_array_equal(read_sound(tmp_path / "new" / f"a.b{suffix}", codec), song.codes)
    assert read_ecdc(tmp_path / "new" / "a.b.ecdc", codec)[1] == 30 * 320
    assert read_npz(tmp_path / "new" / "a.b.npz")[1:] == ("solfege", codec.fingerprint)
    assert json.loads((tmp_path / "new" / "a.b.json").read_text(encoding="utf-8")) == song.about


def test_sound_is_encoded_and_codes_are_not(song, codec, tmp_path):
    song.save(str(tmp_path / "a.wav"))
    np.testing.assert_array_equal(
        read_sound(tmp_path / "a.wav", codec), encode(codec, soundfile.read(tmp_path / "a.wav", dtype="float32")[0])
    )


def test_an_empty_song_can_be_kept(codec, tmp_path):
    Song(np.zeros((0, 2), np.int32), np.zeros(0, np.float32), True, {}, codec).save(tmp_path / "a.wav")
    for suffix in (".ecdc", ".npz"):
        assert read_sound(tmp_path / f"a{suffix}", codec).shape == (0, 2)


def test_full_disk_leaves_what_was_there(song, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    song.save(tmp_path / "a.wav")
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    for path, function in (("a.wav", "l2m_jax.song.write_json"), ("b.wav", "l2m_jax.song.write_json")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written .No space left"):
            patch.setattr(function, lambda path, content: write_fails(path))
            song.save(tmp_path / path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="b.wav: cannot be written .No space left"):
        patch.setattr(os, "replace", full)
        song.save(tmp_path / "b.wav")
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()} == before


def test_what_a_killed_process_left_goes_with_the_next(song, tmp_path):
    (tmp_path / ".a.part").mkdir()
    (tmp_path / ".a.part" / "a.wav").write_text("half")
    song.save(tmp_path / "a.wav")
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "a.ecdc", "a.npz", "a.json"}


@pytest.mark.parametrize("suffix", [".wav", ".ecdc", ".npz", ".json"])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, suffix):
    (tmp_path / f"a{suffix}").mkdir()
    with pytest.raises(UserError, match=rf"a\{suffix} is a folder: name another output"):
        check_output(tmp_path / "a.wav")


def write_fails(path):
    raise UserError(f"{path}: cannot be written (No space left on device)")


def test_the_json_never_stands_beside_another_song(song, tmp_path, monkeypatch):
    """Killed between the renames, what is left has no .json, and so counts for nothing."""
    song.save(tmp_path / "a.wav")
    moved = []

    def killed(source, target):
        moved.append(target)
        if len(moved) > 1 and "." not in os.path.basename(source)[:1]:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr("l2m_jax.song.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        song.save(tmp_path / "a.wav")
    assert "a.json" not in os.listdir(tmp_path)


def test_what_is_no_unicode_is_still_json(tmp_path):
    write_json(tmp_path / "a.json", {"error": "🌙 \ud800"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"error": "🌙 \ud800"}


@pytest.mark.parametrize(
    "out, says", [("song.mp3", "the output must end in .wav"), ("file/a.wav", "cannot be written")]
)
def test_an_output_that_cannot_be(tmp_path, out, says):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=says):
        check_output(tmp_path / out)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("lost.ecdc", None, "lost.ecdc: no such file"),
        ("lost.wav", None, "lost.wav: no such file"),
        ("empty.wav", b"", "empty.wav: the audio file is empty"),
        ("song.json", b"{}", "song.json: cannot be read as mp3"),
        ("song.ecdc", b"la", "is not an .ecdc file"),
        ("song.npz", b"la", "is damaged or holds no codes"),
    ],
)
def test_what_holds_no_song_is_refused(codec, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_sound(tmp_path / name, codec)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"fingerprint": "other", "codec": "encodec_24khz"}, "has codes of encodec_24khz .other., not of solfege"),
        ({"codes": np.full((30, 2), 1024)}, "has codes from 1024 to 1024; allowed: 0 to 1023"),
        ({"codes": np.zeros((30, 4), np.int16)}, "has 4 codebooks; the model has 2: give the sound itself"),
    ],
)
def test_codes_of_something_else_are_refused(codec, tmp_path, change, says):
    content = {"codes": np.zeros((30, 2), np.int16), "codec": "solfege", "fingerprint": codec.fingerprint} | change
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(UserError, match=says):
        read_sound(tmp_path / "a.npz", codec)
