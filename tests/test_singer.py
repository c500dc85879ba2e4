"""The model that sings: prompts, streams, batches, and songs that go on from others."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import SUNG
from flax import nnx
from test_bert import tiny_folder

import l2m_jax
from l2m_jax import singer as module
from l2m_jax.codec import decode
from l2m_jax.config import UserError
from l2m_jax.data import Dataset, make_example
from l2m_jax.model import SoundTransformer
from l2m_jax.request import Request
from l2m_jax.singer import PIECE, Stream, decode_growing, decode_song, load, make_prompt, make_task, sing
from l2m_jax.tokens import make_layout


@pytest.fixture(scope="module")
def singer(singer_run):
    return load(singer_run)


@pytest.fixture(scope="module", params=["flatten", "delay"])
def long_singer(request, singer):
    """One that has learnt nothing, with a window of 8 s; it never ends by itself before `min_seconds`."""
    config = dataclasses.replace(SUNG.model, frames=600, layout=request.param)
    return dataclasses.replace(singer, model=SoundTransformer(config, rngs=nnx.Rngs(0)), layout=make_layout(config))


def test_importing_the_package_imports_no_jax():
    code = "import sys, l2m_jax; assert 'jax' not in sys.modules; l2m_jax.load; assert 'jax' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert {name: getattr(l2m_jax, name).__name__ for name in l2m_jax.__all__} == {n: n for n in l2m_jax.__all__}
    with pytest.raises(AttributeError, match="module 'l2m_jax' has no attribute 'lode'"):
        _ = l2m_jax.lode


def test_three_lines_make_a_song(singer_run, tmp_path):
    model = l2m_jax.load(str(singer_run))
    song = model.generate(lyrics="[verse]\nla sol\n", genre="march", seconds=0.4, seed=5, top_k=50)
    song.save(tmp_path / "song.wav")
    assert len(list(tmp_path.iterdir())) == 4
    about = song.about
    assert about["request"] == dataclasses.asdict(
        Request(lyrics="[verse]\nla sol\n", genre="march", seconds=0.4, seed=5, top_k=50)
    )
    assert (about["seconds"], about["limit_s"], about["given_s"], about["step"]) == (0.4, 0.4, 0, 2)
    assert about["codes_sha256"] == hashlib.sha256(song.codes.astype("<i4").tobytes()).hexdigest()
    assert not song.ended and about["cut"] == "the song had not ended at the limit of 0.4 s"
    assert 0 < about["nats_per_code"] < 8 and 0 < about["timings_s"]["first_sound"] <= about["timings_s"]["total"]
    np.testing.assert_array_equal(song.samples, decode(model.codec, song.codes))


def test_the_same_seed_sings_the_same_song(singer):
    a, b, c = (singer.generate("la sol", genre, seconds=0.4, seed=seed).codes for seed, genre in
               ((5, "march"), (5, " MARCH "), (6, "march")))  # fmt: skip
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_prompt_is_what_training_was_shown(singer, sung):
    record = Dataset(sung)[1]
    prompt, _ = make_prompt(singer, record.lyrics, record.genre)
    shown = make_example(record, singer.layout, 12)
    for name in ("kind", "section", "position"):
        np.testing.assert_array_equal(getattr(prompt, name)[0], getattr(shown, name))
    np.testing.assert_allclose(prompt.states[0], shown.states, atol=2e-3)  # those were stored as float16


@pytest.mark.parametrize("frames", [0, 1, 5, 6, 7, 47, 48, 49, 200])
def test_a_stream_decodes_as_if_at_once(singer, frames):
    codes = np.random.default_rng(frames).integers(0, 1024, (frames, 2)).astype(np.int32)
    growing = (codes[:n] for n in (0, 3, 3, 50, 60, 151, 200))
    pieces = list(decode_growing(singer.codec, growing))
    assert [len(piece) for piece, _ in pieces[:-1]] == [PIECE] * (len(pieces) - 1)
    np.testing.assert_array_equal(np.concatenate([codes[:0], *(piece for piece, _ in pieces)]), codes)
    samples = np.concatenate([np.zeros(0, np.float32), *(samples for _, samples in pieces)])
    whole = decode(singer.codec, codes)
    assert samples.shape == whole.shape
    np.testing.assert_array_equal(samples, decode_song(singer.codec, codes))  # of files and batches: to the bit
    error = np.abs(samples - whole).max(initial=0)
    print(f"stream of {frames} frames: error {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


def test_a_stream_comes_in_pieces_and_is_the_song(long_singer):
    stream = long_singer.stream("la", "march", seconds=4, min_seconds=4, seed=3)
    assert stream.limit == 4 and not len(stream.song().codes)
    pieces = list(stream)
    song = stream.song()
    assert [len(codes) for codes, _ in pieces] == [PIECE] * 6 + [12] and not list(stream)
    np.testing.assert_array_equal(np.concatenate([codes for codes, _ in pieces]), song.codes)
    np.testing.assert_array_equal(np.concatenate([samples for _, samples in pieces]), song.samples)
    assert np.abs(song.samples - decode(long_singer.codec, song.codes)).max() < 1e-5
    again = long_singer.generate("la", "march", seconds=4, min_seconds=4, seed=3)
    np.testing.assert_array_equal(again.codes, song.codes)
    np.testing.assert_array_equal(again.samples, song.samples)


def test_a_stream_that_is_stopped_is_a_song_so_far(long_singer):
    whole = long_singer.generate("la", seconds=8, min_seconds=8)
    by = []
    stream = long_singer.stream("la", seconds=8, min_seconds=8, stopped=lambda: by[-1] if by else "")
    next(iter(stream))
    left = stream.song()  # even if nobody asks for more
    assert len(left.codes) == PIECE and left.about["nats_per_code"] is None
    assert left.about["cut"] == "stopped by its listener after 0.6 s"
    by.append("SIGINT")
    rest = list(stream)
    song = stream.song()
    assert 0 < song.about["nats_per_code"] < 8 and song.about["stopped_by"] == "SIGINT"
    assert rest and PIECE < len(song.codes) < 600 and len(song.samples) == 320 * len(song.codes)
    np.testing.assert_array_equal(song.codes, whole.codes[: len(song.codes)])
    assert not song.ended and song.about["cut"] == f"stopped by SIGINT after {song.seconds:.1f} s"


def test_a_codec_that_does_not_stream_is_stopped_too(long_singer, monkeypatch):
    """And its seconds are those of the sound: where segments overlap a second has more frames than its segment."""

    def at_the_end(codec, growing):
        *_, codes = growing
        yield codes, decode(codec, codes)

    whole = long_singer.generate("la", seconds=8, min_seconds=8)
    monkeypatch.setattr("l2m_jax.singer.decode_growing", at_the_end)
    monkeypatch.setattr(type(long_singer.codec), "pace", 80.0)
    stream = long_singer.stream("la", seconds=7.5, min_seconds=7.5, stopped=lambda: "SIGTERM")
    (codes, samples), song = *stream, stream.song()
    assert 0 < len(codes) < 600 and len(samples) == 320 * len(codes) and song.about["limit_s"] == 7.5
    np.testing.assert_array_equal(codes, whole.codes[: len(codes)])
    assert song.about["cut"] == f"stopped by SIGTERM after {song.seconds:.1f} s"


def test_compiling_is_told_apart(long_singer):
    """A control that no song had before makes another program; the second song has it."""
    first, second = (long_singer.generate("la", seconds=1, min_p=0.011, repetition_penalty=1.1) for _ in range(2))
    assert first.about["timings_s"]["total"] > first.about["timings_s"]["compiling"] > 0
    assert second.about["timings_s"]["compiling"] == 0


def test_a_song_goes_on_from_another(long_singer, tmp_path):
    first = long_singer.generate("la", seconds=1, min_seconds=1)
    first.save(tmp_path / "a.wav")
    for name, kept in (("a.ecdc", 75), ("a.npz", 75), ("a.wav", 75)):
        song = long_singer.generate("do", seconds=2, min_seconds=2, prompt=str(tmp_path / name))
        assert (len(song.codes), song.about["given_s"], song.seconds) == (150, 1, 2)
        if name != "a.wav":
            np.testing.assert_array_equal(song.codes[:kept], first.codes)
    song = long_singer.generate("do", seconds=2, min_seconds=2, prompt=str(tmp_path / "a.ecdc"), from_seconds=0.4)
    np.testing.assert_array_equal(song.codes[:30], first.codes[:30])
    assert song.about["given_s"] == 0.4 and not np.array_equal(song.codes[:75], first.codes)
    assert 0 < song.about["nats_per_code"] < 8


def test_songs_of_a_batch_keep_their_own_limits_and_prompts(long_singer, tmp_path):
    long_singer.generate("la", seconds=1, min_seconds=1).save(tmp_path / "a.wav")
    prompt = str(tmp_path / "a.npz")
    requests = [
        Request(lyrics="la", seconds=1, min_seconds=1, seed=1),
        Request(lyrics="do", seconds=2, min_seconds=2, top_k=3),
        Request(lyrics="re", seconds=2, min_seconds=1.5, prompt=prompt),
        Request(lyrics="mi", seconds=3, min_seconds=3, prompt=prompt, from_seconds=0.2, seed=9),
        Request(lyrics="la", seconds=2, min_seconds=2, seed=1),
    ]
    songs = long_singer.generate_batch(requests, batch=2)
    assert [song.about["request"]["lyrics"] for song in songs] == ["la", "do", "re", "mi", "la"]
    assert [song.seconds for song in songs[:2]] == [1, 2] and 1.5 <= songs[2].seconds <= 2 and songs[3].seconds == 3
    given = np.load(prompt)["codes"]
    np.testing.assert_array_equal(songs[2].codes[:75], given)
    np.testing.assert_array_equal(songs[3].codes[:15], given[:15])
    np.testing.assert_array_equal(songs[0].codes, songs[4].codes[:75])  # one seed, one batch, two limits
    for song in songs:
        np.testing.assert_allclose(song.samples, decode(long_singer.codec, song.codes), atol=1e-5)
    assert long_singer.generate_batch([]) == []


def test_a_batch_that_is_stopped_is_songs_so_far(long_singer):
    tasks = [make_task(long_singer, Request(lyrics="la", min_seconds=8, seed=seed)) for seed in range(2)]
    shares = []
    songs = sing(long_singer, tasks, shares.append, lambda: "SIGTERM" if shares[-1] > 0.2 else "")
    assert shares == sorted(shares) and 0.2 < shares[-1] < 1
    assert all(0 < song.seconds < 8 and song.about["cut"].startswith("stopped by SIGTERM after") for song in songs)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lyrics": " \n"}, "lyrics: no words; write the lyrics there, or .instrumental."),
        ({"lyrics": "la " * 13}, "13 lyric pieces and 1 genre pieces are 2 more than the 12 that the memory holds"),
        ({"lyrics": "la \udcff"}, "lyrics: not UTF-8"),
        ({"genre": "\udcff"}, "is not UTF-8"),
        ({"seconds": 0.81}, "the length limit is 0.81 s; allowed: up to the model's window of 0.8 s"),
        ({"seconds": 1e300}, "the length limit is 1e.300 s"),
        ({"seconds": None, "min_seconds": 0.9}, "min-seconds is 0.9 s; allowed: up to the model's window of 0.8 s"),
        ({"prompt": "lost.wav"}, "lost.wav: no such file"),
        ({"prompt": "PROMPT"}, "the 0.5.* s of it that are kept leave nothing to sing within 0.4 s: keep less with"),
        ({"prompt": "PROMPT", "from_seconds": 0.6}, "from 0.6: .*a.npz holds 0.533333 s; allowed: up to there"),
    ],
)
def test_what_cannot_be_sung_is_said(singer, tmp_path, change, says):
    np.savez(
        tmp_path / "a.npz", codes=np.zeros((40, 2), np.int16), codec="solfege", fingerprint=singer.codec.fingerprint
    )
    if change.get("prompt") == "PROMPT":
        change = change | {"prompt": str(tmp_path / "a.npz")}
    with pytest.raises(UserError, match=says) as caught:
        Stream(singer, Request(**({"lyrics": "la", "genre": "march", "seconds": 0.4} | change)))
    assert "\n" not in str(caught.value)


def test_far_too_long_lyrics_are_refused_before_they_are_encoded(singer, monkeypatch):
    monkeypatch.setattr(module, "encode_text", lambda *args: pytest.fail("encoded"))
    with pytest.raises(UserError, match="200000 lyric pieces and 0 genre pieces are 199988 more than the 12"):
        make_prompt(singer, "la\n" * 200_000, "")


def test_what_is_only_odd_is_a_warning(singer):
    tag, genre, *_ = singer.generate("[laughs]\n🌙💃🏽\u200b la\n", "Polka 🎵", seconds=0.4).about["warnings"]
    assert "section tag [laughs] is not known, taken as [other]" in tag
    assert f"genre 'polka 🎵' was in no training song (those were: {', '.join(singer.info.genres)})" in genre


def test_a_song_that_ends_at_once_is_still_a_song(singer, tmp_path, monkeypatch):
    empty = module.sample.Song(np.zeros((0, 2), np.int32), True, -1.0)
    monkeypatch.setattr(module, "sung", lambda *args: iter([[empty]]))
    song = singer.generate("la")
    song.save(tmp_path / "song.wav")
    assert song.seconds == 0 and song.ended and song.about["cut"] is None


def test_a_singer_needs_the_encoders_it_learnt_with(singer_run, encoders, tmp_path):
    other = tiny_folder(tmp_path / "other")
    assert load(singer_run, text_encoder=str(other)).step == 2  # the same weights in another place
    with open(other / "vocab.txt", "a", encoding="utf-8") as vocab:
        vocab.write("\nti")
    with pytest.raises(UserError, match="was trained with another origin of codes or states .text encoder: "):
        load(singer_run, text_encoder=str(other))
