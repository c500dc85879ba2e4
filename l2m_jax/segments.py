"""Songs as overlapping segments, as encodec_48khz has them: cut, and joined by weights. After encodec, before codec.

A segment is 1 s long (150 frames) and begins 0.99 s after the one before; the last one, and at times the one before it,
is shorter. The codes of a song are those of its segments one after the other, so that 1 s of sound has 151.5 frames.

Letters: T samples, F frames, N segments; A channels of the sound: none of mono, 2 of stereo.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from l2m_jax.audio import to_mono
from l2m_jax.encodec import EncodecConfig

SCALE = 0.1
"""Loudness (root mean square) of a segment of which nobody has said it: -20 dBFS, as music is commonly levelled."""


def cut(samples: Float[np.ndarray, "T ..."], config: EncodecConfig) -> list[Float[np.ndarray, "_ ..."]]:
    """The segments of a sound."""
    lengths = segment_lengths(len(samples), config)
    return [samples[i * config.segment_stride :][:length] for i, length in enumerate(lengths)]


def segment_lengths(samples: int, config: EncodecConfig) -> list[int]:
    """Samples of each segment of a sound of T samples."""
    return [min(config.segment, samples - start) for start in range(0, samples, config.segment_stride)]


def loudness(segment: Float[np.ndarray, "T ..."]) -> float:
    """Root mean square of the channels' mean: the scale that a segment is divided by, and its sound multiplied with."""
    return float(np.sqrt(np.mean(to_mono(segment) ** 2)) + 1e-8)


def segment_frames(frames: int, config: EncodecConfig) -> list[int]:
    """Frames of each segment of a song of F frames, whatever its samples were.

    A whole number of full segments is left only by a song whose last segment is so short (at most half a frame) that
    the one before lacks a frame too: a song of 300 frames has segments of 150, 149 and 1.
    """
    full, rest = divmod(frames, config.segment // config.hop)
    sizes = [config.segment // config.hop] * full
    if sizes and not rest:
        sizes[-1], rest = sizes[-1] - 1, 1
    return [*sizes, rest] if rest else sizes


def join(segments: list[Float[np.ndarray, "_ ..."]], config: EncodecConfig) -> Float[np.ndarray, "T ..."]:
    """Overlap-add of the segments' sounds; each fades in and out over what it has in common with its neighbours.

    The weights are a triangle over the segment, and where segments overlap they are divided by their sum, as in the
    published models. T is the longest sound that is cut into segments of so many frames; theirs ends up to a segment's
    overlap later, for the caller to cut.
    """
    stride = config.segment_stride
    # Decoded, the one before the last may be whole frames longer than the song, and reach beyond the last one's end.
    length = max(i * stride + len(segment) for i, segment in enumerate(segments))
    triangle = 0.5 - np.abs(np.linspace(0, 1, len(segments[0]) + 2, dtype=np.float32)[1:-1] - 0.5)
    total = np.zeros(length, np.float32)
    joined = np.zeros((length, *segments[0].shape[1:]), np.float32)
    for i, segment in enumerate(segments):
        weight, place = triangle[: len(segment)], slice(i * stride, i * stride + len(segment))
        joined[place] += (weight * segment.T).T
        total[place] += weight
    last = min(len(segments[-1]), stride)
    if len(segments) > 1 and len(segments[-2]) < config.segment:
        last = min(last, len(segments[-2]) - stride)
    return (joined.T / total).T[: stride * (len(segments) - 1) + last]
