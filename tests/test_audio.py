"""Audio files in and out."""

import resource
import signal
import wave

import numpy as np
import pytest
import soundfile

from l2m_jax.audio import audio_seconds, pcm16, read_audio, wav_header, write_atomic, write_wav
from l2m_jax.config import UserError


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """440 Hz in the first channel, silence in the others."""
    samples = np.zeros((int(seconds * rate), channels), np.float32)
    samples[:, 0] = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / rate)
    return samples


@pytest.mark.parametrize(("kind", "rate", "channels"), [
    ("wav", 44_100, 2), ("flac", 48_000, 1), ("ogg", 44_100, 2), ("mp3", 32_000, 2), ("wav", 8_000, 6),
    ("wav", 24_000, 1),
])  # fmt: skip
def test_reads_any_format_rate_and_channels(tmp_path, kind, rate, channels):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, tone(2, rate, channels), rate)
    samples = read_audio(path, 24_000)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 48_000) < 3_000 and abs(audio_seconds(path) - 2) < 0.1  # mp3 and ogg pad
    expected = 0.5 / channels * np.sin(2 * np.pi * 440 * np.arange(48_000) / 24_000)
    middle = slice(12_000, 36_000)
    shift = int(np.argmax([np.dot(samples[12_000 + s : 36_000 + s], expected[middle]) for s in range(55)]))
    error = np.abs(samples[12_000 + shift : 36_000 + shift] - expected[middle]).max()
    print(f"{kind}: error {error:.1e}, tolerance 5e-02 (a 55th of a period, and lossy formats)")
    assert error < 0.05


def test_long_files_are_read_whole(tmp_path):
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, 600_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 24_000, "FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 24_000), noise)


@pytest.mark.parametrize(("kind", "layout"), [
    ("wav", None), ("wav", "WAVEX"), ("wav", "RF64"), ("flac", None), ("mp3", None), ("ogg", None),
])  # fmt: skip
def test_a_file_cut_short_is_an_error(tmp_path, kind, layout):
    path = tmp_path / f"a.{kind}"
    noise = np.random.default_rng(0).normal(0, 0.1, (120_000, 2))
    soundfile.write(path, noise, 24_000, format=layout)
    assert len(read_audio(path, 24_000)) >= 120_000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a\.{kind}: (cut short|corrupt)"):
        read_audio(path, 24_000)


@pytest.mark.parametrize("quiet_first", [True, False])
def test_an_mp3_without_an_index_is_read_to_its_end(tmp_path, quiet_first):
    """Where bit rates vary, the first one tells nothing of the length; nor does a picture in the tags before it."""
    path, noise = tmp_path / "a.mp3", np.random.default_rng(0).normal(0, 0.2, 120_000)
    sound = np.concatenate([np.zeros(120_000), noise][:: 1 if quiet_first else -1])
    soundfile.write(path, sound, 24_000, bitrate_mode="VARIABLE", compression_level=0.3)
    content = path.read_bytes()
    index = content.index(b"Xing")
    frame = content.index(content[:2], index)  # the index is a frame of its own
    picture = b"ID3\x03\0\0" + bytes([0, 6, 0, 0]) + bytes(6 << 14)
    path.write_bytes(picture + content[frame:])
    assert abs(soundfile.info(path).duration - 10) > 1, "libsndfile knows by itself"
    samples = read_audio(path, 24_000)
    assert abs(len(samples) - 240_000) < 2 * 1152
    halves = [float(np.std(half)) for half in (samples[20_000:100_000], samples[140_000:220_000])]
    assert halves == pytest.approx([0, 0.2] if quiet_first else [0.2, 0], abs=0.02)


def test_two_mp3_in_one_file_are_an_error(tmp_path):
    """The first one's index says nothing of the other, which would be left out."""
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 120_000), 24_000)
    once = path.read_bytes()
    path.write_bytes(once + b"TAG" + bytes(125))
    assert len(read_audio(path, 24_000)) == 120_000
    path.write_bytes(once + once)
    with pytest.raises(UserError, match=r"a\.mp3: after the 5\.0 s that it says, about 5 s follow"):
        read_audio(path, 24_000)


