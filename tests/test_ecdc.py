"""Meta's container: its bits, its header, its errors."""

import importlib
import json
import struct

import jax
import numpy as np
import pytest
from flax import nnx
from originals import music
from test_codec import check, relative

from l2m_jax.audio import read_audio
from l2m_jax.codec import Codec, decode, encode_scaled
from l2m_jax.config import UserError
from l2m_jax.ecdc import read_ecdc, write_ecdc
from l2m_jax.encodec import PUBLISHED, Encodec, EncodecConfig
from l2m_jax.generate import decode_file
from l2m_jax.segments import SCALE, segment_lengths
from l2m_jax.weights import load_codec

MODULE = jax.eval_shape(lambda: Encodec(EncodecConfig(), 2, nnx.Rngs(0)))


def codec(name: str = "solfege", fingerprint: str = "0123456789abcdef") -> Codec:
    """Without weights: the container asks for names and numbers alone."""
    return Codec(name, fingerprint, EncodecConfig(), MODULE)


def stereo() -> Codec:
    """encodec_48khz, without weights."""
    return Codec("encodec_48khz", "0123456789abcdef", PUBLISHED["encodec_48khz"], MODULE)


def codes_of(frames: int, codebooks: int = 2) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 1024, (frames, codebooks), np.int32)


