"""Sound <-> codes, whole songs in chunks of bounded memory. After audio and encodec in the flow; weights.py loads it.

Codes are int32 [F, K] and sounds float32 [T], NumPy on both sides: one song at a time, any length, one compilation.

Letters: B batch, T samples, F frames, K codebooks, V entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from l2m_jax.config import UserError
from l2m_jax.encodec import Encodec, EncodecConfig, State

CHUNK = 768  # frames at a time: 10 s of sound
SHORTEST = 96  # frames of the smallest shape that is compiled


@dataclasses.dataclass(frozen=True)
class Codec:
    """A loaded codec."""

    name: str
    """Short name, e.g. solfege or encodec_24khz."""
    fingerprint: str
    """Of its published weights (all codebooks); data made with one codec is refused with another."""
    config: EncodecConfig
    module: Encodec

    @property
    def rate(self) -> int:
        """Samples a second."""
        return self.config.sampling_rate

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return self.config.hop

    @property
    def frame_rate(self) -> int:
        """Frames a second."""
        return self.config.frame_rate

    @property
    def codebooks(self) -> int:
        """K."""
        return self.module.codebooks.shape[0]

    @property
    def entries(self) -> int:
        """V."""
        return self.config.codebook_size


def encode(codec: Codec, samples: Float[np.ndarray, " T"], chunk: int = CHUNK) -> Int[np.ndarray, "F K"]:
    """Codes, int32, of a mono signal at the codec's rate; F = ceil(T / hop). `chunk` frames are in memory at once."""
    state = State.first(codec.module.encoder, 1)
    codes = [np.zeros((0, codec.codebooks), np.int32)]
    for piece, valid in _chunks(np.asarray(samples, np.float32), chunk, codec.hop):
        found, state = _encode_chunk(codec.module, piece[None], np.int32(valid), state)
        codes.append(np.asarray(found[0, : -(-valid // codec.hop)]))
    return np.concatenate(codes)


def decode(codec: Codec, codes: Int[np.ndarray, "F K"], chunk: int = CHUNK) -> Float[np.ndarray, " T"]:
    """Samples in about [-1, 1] at the codec's rate; T = F x hop. `chunk` frames are in memory at once."""
    _check(codec, codes)
    state = decoder_state(codec)
    samples = [np.zeros(0, np.float32)]
    for piece, valid in _chunks(np.asarray(codes, np.int32), chunk, 1):
        found, state = _decode_chunk(codec.module, piece[None], np.int32(valid), state)
        samples.append(np.asarray(found[0, : valid * codec.hop]))
    return np.concatenate(samples)


def decoder_state(codec: Codec) -> State:
    """For `decode_chunk`, before the first chunk of a song."""
    return State.first(codec.module.decoder, 1)


def decode_chunk(codec: Codec, state: State, codes: Int[np.ndarray, "F K"]) -> tuple[State, Float[np.ndarray, " T"]]:
    """The next T = F x hop samples of a stream. Chunks of one length compile once.

    The samples are those of the whole song if the first chunk has at least 7 frames: its left edge is reflected.
    """
    _check(codec, codes)
    samples, state = _decode_chunk(codec.module, np.asarray(codes, np.int32)[None], np.int32(len(codes)), state)
    return state, np.asarray(samples[0])


@jax.jit
def _encode_chunk(module: Encodec, samples: Array, valid: Array, state: State) -> tuple[Array, State]:
    latents, state = module.embed(samples, valid, state)
    return module.quantize(latents), state


@jax.jit
def _decode_chunk(module: Encodec, codes: Array, valid: Array, state: State) -> tuple[Array, State]:
    return module.synthesize(codes, valid, state)


def _chunks(array: np.ndarray, frames: int, per_frame: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of `frames` frames, each with the length that is signal.

    The last is padded with zeros to that size or to a half, a quarter or an eighth of it, so that a short song does not
    pay for a long one and few shapes are compiled.
    """
    sizes = [frames // part * per_frame for part in (8, 4, 2) if frames % part == 0 and frames // part >= SHORTEST]
    for start in range(0, len(array), frames * per_frame):
        piece = array[start : start + frames * per_frame]
        padded = next((size for size in sizes if len(piece) <= size), frames * per_frame)
        padding = [(0, padded - len(piece))] + [(0, 0)] * (array.ndim - 1)
        yield np.pad(piece, padding), len(piece)


def _check(codec: Codec, codes: np.ndarray) -> None:
    """JAX clamps indices out of range instead of complaining."""
    if codes.shape[1] != codec.codebooks:
        raise UserError(f"codes have {codes.shape[1]} codebooks; codec {codec.name} was loaded with {codec.codebooks}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.entries:
        raise UserError(
            f"codes go from {codes.min()} to {codes.max()}; codec {codec.name} has 0 to {codec.entries - 1}"
        )