def test_a_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 240_000), 24_000)
    content = bytearray(path.read_bytes())
    content[200_000:205_000] = bytes(5_000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.flac: corrupt audio after \d+\.\d s"):
        read_audio(path, 24_000)


def test_a_wav_of_unknown_length_is_read(tmp_path):
    """Programs that write a WAV into a pipe leave the largest length in its header."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1, 24_000), 24_000)
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert len(read_audio(path, 24_000)) == 24_000


@pytest.mark.parametrize(("samples", "channels"), [(0, 1), (1, 1), (24_000, 1), (24_000, 2)])
def test_a_streamed_wav_is_whole_wherever_it_ends(tmp_path, samples, channels):
    sound = 1.5 * tone(1, 24_000, channels)[:samples]  # clipped as write_wav does
    sound = sound if channels > 1 else sound[:, 0]
    (tmp_path / "a.wav").write_bytes(wav_header(24_000, channels) + pcm16(sound[:100]) + pcm16(sound[100:]))
    write_wav(tmp_path / "b.wav", sound, 24_000)
    streamed, written = (soundfile.read(tmp_path / name, dtype="int16") for name in ("a.wav", "b.wav"))
    assert streamed[1] == written[1] == 24_000
    np.testing.assert_array_equal(streamed[0], written[0])
    if samples:
        assert read_audio(tmp_path / "a.wav", 24_000, channels).shape == sound.shape
    with wave.open(str(tmp_path / "a.wav")) as file:  # a reader that is not libsndfile
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (channels, 2, 24_000)


def test_what_is_no_sound_is_an_error(tmp_path):
    (tmp_path / "empty.mp3").touch()
    (tmp_path / "text.mp3").write_text("la la la " * 100)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 24_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, 0.5, np.nan] * 8_000), 24_000, "FLOAT")
    for name, reason in {
        "missing.mp3": "no such audio file", "empty.mp3": "empty", "text.mp3": "cannot be read as mp3",
        "none.wav": "no sound", "nan.wav": r"sample at 0\.000 s is NaN",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"{name}.*{reason}"):
            read_audio(tmp_path / name, 24_000)


def test_wav_is_16_bit_mono_and_clipped(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, np.array([0, 0.5, -0.5, 3, -3], np.float32), 24_000)
    info = soundfile.info(path)
    assert (info.subtype, info.channels, info.samplerate) == ("PCM_16", 1, 24_000)
    np.testing.assert_allclose(soundfile.read(path)[0], [0, 0.5, -0.5, 1, -1], atol=1 / 32_767)
    with pytest.raises(UserError, match="2 samples are NaN or infinite"):
        write_wav(path, np.array([0, np.inf, np.nan]), 24_000)
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"old")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        with pytest.raises(UserError, match=r"a\.wav: cannot be written"):
            write_wav(path, np.zeros(24_000, np.float32), 24_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.wav", b"old")]
    with pytest.raises(UserError, match="cannot be written .File exists"):
        write_atomic(tmp_path / "a.wav" / "b.wav", b"")


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_two_channels_are_the_first_two(tmp_path, channels):
    sound = np.stack([np.full(2_400, 0.1 * (side + 1), np.float32) for side in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", sound, 24_000, "FLOAT")
    stereo = read_audio(tmp_path / "a.wav", 24_000, channels=2)
    np.testing.assert_array_equal(stereo, sound[:, [0, min(1, channels - 1)]])
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 24_000), sound.mean(axis=1), rtol=1e-6)
    write_wav(tmp_path / "b.wav", stereo, 24_000)
    assert np.abs(read_audio(tmp_path / "b.wav", 24_000, channels=2) - stereo).max() < 2**-15
