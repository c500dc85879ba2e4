"""Meta's container for EnCodec codes, `.ecdc`, as `encodec.compress` writes it without its language model. After codec.

A header (magic, version, JSON), then the codes frame by frame, log2 V bits each, low bits first; of a segmented codec,
for each segment its scale and its codes, which begin with a byte. Meta's own reader takes `encodec_24khz` and
`encodec_48khz`, by name; codes of another codec carry that codec's name. The key `fp`, the fingerprint of the weights,
is ours: Meta's reader passes over it.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from l2m_jax.audio import write_atomic
from l2m_jax.codec import Codec
from l2m_jax.config import UserError
from l2m_jax.segments import SCALE, segment_lengths

_HEAD = struct.Struct("!4sBI")  # magic, version, bytes of the JSON
_SCALE = struct.Struct("!f")


class Packed(NamedTuple):
    """What a file holds."""

    codes: Int[np.ndarray, "F K"]
    samples: int
    """Of the sound that they stand for."""
    scales: Float[np.ndarray, " N"] | None
    """Of a codec that has some: the loudness of each segment."""


def write_ecdc(
    path: str | Path,
    codes: Int[np.ndarray, "F K"],
    samples: int,
    codec: Codec,
    scales: Float[np.ndarray, " N"] | None = None,
) -> None:
    """Writes codes of a sound of `samples` samples, whole or not at all; F = ceil(samples / hop), of each segment.

    A codec that has scales, and codes without them (a language model's): all segments are of one loudness.
    """
    lengths = _signals(samples, codec)
    frames = [-(-length // codec.hop) for length in lengths]
    if len(codes) != sum(frames):
        raise UserError(f"{path}: {len(codes)} frames of codes; {samples} samples are {sum(frames)}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.entries:
        raise UserError(f"{path}: codes go from {codes.min()} to {codes.max()}; allowed: 0 to {codec.entries - 1}")
    if scales is None:
        scales = np.full(len(lengths), SCALE, np.float32)
    if len(scales) != len(lengths):
        raise UserError(f"{path}: {len(scales)} scales; {samples} samples are {len(lengths)} segments")
    header = {"m": codec.name, "al": samples, "nc": codes.shape[1], "lm": False, "fp": codec.fingerprint}
    described = json.dumps(header).encode()
    content = [_HEAD.pack(b"ECDC", 0, len(described)), described]
    for length, scale, part in zip(lengths, scales, np.split(codes, np.cumsum(frames)[:-1])):
        # A frame more for few lengths, where Meta's reader expects it: a causal decoder is not touched by it.
        padded = np.pad(part, ((0, _frames_of_meta(length, codec) - len(part)), (0, 0)), mode="edge")
        bits = padded.reshape(-1, 1) >> np.arange(codec.config.bits) & 1
        content += [_SCALE.pack(scale)] if codec.config.normalize else []
        content += [np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()]
    write_atomic(path, b"".join(content))


def read_ecdc(path: str | Path, codec: Codec) -> Packed:
    """Codes, int32, of however many codebooks; the number of samples of the sound that they stand for; scales.

    UserError where the file is damaged, was packed with Meta's language model, or holds codes of another codec.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    header, payload = _read_header(path, content)
    if header["lm"]:
        raise UserError(
            f"{path}: was packed with Meta's language model (lm), which is not supported; pack it with use_lm=False"
        )
    made = header.get("fp")
    if header["m"] != codec.name and made != codec.fingerprint:
        raise UserError(
            f"{path}: holds codes of codec {header['m']}, not of {codec.name}; name it with --codec: a folder or file"
            " of that name, or its hub id such as facebook/encodec_24khz"
        )
    if made not in (None, codec.fingerprint):
        raise UserError(f"{path}: was made with other weights of {codec.name} ({made}; here {codec.fingerprint})")
    samples, codebooks, bits = header["al"], header["nc"], codec.config.bits
    per_frame, ahead = codebooks * bits, _SCALE.size if codec.config.normalize else 0
    least = -(-samples // codec.hop) * per_frame // 8  # first: a damaged length may be huge
    lengths = _signals(samples, codec) if least <= len(payload) else []
    frames = [-(-length // codec.hop) for length in lengths]
    sizes = [ahead - (-count * per_frame // 8) for count in frames]
    # Our files have a frame more where Meta's reader asks for it, in the last segment; Meta's have not.
    more = ahead - (-_frames_of_meta(lengths[-1], codec) * per_frame // 8) - sizes[-1] if lengths else 0
    if least > len(payload) or not sum(sizes) <= len(payload) <= sum(sizes) + more:
        raise UserError(
            f"{path}: has {len(payload)} bytes of codes; {samples} samples need {sum(sizes) or least}: damaged or cut"
            " short"
        )
    parts = [np.zeros((0, codebooks), np.int32)]
    scales = []
    for count, end, size in zip(frames, np.cumsum(sizes), sizes):
        part = payload[end - size : end]
        scales += _SCALE.unpack(part[:ahead]) if ahead else []
        unpacked = np.unpackbits(np.frombuffer(part[ahead:], np.uint8), count=count * per_frame, bitorder="little")
        values = unpacked.reshape(-1, bits).astype(np.int32) << np.arange(bits, dtype=np.int32)
        parts.append(values.sum(axis=1, dtype=np.int32).reshape(count, codebooks))
    if not np.isfinite(scales).all():
        raise UserError(f"{path}: a segment's scale is no number: damaged")
    return Packed(np.concatenate(parts), samples, np.array(scales, np.float32) if ahead else None)


def _signals(samples: int, codec: Codec) -> list[int]:
    """Lengths, in samples, of the signals that a sound is packed as: its segments, or itself."""
    if not codec.streams:
        return segment_lengths(samples, codec.config)
    return [samples] if samples else []


def _read_header(path: str | Path, content: bytes) -> tuple[dict, bytes]:
    if len(content) < _HEAD.size or content[:4] != b"ECDC":
        raise UserError(f"{path}: is not an .ecdc file")
    _, version, size = _HEAD.unpack_from(content)
    described, payload = content[_HEAD.size : _HEAD.size + size], content[_HEAD.size + size :]
    if version != 0 or len(described) < size:
        raise UserError(f"{path}: is cut short, or of version {version} (0 is supported)")
    try:
        header = json.loads(described)
        valid = isinstance(header["m"], str) and header["al"] >= 0 and header["nc"] >= 1 and "lm" in header
        valid = valid and isinstance(header["al"], int) and isinstance(header["nc"], int)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{path}: its header is damaged: {described[:80]!r}")
    return header, payload


def _frames_of_meta(samples: int, codec: Codec) -> int:
    """Frames that Meta's reader asks for: it rounds up a product of floats, and so at times asks for one too many."""
    return math.ceil(samples / codec.rate * codec.frame_rate)
