"""Sound <-> codes, whole songs in chunks of bounded memory. After audio and encodec in the flow; weights.py loads it.

Codes are int32 [F, K] and sounds float32 [T] (mono) or [T, 2] (stereo), NumPy on both sides: any length, one
compilation. The codes of a segmented codec (encodec_48khz) go with a scale, the loudness, for each segment.

Letters: B batch, T samples, F frames, K codebooks, V entries, N segments; A channels of the sound: none, or 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from l2m_jax.config import UserError
from l2m_jax.encodec import Encodec, EncodecConfig
from l2m_jax.seanet import State
from l2m_jax.segments import SCALE, cut, join, loudness, segment_frames

CHUNK = 768  # frames at a time: 10 s of sound
SHORTEST = 96  # frames of the smallest shape that is compiled
SEGMENTS = 8  # at a time, of a segmented codec


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
    def pace(self) -> float:
        """Frames a second of sound: more than `frame_rate` where segments overlap (151.5 at 48 kHz)."""
        c = self.config
        return c.segment / c.hop * self.rate / c.segment_stride if c.segment else self.rate / self.hop

    @property
    def channels(self) -> int:
        """1 of mono, 2 of stereo."""
        return self.config.audio_channels

    @property
    def streams(self) -> bool:
        """Whether sound can be made second by second (`decode_chunk`); a segmented codec decodes whole songs."""
        return not self.config.segment

    @property
    def codebooks(self) -> int:
        """K."""
        return self.module.codebooks.shape[0]

    @property
    def entries(self) -> int:
        """V."""
        return self.config.codebook_size


class Encoded(NamedTuple):
    """A song in codes."""

    codes: Int[np.ndarray, "F K"]
    scales: Float[np.ndarray, " N"] | None
    """Loudness of each segment; None where the codec has none."""


def encode(codec: Codec, samples: Float[np.ndarray, "T ..."], chunk: int = CHUNK) -> Int[np.ndarray, "F K"]:
    """Codes, int32, of a sound at the codec's rate; F = ceil(T / hop), of each segment if there are segments.

    `chunk` frames are in memory at once. A mono sound is stereo with twice the same.
    """
    return encode_many(codec, [samples], chunk)[0]


def encode_many(
    codec: Codec, sounds: Sequence[Float[np.ndarray, "_ ..."]], chunk: int = CHUNK
) -> list[Int[np.ndarray, "_ K"]]:
    """Codes of each of several sounds, computed as one batch, for an accelerator; on CPU no faster than one by one.

    Every number of sounds compiles once, and the batch takes as long as its longest. A segmented codec takes them one
    after the other: the segments of one sound are a batch already.
    """
    sounds = [_fitting(codec, sound) for sound in sounds]
    if not codec.streams:
        return [_encode_segments(codec, sound).codes for sound in sounds]
    state = State.first(codec.module.encoder, len(sounds))
    codes = [[np.zeros((0, codec.codebooks), np.int32)] for _ in sounds]
    for pieces, valid in _chunks(sounds, chunk, codec.hop):
        found, state = _encode_chunk(codec.module, pieces, valid, state)
        for parts, song, length in zip(codes, np.asarray(found), valid):
            parts.append(song[: -(-length // codec.hop)])
    return [np.concatenate(parts) for parts in codes]


def encode_scaled(codec: Codec, samples: Float[np.ndarray, "T ..."]) -> Encoded:
    """Codes and, of a segmented codec, the segments' scales: all that is needed to get the sound back."""
    if codec.streams:
        return Encoded(encode(codec, samples), None)
    return _encode_segments(codec, _fitting(codec, samples))