@pytest.mark.parametrize(
    ("samples", "codebooks"), [(0, 2), (1, 2), (320, 1), (321, 3), (6_720, 2), (24_017, 2), (48_000, 32)]
)
def test_what_is_written_is_read(tmp_path, samples, codebooks):
    codes = codes_of(-(-samples // 320), codebooks)
    write_ecdc(tmp_path / "a.ecdc", codes, samples, codec())
    back, length, scales = read_ecdc(tmp_path / "a.ecdc", codec())
    assert back.dtype == np.int32 and length == samples and scales is None
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("samples", [0, 1, 6_720, 47_520, 47_521, 47_680, 48_000, 95_041, 200_000])
def test_segments_go_with_their_scales(tmp_path, samples):
    lengths = segment_lengths(samples, PUBLISHED["encodec_48khz"])
    codes = codes_of(sum(-(-length // 320) for length in lengths))
    scales = np.linspace(0.1, 0.2, len(lengths), dtype=np.float32)
    write_ecdc(tmp_path / "a.ecdc", codes, samples, stereo(), scales)
    back, length, found = read_ecdc(tmp_path / "a.ecdc", stereo())
    assert length == samples
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(found, scales)
    write_ecdc(tmp_path / "a.ecdc", codes, samples, stereo())
    np.testing.assert_array_equal(read_ecdc(tmp_path / "a.ecdc", stereo()).scales, np.full(len(lengths), SCALE, "f4"))
    with pytest.raises(UserError, match="scales"):
        write_ecdc(tmp_path / "b.ecdc", codes, samples, stereo(), np.ones(len(lengths) + 1, np.float32))


def test_files_of_segments_cut_short_or_damaged(tmp_path):
    path = tmp_path / "a.ecdc"
    write_ecdc(path, codes_of(200), 48_000 + 15_520, stereo())
    content = path.read_bytes()
    nan = struct.pack("!f", SCALE)
    for damaged, reason in {
        content[:-1]: "cut short", content[:300]: "cut short", content + b"x": "damaged",
        content.replace(b'"al": 63520, "nc": 2', b'"al":9999999,"nc": 2'): "cut short",
        content.replace(nan, struct.pack("!f", np.nan)): "scale is no number",
    }.items():  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.ecdc: .*{reason}"):
            read_ecdc(path, stereo())


def test_the_bytes_are_those_of_the_format(tmp_path):
    """Two codes of 10 bits, low bits first: 0b1000000001, 0b0000000011 -> 00000001, 00001110, 0000."""
    write_ecdc(tmp_path / "a.ecdc", np.array([[513, 3]]), 320, codec("encodec_24khz"))
    content = (tmp_path / "a.ecdc").read_bytes()
    magic, version, size = struct.unpack("!4sBI", content[:9])
    header = json.loads(content[9 : 9 + size])
    assert (magic, version) == (b"ECDC", 0)
    assert header == {"m": "encodec_24khz", "al": 320, "nc": 2, "lm": False, "fp": "0123456789abcdef"}
    assert content[9 + size :] == bytes([0b00000001, 0b00001110, 0])


def test_metas_own_files_have_no_fingerprint(tmp_path):
    header = json.dumps({"m": "encodec_24khz", "al": 320, "nc": 2, "lm": False}).encode()
    content = struct.pack("!4sBI", b"ECDC", 0, len(header)) + header + bytes([0b00000001, 0b00001110, 0])
    (tmp_path / "a.ecdc").write_bytes(content)
    codes, samples, _ = read_ecdc(tmp_path / "a.ecdc", codec("encodec_24khz"))
    assert codes.tolist() == [[513, 3]] and samples == 320


def test_errors_name_the_file_and_the_reason(tmp_path):
    path = tmp_path / "a.ecdc"
    write_ecdc(path, codes_of(10), 3_200, codec())
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.ecdc: holds codes of codec solfege, not of encodec_24khz.*--codec"):
        read_ecdc(path, codec("encodec_24khz", "another"))
    assert len(read_ecdc(path, codec("my_copy")).codes) == 10  # the weights count, not the name of their folder
    with pytest.raises(UserError, match=r"a\.ecdc: was made with other weights"):
        read_ecdc(path, codec(fingerprint="another"))
    for damaged, reason in {
        content[:-1]: "damaged or cut short", content + bytes(9): "damaged or cut short", content[:20]: "cut short",
        b"RIFF" + content[4:]: "is not an .ecdc", content[:5]: "is not an .ecdc", b"": "is not an .ecdc",
        content.replace(b'"nc": 2', b'"nc": 0'): "header is damaged",
        content.replace(b'"al"', b'"xx"'): "header is damaged", content.replace(b"{", b"\xff"): "header is damaged",
        content.replace(b'"lm": false', b'"lm": true '): "not supported",
    }.items():  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.ecdc: .*{reason}"):
            read_ecdc(path, codec())
    with pytest.raises(UserError, match=r"missing\.ecdc: cannot be read"):
        read_ecdc(tmp_path / "missing.ecdc", codec())
    for codes, samples in ((codes_of(10), 3_201), (codes_of(10) + 1024, 3_200)):
        with pytest.raises(UserError, match=r"b\.ecdc: .*codes"):
            write_ecdc(tmp_path / "b.ecdc", codes, samples, codec())
    assert not (tmp_path / "b.ecdc").exists()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "samples"),
    [("encodec_24khz", 6_720), ("encodec_24khz", 24_500), ("encodec_48khz", 47_620), ("encodec_48khz", 48_700)],
)
def test_metas_reader_and_writer_understand_ours(originals, tmp_path, monkeypatch, name, samples):
    """6,720 is one of the lengths for which Meta's reader asks for a frame more than its writer writes."""
    torch = pytest.importorskip("torch")
    meta, _, th, _ = originals(name)
    compress = importlib.import_module("encodec.compress")
    monkeypatch.setitem(compress.MODELS, name, lambda: meta)
    codec, sound = load_codec(str(th)), music(samples, meta.sample_rate, meta.channels)
    song = encode_scaled(codec, sound)
    wave = decode(codec, song.codes, scales=song.scales)[:samples]
    assert len(wave) == samples
    write_ecdc(tmp_path / "ours.ecdc", song.codes, samples, codec, song.scales)
    theirs, rate = compress.decompress((tmp_path / "ours.ecdc").read_bytes())
    assert rate == codec.rate
    check(f"{name}: their waveform of our file", relative(wave, theirs.T.numpy().reshape(wave.shape)), 1e-4)

    meta.set_target_bandwidth(meta.target_bandwidths[0])
    given = torch.from_numpy(sound.reshape(samples, -1).T)
    (tmp_path / "theirs.ecdc").write_bytes(compress.compress(meta, given, use_lm=False))
    codes, length, scales = read_ecdc(tmp_path / "theirs.ecdc", codec)
    assert length == samples
    check(f"{name}: codes of their file unlike ours", float(np.mean(codes != song.codes)), 1e-3)
    if song.scales is not None:
        np.testing.assert_allclose(scales, song.scales, rtol=1e-6)
    decode_file(tmp_path / "theirs.ecdc", tmp_path / "out.wav", str(th))
    heard = read_audio(tmp_path / "out.wav", codec.rate, codec.channels)
    check(f"{name}: our WAV of their file", float(np.abs(heard - np.clip(wave, -1, 1)).max()), 2**-14)
    with pytest.raises(UserError, match=f"codes of codec {name}, not of solfege; name it with --codec"):
        decode_file(tmp_path / "theirs.ecdc", tmp_path / "out.wav")
