"""Meta's container: its bits, its header, its errors."""

import io
import json
import struct
import sys
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from l2m_jax.codec import Codec
from l2m_jax.config import UserError
from l2m_jax.ecdc import read_ecdc, write_ecdc
from l2m_jax.encodec import Encodec, EncodecConfig

MODULE = jax.eval_shape(lambda: Encodec(EncodecConfig(), 2, nnx.Rngs(0)))


def codec(name: str = "solfege", fingerprint: str = "0123456789abcdef") -> Codec:
    """Without weights: the container asks for names and numbers alone."""
    return Codec(name, fingerprint, EncodecConfig(), MODULE)


def codes_of(frames: int, codebooks: int = 2) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 1024, (frames, codebooks), np.int32)


@pytest.mark.parametrize(
    ("samples", "codebooks"), [(0, 2), (1, 2), (320, 1), (321, 3), (6_720, 2), (24_017, 2), (48_000, 32)]
)
def test_what_is_written_is_read(tmp_path, samples, codebooks):
    codes = codes_of(-(-samples // 320), codebooks)
    write_ecdc(tmp_path / "a.ecdc", codes, samples, codec())
    back, length = read_ecdc(tmp_path / "a.ecdc", codec())
    assert back.dtype == np.int32 and length == samples
    np.testing.assert_array_equal(back, codes)


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
    codes, samples = read_ecdc(tmp_path / "a.ecdc", codec("encodec_24khz"))
    assert codes.tolist() == [[513, 3]] and samples == 320


def test_errors_name_the_file_and_the_reason(tmp_path):
    path = tmp_path / "a.ecdc"
    write_ecdc(path, codes_of(10), 3_200, codec())
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.ecdc: holds codes of codec solfege, not of encodec_24khz"):
        read_ecdc(path, codec("encodec_24khz"))
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
@pytest.mark.parametrize("frames", [1, 21, 75, 1_000])
def test_metas_code_reads_ours_and_writes_the_same(tmp_path, monkeypatch, frames):
    """21 frames is one of the lengths for which Meta's reader asks for a frame more than its writer writes."""
    torch = pytest.importorskip("torch")
    compress = import_compress(monkeypatch)
    codes = codes_of(frames)
    write_ecdc(tmp_path / "a.ecdc", codes, frames * 320, codec("encodec_24khz"))
    ours = (tmp_path / "a.ecdc").read_bytes()

    seen = []
    model = SimpleNamespace(
        name="encodec_24khz", segment_length=None, segment_stride=None, sample_rate=24_000, frame_rate=75,
        normalize=False, bits_per_codebook=10, to=lambda device: model,
        encode=lambda wav: [(torch.from_numpy(codes.T[None]), None)],
        decode=lambda frames: seen.extend(frames) or torch.zeros(1, 1, codes.size * 320),
    )  # fmt: skip
    monkeypatch.setitem(compress.MODELS, "encodec_24khz", lambda: model)
    compress.decompress_from_file(io.BytesIO(ours))
    np.testing.assert_array_equal(seen[0][0][0].numpy().T[:frames], codes)

    theirs = compress.compress(model, torch.zeros(1, frames * 320))
    (tmp_path / "b.ecdc").write_bytes(theirs)
    np.testing.assert_array_equal(read_ecdc(tmp_path / "b.ecdc", codec("encodec_24khz"))[0], codes)
    packed = theirs[theirs.index(b"}") + 1 :]
    assert ours[ours.index(b"}") + 1 :][: len(packed)] == packed


def import_compress(monkeypatch):
    """encodec.compress, with an empty torchaudio: of that, encodec needs only what reads files."""
    monkeypatch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "encodec"]:
        monkeypatch.delitem(sys.modules, name)
    return pytest.importorskip("encodec.compress", reason="needs Meta's package: pip install --no-deps encodec")