def decode(
    codec: Codec,
    codes: Int[np.ndarray, "F K"],
    chunk: int = CHUNK,
    scales: Float[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, "T ..."]:
    """Samples in about [-1, 1] at the codec's rate; T = F x hop, less what segments have in common.

    `chunk` frames are in memory at once. Codes that a language model made have no scales: all segments of a codec that
    has some are then of one loudness, `segments.SCALE`.
    """
    _check(codec, codes)
    if not codec.streams:
        return _decode_segments(codec, codes, scales)
    state = decoder_state(codec)
    samples = [_silence(codec)]
    for pieces, valid in _chunks([np.asarray(codes, np.int32)], chunk, 1):
        found, state = _decode_chunk(codec.module, pieces, valid, state)
        samples.append(np.asarray(found[0, : valid[0] * codec.hop]))
    return np.concatenate(samples)


def decoder_state(codec: Codec) -> State:
    """For `decode_chunk`, before the first chunk of a song. UserError where the codec does not stream."""
    if not codec.streams:
        raise UserError(f"codec {codec.name} decodes overlapping segments, whole songs at a time: it has no stream")
    return State.first(codec.module.decoder, 1)


def decode_chunk(codec: Codec, state: State, codes: Int[np.ndarray, "F K"]) -> tuple[State, Float[np.ndarray, "T ..."]]:
    """The next T = F x hop samples of a stream. Chunks of one length compile once.

    The samples are those of the whole song if the first chunk has at least 7 frames: its left edge is reflected.
    """
    _check(codec, codes)
    samples, state = _decode_chunk(
        codec.module, np.asarray(codes, np.int32)[None], np.full(1, len(codes), np.int32), state
    )
    return state, np.asarray(samples[0])


@jax.jit
def _encode_chunk(module: Encodec, samples: Array, valid: Array, state: State) -> tuple[Array, State]:
    with jax.default_matmul_precision("float32"):  # Accelerators would round: the same sound has the same codes.
        latents, state = module.embed(samples, valid, state)
        return module.quantize(latents), state


@jax.jit
def _decode_chunk(module: Encodec, codes: Array, valid: Array, state: State) -> tuple[Array, State]:
    with jax.default_matmul_precision("float32"):
        return module.synthesize(codes, valid, state)


def _encode_segments(codec: Codec, samples: Float[np.ndarray, "T ..."]) -> Encoded:
    segments = cut(samples, codec.config)
    scales = np.array([loudness(segment) for segment in segments] if codec.config.normalize else [], np.float32)
    if codec.config.normalize:
        segments = [segment / scale for segment, scale in zip(segments, scales)]
    codes = [np.zeros((0, codec.codebooks), np.int32)]
    for pieces, valid in _batches(segments, codec.config.segment):
        found, _ = _encode_chunk(codec.module, pieces, valid, State.first(codec.module.encoder, len(pieces)))
        codes += [segment[: -(-length // codec.hop)] for segment, length in zip(np.asarray(found), valid)]
    return Encoded(np.concatenate(codes), scales if codec.config.normalize else None)


def _decode_segments(codec: Codec, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    sizes = segment_frames(len(codes), codec.config)
    if not sizes:
        return _silence(codec)
    if scales is None:
        scales = np.full(len(sizes), SCALE if codec.config.normalize else 1, np.float32)
    if len(scales) != len(sizes):
        raise UserError(f"{len(scales)} scales; {len(codes)} frames of codec {codec.name} are {len(sizes)} segments")
    segments = []
    parts = np.split(np.asarray(codes, np.int32), np.cumsum(sizes)[:-1])
    for pieces, valid in _batches(parts, codec.config.segment // codec.hop):
        found, _ = _decode_chunk(codec.module, pieces, valid, State.first(codec.module.decoder, len(pieces)))
        segments += [segment[: length * codec.hop] for segment, length in zip(np.asarray(found), valid) if length]
    return join([segment * scale for segment, scale in zip(segments, scales)], codec.config)


def _chunks(songs: Sequence[np.ndarray], frames: int, per_frame: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of `frames` frames of all songs, each with the lengths that are signal, until the longest song ends.

    The last is padded with zeros to that size or to a half, a quarter or an eighth of it, so that a short song does not
    pay for a long one and few shapes are compiled.
    """
    sizes = [frames // part * per_frame for part in (8, 4, 2) if frames % part == 0 and frames // part >= SHORTEST]
    for start in range(0, max(map(len, songs), default=0), frames * per_frame):
        pieces = [song[start : start + frames * per_frame] for song in songs]
        longest = max(map(len, pieces))
        yield _padded(pieces, next((size for size in sizes if longest <= size), frames * per_frame))


def _batches(segments: Sequence[np.ndarray], longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Up to SEGMENTS at a time, padded to `longest`, with their lengths; their number is made a power of 2."""
    for start in range(0, len(segments), SEGMENTS):
        some = segments[start : start + SEGMENTS]
        number = 1 << (len(some) - 1).bit_length()
        yield _padded([*some, *[some[0][:0]] * (number - len(some))], longest)


def _padded(pieces: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """All as one array, with zeros behind each, and their lengths."""
    array = np.zeros((len(pieces), length, *pieces[0].shape[1:]), pieces[0].dtype)
    for row, piece in zip(array, pieces):
        row[: len(piece)] = piece
    return array, np.array([len(piece) for piece in pieces], np.int32)


def _fitting(codec: Codec, samples: np.ndarray) -> np.ndarray:
    """The sound with the codec's channels, float32."""
    samples = np.asarray(samples, np.float32)
    if samples.ndim == 1 and codec.channels == 2:
        samples = np.stack([samples, samples], axis=1)
    if samples.shape[1:] != _silence(codec).shape[1:]:
        raise UserError(
            f"the sound has shape {list(samples.shape)}; codec {codec.name} wants samples"
            + (f" by {codec.channels} channels" if codec.channels > 1 else " of one channel")
        )
    return samples


def _silence(codec: Codec) -> np.ndarray:
    """0 samples."""
    return np.zeros((0, codec.channels) if codec.channels > 1 else 0, np.float32)


def _check(codec: Codec, codes: np.ndarray) -> None:
    """JAX clamps indices out of range instead of complaining."""
    if codes.shape[1] != codec.codebooks:
        raise UserError(f"codes have {codes.shape[1]} codebooks; codec {codec.name} was loaded with {codec.codebooks}")
    if codes.size and not 0 <= codes.min() <= codes.max() < codec.entries:
        raise UserError(
            f"codes go from {codes.min()} to {codes.max()}; codec {codec.name} has 0 to {codec.entries - 1}"
        )
