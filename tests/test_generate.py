"""What the commands do: a song, its stream, variations, files of requests; and codes back to sound."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile

from l2m_jax import sample
from l2m_jax.audio import read_audio
from l2m_jax.config import UserError
from l2m_jax.generate import decode_file, sing_one, sing_requests, sing_variations
from l2m_jax.request import Request
from l2m_jax.singer import Stream, load
from l2m_jax.stop import StopSignal

LENGTH = 0.4  # s


@pytest.fixture(scope="module")
def singer(singer_run):
    return load(singer_run)


@pytest.fixture(scope="module")
def song(singer, tmp_path_factory):
    """song.wav and the files beside it."""
    out = tmp_path_factory.mktemp("song") / "song.wav"
    made = singer.generate("[verse]\nla sol\n", "march", seconds=LENGTH)
    made.save(out)
    return out, made.about


def pcm(path):
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == 24_000
    return samples


class Stop(StopSignal):
    """Stops the singing when it is asked for the `after`th time."""

    def __init__(self, after=10**9):
        self._left = after

    @property
    def by(self):
        self._left -= 1
        return "SIGINT" if self._left <= 0 else ""


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_one_song_and_its_picture(singer, tmp_path, capsys):
    sing_one(singer, Request(lyrics="[laughs]\nla", seconds=LENGTH), tmp_path / "🎵.wav", True, Stop())
    assert set(files(tmp_path)) == {"🎵.wav", "🎵.ecdc", "🎵.npz", "🎵.json", "🎵.png"}
    said = capsys.readouterr().out
    assert "singing: 0.4 of 0.4 s at most" in said and "warning: lyrics, line 1: section tag [laughs]" in said
    took = r"0.4 s sung in \d+.\d s( .and \d+.\d s of compiling.)?, \d+.\d\d times real"
    assert re.search("🎵.wav: 0.4 s, the song had not ended at the limit of 0.4 s; " + took, said)


def test_a_pipe_is_sent_a_wav_and_nothing_else(singer, song, tmp_path, capfdbinary):
    sing_one(singer, Request(lyrics="[verse]\nla sol\n", genre="march", seconds=LENGTH), None, False, Stop())
    sent, told = capfdbinary.readouterr()
    (tmp_path / "a.wav").write_bytes(sent)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 24_000), read_audio(song[0], 24_000))
    assert b"standard output: 0.4 s" in told


def test_a_song_that_is_stopped_is_kept_as_far_as_it_came(singer, tmp_path, monkeypatch):
    """In the middle it is a part, in its last stretch it is whole: nothing is said to be missing of it."""
    request = Request(lyrics="la", min_seconds=LENGTH, seconds=LENGTH)
    sing_one(singer, request, tmp_path / "whole.wav", False, Stop(1))
    about = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
    assert about["cut"] == "the song had not ended at the limit of 0.4 s" and about["stopped_by"] is None
    monkeypatch.setattr(sample, "FIRST", 15)  # frames
    sing_one(singer, request, tmp_path / "a.wav", False, Stop(1))
    about = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert about["cut"] == "stopped by SIGINT after 0.2 s" and about["stopped_by"] == "SIGINT"
    assert len(pcm(tmp_path / "a.wav")) == 24_000 * 0.2


def test_a_song_without_sound_has_no_picture(singer, tmp_path, monkeypatch, capsys):
    whole = singer.generate("la", seconds=LENGTH)
    empty = dataclasses.replace(whole, codes=whole.codes[:0], samples=whole.samples[:0])
    monkeypatch.setattr(Stream, "song", lambda stream: empty)
    sing_one(singer, Request(lyrics="la", seconds=LENGTH), tmp_path / "a.wav", True, Stop())
    assert set(files(tmp_path)) == {"a.wav", "a.ecdc", "a.npz", "a.json"}
    assert "a.wav: 0.0 s" in capsys.readouterr().out


def test_variations_are_ranked_by_likelihood(singer, tmp_path, capsys):
    request = Request(lyrics="la", genre="polka", seed=7, seconds=LENGTH)
    sing_variations(singer, request, 5, 2, tmp_path / "new" / "song.wav", Stop())
    abouts = [json.loads((tmp_path / "new" / f"song_{i}.json").read_text()) for i in range(1, 6)]
    assert (
        len(list((tmp_path / "new").iterdir())) == 5 * 4 + 1 and (tmp_path / "new" / "song.png").stat().st_size > 9999
    )
    nats = [about["nats_per_code"] for about in abouts]
    assert nats == sorted(nats) and [about["rank"] for about in abouts] == [1, 2, 3, 4, 5]
    assert {about["request"]["seed"] for about in abouts} == set(range(7, 12))
    assert len({about["codes_sha256"] for about in abouts}) == 5
    said = capsys.readouterr().out
    assert (
        "warning: genre 'polka'" in said
        and f"{nats[0]:.4f}" in said
        and said.index("song_1.wav") < said.index("song_5.wav")
    )


def test_variations_that_are_stopped_are_kept_as_far_as_they_came(singer, tmp_path, monkeypatch):
    """Stopped in the second batch of three: its songs stand behind the whole ones, the third was not begun."""
    monkeypatch.setattr(sample, "FIRST", 15)
    request = Request(lyrics="la", seconds=LENGTH, min_seconds=LENGTH)
    sing_variations(
        singer, request, 6, 2, tmp_path / "song.wav", Stop(5)
    )  # it is asked three times a batch, and after it
    abouts = [json.loads((tmp_path / f"song_{i}.json").read_text()) for i in range(1, 5)]
    assert [about["stopped_by"] for about in abouts] == [None, None, "SIGINT", "SIGINT"]
    assert [about["seconds"] for about in abouts] == [LENGTH, LENGTH, 0.2, 0.2]
    assert (tmp_path / "song.png").exists() and not (tmp_path / "song_5.wav").exists()


def test_seeds_beyond_the_last_are_refused(singer, tmp_path):
    with pytest.raises(UserError, match="seed is 4294967296"):
        sing_variations(singer, Request(lyrics="la", seed=2**32 - 1), 2, 2, tmp_path / "song.wav", Stop())


def asked(folder, *lines):
    path = folder / "requests.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def ask(name, **values):
    return {"id": name, "lyrics": "la", "seconds": LENGTH} | values


def test_a_file_of_requests_becomes_songs(singer, tmp_path, capsys):
    path = asked(
        tmp_path, ask("a"), ask("b", lyrics="la " * 13), ask("c 🌙", lyrics="🌙", genre="polka"), "nonsense",
        ask("d", top_k=3, seed=4), ask("e", seconds=9), ask("f", prompt="lost.wav"), ask("g", lyrics=" "), ask("a"),
    )  # fmt: skip
    out = tmp_path / "out"
    assert sing_requests(singer, path, Request(temperature=0.9), 2, out, Stop()) == 6
    songs = {f"{name}{suffix}" for name in ("a", "c 🌙", "d") for suffix in (".wav", ".ecdc", ".npz", ".json")}
    failed = {f"{name}.error.json" for name in ("b", "e", "f", "g", "line-4", "line-9")}
    assert set(files(out)) == songs | failed
    about = json.loads((out / "d.json").read_text())
    assert (about["request"]["top_k"], about["request"]["seed"], about["request"]["temperature"]) == (3, 4, 0.9)
    error = json.loads((out / "b.error.json").read_text())
    assert error["line"] == 2 and "are 1 more than the 12" in error["error"]
    said = capsys.readouterr().out
    assert f"3 songs of 9 in {out} (3 new, 6 failed)" in said and "warning: c 🌙: genre 'polka'" in said
    assert f"failed: {path}, line 4: is not JSON" in said and "singing: 9 of 9 songs" in said


def test_a_rerun_sings_what_is_missing_or_has_changed(singer, tmp_path, capsys):
    out = tmp_path / "out"
    lines = [ask("a"), ask("b"), ask("c", seconds=9), ask("d")]
    assert sing_requests(singer, asked(tmp_path, *lines), Request(), 8, out, Stop()) == 1
    before = files(out)
    (out / "a.npz").unlink()
    (out / "d.json").write_text("{")
    lines[2] = ask("c")  # mended
    assert sing_requests(singer, asked(tmp_path, *lines), Request(), 8, out, Stop()) == 0
    after = files(out)
    assert after["b.wav"] == before["b.wav"] and "c.error.json" not in after
    assert all(after[name] != before[name] for name in ("a.wav", "d.wav")) and "c.wav" in after
    assert f"4 songs of 4 in {out} (3 new, 0 failed)" in capsys.readouterr().out
    lines[1] = ask("b", seed=1)
    assert sing_requests(singer, asked(tmp_path, *lines), Request(), 8, out, Stop()) == 0
    assert {name for name, at in files(out).items() if after.get(name) != at} == {"b.wav", "b.ecdc", "b.npz", "b.json"}


def test_requests_that_are_stopped_go_on(singer, tmp_path, capsys, monkeypatch):
    """Stopped in the second batch: the first is there, nothing of the second; the same call does the rest."""
    monkeypatch.setattr(sample, "FIRST", 15)
    lines = [ask(str(i), seed=i, min_seconds=LENGTH) for i in range(4)]
    path, out = asked(tmp_path, *lines), tmp_path / "out"
    sing_requests(singer, path, Request(), 2, out, Stop(4))
    assert {name for name in files(out) if name.endswith(".wav")} == {"0.wav", "1.wav"}
    assert "(2 new, 0 failed); stopped by SIGINT, the same command goes on from there" in capsys.readouterr().out
    sing_requests(singer, path, Request(), 2, out, Stop())
    assert "4 songs of 4" in capsys.readouterr().out and len(files(out)) == 16
    whole = tmp_path / "whole"
    sing_requests(singer, path, Request(), 2, whole, Stop())
    for i in range(4):
        assert (out / f"{i}.wav").read_bytes() == (whole / f"{i}.wav").read_bytes()


def test_songs_that_are_whole_when_their_batch_is_stopped_are_kept(singer, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "FIRST", 15)
    path = asked(tmp_path, ask("short", seconds=0.2), ask("long", min_seconds=LENGTH))
    sing_requests(singer, path, Request(), 2, tmp_path / "out", Stop(1))
    assert set(files(tmp_path / "out")) == {f"short{suffix}" for suffix in (".wav", ".ecdc", ".npz", ".json")}


def test_a_prompt_is_not_overwritten(singer, song, tmp_path):
    prompt = copied(song, tmp_path, ".ecdc")
    before = prompt.read_bytes()
    path = asked(tmp_path, ask(prompt.stem, prompt=str(prompt), **{"from": 0.1}), ask("other"))
    assert sing_requests(singer, path, Request(), 2, tmp_path, Stop()) == 1
    error = json.loads((tmp_path / f"{prompt.stem}.error.json").read_text())["error"]
    assert "is the prompt, and would be overwritten" in error
    assert prompt.read_bytes() == before and (tmp_path / "other.wav").exists()


def test_a_prompt_that_is_newer_is_sung_on_from_anew(singer, song, tmp_path):
    prompt = copied(song, tmp_path, ".ecdc")
    path, out = asked(tmp_path, ask("a", prompt=str(prompt), **{"from": 0.1})), tmp_path / "out"
    assert sing_requests(singer, path, Request(), 2, out, Stop()) == 0
    assert json.loads((out / "a.json").read_text())["given_s"] == pytest.approx(0.1, abs=0.01)
    before = files(out)
    sing_requests(singer, path, Request(), 2, out, Stop())
    assert files(out) == before
    os.utime(prompt, (2**31, 2**31))
    sing_requests(singer, path, Request(), 2, out, Stop())
    assert files(out)["a.wav"] != before["a.wav"]
    prompt.unlink()
    before = files(out)
    sing_requests(singer, path, Request(), 2, out, Stop())
    assert files(out) == before  # what is sung is sung


@pytest.mark.parametrize("suffix", [".ecdc", ".npz"])
def test_codes_decode_to_the_same_samples(song, tmp_path, suffix):
    seconds = decode_file(song[0].with_suffix(suffix), tmp_path / "again.wav")
    assert seconds == LENGTH
    np.testing.assert_array_equal(pcm(tmp_path / "again.wav"), pcm(song[0]))


def copied(song, folder, suffix):
    path = folder / f"codes{suffix}"
    shutil.copy(song[0].with_suffix(suffix), path)
    return path


def refused(path, says, codec="solfege"):
    out = path.parent / "out.wav"
    with pytest.raises(UserError, match=says) as caught:
        decode_file(path, out, codec)
    assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.parametrize("suffix", [".ecdc", ".npz"])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.95])
def test_codes_cut_short_are_refused(song, tmp_path, suffix, keep):
    path = copied(song, tmp_path, suffix)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(path, rf"codes\{suffix}.*(cut short|damaged|is not an .ecdc file)")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"fingerprint": "other", "codec": "encodec_24khz"}, "has codes of encodec_24khz .other., not of solfege"),
        ({"codes": np.zeros(30, np.int16)}, "codes of shape .30,., not .frames, codebooks."),
        ({"codes": np.full((30, 2), 1024)}, "codes go from 1024 to 1024; codec solfege has 0 to 1023"),
        ({"codes": np.full((30, 2), -1)}, "codes go from -1 to -1"),
        ({"codes": np.zeros((30, 0), np.int16)}, "codebooks"),
        ({"codes": np.zeros((30, 99), np.int16)}, "codebooks"),
        ({"codes": np.array([["a", "b"]])}, "is damaged or holds no codes"),
    ],
)
def test_npz_of_something_else_is_refused(song, tmp_path, change, says):
    path = copied(song, tmp_path, ".npz")
    with np.load(path) as file:
        content = dict(file)
    np.savez(path, **(content | change))
    refused(path, says)


def test_files_that_hold_no_codes_are_refused(tmp_path):
    refused(tmp_path / "nowhere.npz", "nowhere.npz: no such file")
    (tmp_path / "song.mp3").write_text("la")
    refused(tmp_path / "song.mp3", "a .ecdc or a .npz is needed")
    with open(tmp_path / "c.npz", "wb") as file:
        np.save(file, np.zeros(3))
    refused(tmp_path / "c.npz", "c.npz is damaged or holds no codes")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    refused(tmp_path / "a.npz", "a.npz is damaged or holds no codes")
    np.savez(tmp_path / "b.npz", codes=np.array([{}]), codec="", fingerprint="")  # a pickle, which is never opened
    refused(tmp_path / "b.npz", "b.npz is damaged or holds no codes")
