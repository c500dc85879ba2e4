"""From lyrics to files: what is written, what is refused before anything is, and codes back to sound."""

import errno
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from test_bert import tiny_folder

from l2m_jax import generate as module
from l2m_jax.config import SampleConfig, UserError
from l2m_jax.data import Dataset, make_example
from l2m_jax.generate import decode_file, generate, load_singer, make_prompt
from l2m_jax.sample import Song

RULE = SampleConfig(top_k=50)
LENGTH = 0.4  # s


@pytest.fixture(scope="module")
def singer(singer_run):
    return load_singer(singer_run)


@pytest.fixture(scope="module")
def song(singer, tmp_path_factory):
    """song.wav and the files beside it."""
    out = tmp_path_factory.mktemp("song") / "new" / "song.wav"
    told = []
    about = generate(singer, "[verse]\nla sol\n", singer.info.genres[0], out, RULE, 5, LENGTH, told.append)
    assert 0 < told[-1] <= LENGTH
    return out, about


def pcm(path):
    samples, rate = soundfile.read(path, dtype="int16")
    assert rate == 24_000
    return samples


def test_a_song_has_four_files_that_say_the_same(singer, song):
    out, about = song
    assert sorted(os.listdir(out.parent)) == ["song.ecdc", "song.json", "song.npz", "song.wav"]
    with np.load(out.with_suffix(".npz")) as file:
        codes = file["codes"]
        assert (str(file["codec"]), str(file["fingerprint"])) == ("solfege", singer.codec.fingerprint)
    assert codes.shape == (30, 2) and len(pcm(out)) == 30 * 320 and pcm(out).any()
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8")) == about
    assert about["codes_sha256"] == hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest()
    assert (about["seconds"], about["limit_s"], about["seed"], about["step"]) == (0.4, LENGTH, 5, 2)
    assert about["sampling"]["top_k"] == 50 and about["genre"] == singer.info.genres[0]
    assert about["lyrics"] == "[verse]\nla sol\n"
    assert not about["ended_by_itself"] and about["cut"] == "the song had not ended at the limit of 0.4 s"
    assert 0 < about["nats_per_code"] < 8 and not about["warnings"]


@pytest.mark.parametrize("suffix", [".ecdc", ".npz"])
def test_codes_decode_to_the_same_samples(song, tmp_path, suffix):
    seconds = decode_file(song[0].with_suffix(suffix), tmp_path / "again.wav")
    assert seconds == LENGTH
    np.testing.assert_array_equal(pcm(tmp_path / "again.wav"), pcm(song[0]))


def test_the_same_seed_sings_the_same_song(singer, song, tmp_path):
    codes = [song[1]["codes_sha256"]]
    for seed in (5, 6):
        genre = f" {singer.info.genres[0].upper()} "
        about = generate(singer, "[verse]\nla sol\n", genre, tmp_path / "a.wav", RULE, seed, LENGTH)
        codes.append(about["codes_sha256"])
    assert codes[0] == codes[1] != codes[2]


def test_a_prompt_is_what_training_was_shown(singer, sung):
    record = Dataset(sung)[1]
    prompt, _ = make_prompt(singer, record.lyrics, record.genre)
    shown = make_example(record, singer.layout, 12)
    for name in ("kind", "section", "position"):
        np.testing.assert_array_equal(getattr(prompt, name)[0], getattr(shown, name))
    np.testing.assert_allclose(prompt.states[0], shown.states, atol=2e-3)  # those were stored as float16


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lyrics": " \n"}, "lyrics: no words; write the lyrics there, or .instrumental."),
        ({"lyrics": "la " * 13}, "13 lyric pieces and 1 genre pieces are 2 more than the 12 that the memory holds"),
        ({"lyrics": "la \udcff"}, "lyrics: not UTF-8"),
        ({"genre": "\udcff"}, "is not UTF-8"),
        ({"seconds": 0.0}, "the length limit is 0 s; allowed: above 0, up to the window of 0.8 s"),
        ({"seconds": -1.0}, "the length limit is -1 s"),
        ({"seconds": 0.81}, "the length limit is 0.81 s"),
        ({"seconds": float("nan")}, "the length limit is nan s"),
        ({"seed": -1}, "seed is -1; allowed: 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"out": "song.mp3"}, "song.mp3: the output must end in .wav"),
        ({"out": "file/song.wav"}, "file cannot be written"),
    ],
)
def test_what_cannot_be_sung_is_said_and_leaves_nothing(singer, tmp_path, change, says):
    (tmp_path / "file").write_text("")
    given = {"lyrics": "la", "genre": "march", "out": "song.wav", "seed": 0, "seconds": LENGTH} | change
    with pytest.raises(UserError, match=says) as caught:
        generate(singer, **{**given, "out": tmp_path / given["out"]}, rule=RULE)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["file"]


def test_far_too_long_lyrics_are_refused_before_they_are_encoded(singer, monkeypatch):
    monkeypatch.setattr(module, "encode_text", lambda *args: pytest.fail("encoded"))
    with pytest.raises(UserError, match="200000 lyric pieces and 0 genre pieces are 199988 more than the 12"):
        make_prompt(singer, "la\n" * 200_000, "")


def test_what_is_only_odd_is_a_warning(singer, tmp_path):
    about = generate(singer, "[laughs]\n🌙💃🏽\u200b la\n", "Polka 🎵", tmp_path / "🎵.wav", RULE, 0, LENGTH)
    tag, genre = about["warnings"]
    assert "section tag [laughs] is not known, taken as [other]" in tag
    assert f"genre 'polka 🎵' was in no training song (those were: {', '.join(singer.info.genres)})" in genre
    assert sorted(os.listdir(tmp_path)) == ["🎵.ecdc", "🎵.json", "🎵.npz", "🎵.wav"]
    assert "🌙" in (tmp_path / "🎵.json").read_text(encoding="utf-8")


def test_a_song_that_ends_at_once_is_still_a_song(singer, tmp_path, monkeypatch):
    empty = Song(np.zeros((0, 2), np.int32), True, 0.0)
    monkeypatch.setattr(module, "sing", lambda *args: [empty])
    about = generate(singer, "la", "", tmp_path / "song.wav", RULE)
    assert about["seconds"] == 0 and about["ended_by_itself"] and about["cut"] is None
    for suffix in (".ecdc", ".npz"):
        assert decode_file(tmp_path / f"song{suffix}", tmp_path / "again.wav") == 0


def test_full_disk_leaves_nothing_under_a_final_name(singer, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="song.wav: cannot be written .No space left on device"):
        generate(singer, "la", "", tmp_path / "song.wav", RULE, 0, LENGTH)
    assert not os.listdir(tmp_path)


def test_a_singer_needs_the_encoders_it_learnt_with(singer_run, encoders, tmp_path):
    other = tiny_folder(tmp_path / "other")
    assert load_singer(singer_run, text_encoder=str(other)).step == 2  # the same weights in another place
    with open(other / "vocab.txt", "a", encoding="utf-8") as vocab:
        vocab.write("\nti")
    with pytest.raises(UserError, match="was trained with another origin of codes or states .text encoder: "):
        load_singer(singer_run, text_encoder=str(other))


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
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    refused(tmp_path / "a.npz", "a.npz is damaged or holds no codes")
    np.savez(tmp_path / "b.npz", codes=np.array([{}]), codec="", fingerprint="")  # a pickle, which is never opened
    refused(tmp_path / "b.npz", "b.npz is damaged or holds no codes")
