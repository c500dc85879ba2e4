"""Meta's container for EnCodec codes, `.ecdc`, as `encodec.compress` writes it without its language model. After codec.

A header (magic, version, JSON), then the codes frame by frame, log2 V bits each, low bits first. Meta's own reader
takes `encodec_24khz` alone, by name; codes of another codec carry that codec's name. The key `fp`, the fingerprint of
the weights, is ours: Meta's reader passes over it.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Int

from l2m_jax.audio import write_atomic
from l2m_jax.codec import Codec
from l2m_jax.config import UserError

_HEAD = struct.Struct("!4sBI")  # magic, version, bytes of the JSON


def write_ecdc(path: str | Path, codes: Int[np.ndarray, "F K"], samples: int, codec: Codec) -> None:
    """Writes codes of a sound of `samples` samples, whole or not at all; F = ceil(samples / hop)."""
    if len(codes) != -(-samples // codec.hop):
        raise UserError(f"{path}: {len(codes)} frames of codes; {samples} samples are {-(-samples // codec.hop)}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.entries:
        raise UserError(f"{path}: codes go from {codes.min()} to {codes.max()}; allowed: 0 to {codec.entries - 1}")
    header = {"m": codec.name, "al": samples, "nc": codes.shape[1], "lm": False, "fp": codec.fingerprint}
    described = json.dumps(header).encode()
    # A frame more for one length in twenty, where Meta's reader expects it; being causal, the decoder is not touched.
    padded = np.pad(codes, ((0, _frames_of_meta(samples, codec) - len(codes)), (0, 0)))
    bits = padded.reshape(-1, 1) >> np.arange(codec.config.bits) & 1
    packed = np.packbits(bits.astype(np.uint8), bitorder="little")
    write_atomic(path, _HEAD.pack(b"ECDC", 0, len(described)) + described + packed.tobytes())


def read_ecdc(path: str | Path, codec: Codec) -> tuple[Int[np.ndarray, "F K"], int]:
    """Codes, int32, and the number of samples of the sound that they stand for.

    UserError where the file is damaged, was packed with Meta's language model, or holds codes of another codec.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    header, payload = _read_header(path, content)
    if header["lm"]:
        raise UserError(f"{path}: was packed with Meta's language model (lm), which is not supported; pack it without")
    if header["m"] != codec.name:
        raise UserError(f"{path}: holds codes of codec {header['m']}, not of {codec.name}; give that codec")
    made = header.get("fp", codec.fingerprint)
    if made != codec.fingerprint:
        raise UserError(f"{path}: was made with other weights of {codec.name} ({made}; here {codec.fingerprint})")
    samples, codebooks, bits = header["al"], header["nc"], codec.config.bits
    frames = -(-samples // codec.hop)
    needed, most = (-(-count * codebooks * bits // 8) for count in (frames, _frames_of_meta(samples, codec)))
    if not needed <= len(payload) <= most:
        raise UserError(
            f"{path}: has {len(payload)} bytes of codes; {samples} samples need {needed}: damaged or cut short"
        )
    unpacked = np.unpackbits(np.frombuffer(payload, np.uint8), count=frames * codebooks * bits, bitorder="little")
    values = unpacked.reshape(-1, bits).astype(np.int32) << np.arange(bits, dtype=np.int32)
    return values.sum(axis=1, dtype=np.int32).reshape(frames, codebooks), samples


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
