"""How well a codec keeps a sound: level, waveform, spectrum, pitch, and use of the codebooks. After `codec`.

These are the ceiling of everything that is sung through a codec: no model can do better than the codec it speaks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from l2m_jax.audio import to_mono
from l2m_jax.codec import Codec, decode, encode_scaled

WINDOW, HOP, BANDS = 2048, 512, 80
FLOOR = 1e-4  # added to mel power: 2e-10 of the power of a full-scale sine
PITCHES = (55.0, 1000.0)  # Hz that are looked for
PITCH_WINDOW, PITCH_HOP = 0.06, 0.01  # seconds
CLEAR = 0.9  # normalised autocorrelation from which a frame is voiced
QUIET_DB = -35.0  # below the loud frames of the sound: no pitch is looked for


class Quality(NamedTuple):
    """What `measure` finds. Tuples have a value a codebook."""

    seconds: float
    si_sdr_db: float
    """Scale-invariant signal-to-distortion ratio (Le Roux et al., 2019): the waveform, phase and all."""
    mel_distance: float
    """Mean absolute difference of natural-log mel spectrograms, nats."""
    pitch_cents_median: float | None
    """Median absolute error of pitch over voiced frames, cents; None where nothing is voiced."""
    pitch_within_50_cents: float | None
    """Share of voiced frames."""
    voiced_s: float
    """Seconds with a clear pitch in the original."""
    entries_used: tuple[int, ...]
    entropy_bits: tuple[float, ...]
    """Of the distribution of the entries used; log2 V at most."""
    level_db: float
    """RMS of the reconstruction relative to the original's."""
    peak: float
    """Largest magnitude of the reconstruction; above 1 a WAV clips."""
    bits_per_s: float
    """Net of packing: K codes of log2 V bits a frame."""
    rtf: float
    """Real-time factor: seconds of encoding and decoding for a second of sound, compilation included in neither."""


def measure(
    codec: Codec, samples: Float[np.ndarray, "T ..."]
) -> tuple[Quality, Float[np.ndarray, "T ..."], Int[np.ndarray, "F K"]]:
    """Encodes and decodes a sound at the codec's rate: figures, reconstruction, codes. T is above 0.

    The figures of a stereo sound are those of the mean of its channels.
    """
    encoded = encode_scaled(codec, samples)
    decode(codec, encoded.codes, scales=encoded.scales)  # compiles
    began = time.perf_counter()
    encoded = encode_scaled(codec, samples)
    heard = decode(codec, encoded.codes, scales=encoded.scales)[: len(samples)]
    took = time.perf_counter() - began
    mono, mono_heard = map(to_mono, (samples, heard))
    counts = [np.bincount(book, minlength=codec.entries) for book in encoded.codes.T]
    cents, voiced = pitch_errors(mono, mono_heard, codec.rate)
    seconds = len(samples) / codec.rate
    quality = Quality(
        seconds=seconds,
        si_sdr_db=si_sdr(mono, mono_heard),
        mel_distance=mel_distance(mono, mono_heard, codec.rate),
        pitch_cents_median=float(np.median(cents)) if voiced else None,
        pitch_within_50_cents=float(np.mean(cents <= 50)) if voiced else None,
        voiced_s=voiced * PITCH_HOP,
        entries_used=tuple(int(np.count_nonzero(count)) for count in counts),
        entropy_bits=tuple(_entropy(count) for count in counts),
        level_db=float(10 * np.log10((np.mean(heard**2) + 1e-12) / (np.mean(samples**2) + 1e-12))),
        peak=float(np.abs(heard).max()),
        bits_per_s=codec.codebooks * codec.frame_rate * float(np.log2(codec.entries)),
        rtf=took / seconds,
    )
    return quality, heard, encoded.codes


def si_sdr(sound: Float[np.ndarray, " T"], heard: Float[np.ndarray, " T"]) -> float:
    """10 log10 |a s|^2 / |a s - h|^2 with a = <s, h> / |s|^2, in dB."""
    sound, heard = sound.astype(np.float64), heard.astype(np.float64)
    target = sound * (sound @ heard) / max(sound @ sound, 1e-12)
    return float(10 * np.log10((target @ target + 1e-12) / (np.sum((target - heard) ** 2) + 1e-12)))


def mel_distance(sound: Float[np.ndarray, " T"], heard: Float[np.ndarray, " T"], rate: int) -> float:
    """Mean |ln M(sound) - ln M(heard)|, M mel power plus FLOOR: Hann window of 2,048 by 512, 80 bands from 0 Hz."""
    total, count = 0.0, 0
    for a, b in zip(log_mel(sound, rate), log_mel(heard, rate)):
        total, count = total + float(np.abs(a - b).sum()), count + a.size
    return total / count


def log_mel(sound: Float[np.ndarray, " T"], rate: int) -> Iterator[Float[np.ndarray, "part bands"]]:
    """Natural log of mel power plus FLOOR, a row every HOP samples, some seconds at a time; see `mel_distance`."""
    filters = mel_filters(WINDOW, BANDS, rate)
    for frames in _frames(sound, WINDOW, HOP):
        yield np.log(_power(frames) @ filters.T + FLOOR)


def pitch_errors(
    sound: Float[np.ndarray, " T"], heard: Float[np.ndarray, " T"], rate: int
) -> tuple[Float[np.ndarray, " P"], int]:
    """Absolute error of pitch, in cents, in each of the P frames of `sound` that are voiced; and P."""
    hz, voiced = track_pitch(sound, rate)
    found, _ = track_pitch(heard, rate)
    cents = 1200 * np.abs(np.log2(found / hz))[voiced]
    return cents, len(cents)


def track_pitch(sound: Float[np.ndarray, " T"], rate: int) -> tuple[Float[np.ndarray, " F"], Bool[np.ndarray, " F"]]:
    """Pitch in Hz every 10 ms, and whether the frame is voiced: clear, and loud beside the rest.

    Normalised square difference (McLeod and Wyvill, 2005): the first peak that is almost as high as the highest.
    """
    window, hop = round(PITCH_WINDOW * rate), round(PITCH_HOP * rate)
    low, high = int(rate / PITCHES[1]), int(rate / PITCHES[0])
    pitches, clarities, levels = [], [], []
    for frames in _frames(sound, window + high, hop):
        frames = frames.astype(np.float64)
        head = frames[:, :window]
        size = 2 ** int(np.ceil(np.log2(2 * window + high)))
        cross = np.fft.irfft(np.fft.rfft(frames, size) * np.fft.rfft(head, size).conj(), size)[:, : high + 1]
        energy = np.cumsum(np.pad(frames**2, ((0, 0), (1, 0))), axis=1)
        shifted = energy[:, window : window + high + 1] - energy[:, : high + 1]
        clear = 2 * cross / (shifted[:, :1] + shifted + 1e-9)
        inner = clear[:, low:high]
        peaks = (inner > clear[:, low - 1 : high - 1]) & (inner >= clear[:, low + 1 : high + 1])
        height = np.where(peaks, inner, -1.0)
        best = height.max(1)
        lag = np.argmax(height >= np.maximum(0.93 * best, 0)[:, None], axis=1) + low
        rows = np.arange(len(lag))
        before, at, after = (clear[rows, lag + i] for i in (-1, 0, 1))
        bend = before - 2 * at + after
        shift = np.where(np.abs(bend) > 1e-9, 0.5 * (before - after) / np.where(bend == 0, 1, bend), 0)
        pitches.append(rate / (lag + np.clip(shift, -0.5, 0.5)))
        clarities.append(best)
        levels.append(10 * np.log10(shifted[:, 0] / window + 1e-12))
    hz, clarity, level = (np.concatenate(x) for x in (pitches, clarities, levels))
    return hz, (clarity > CLEAR) & (level > max(np.percentile(level, 95) + QUIET_DB, -70))


@functools.cache
def mel_filters(size: int, bands: int, rate: int = 24_000) -> Float[np.ndarray, "bands bins"]:
    """Triangles of equal area on the mel scale of Slaney's Auditory Toolbox (1998), over the bins of a real FFT."""
    per_linear, corner, step = 200 / 3, 1000.0, np.log(6.4) / 27  # linear below 1 kHz, logarithmic above
    top = 15 + np.log(rate / 2 / corner) / step
    mel = np.linspace(0, top, bands + 2)
    edges = np.where(mel < 15, mel * per_linear, corner * np.exp(step * (mel - 15)))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.linspace(0, rate / 2, size // 2 + 1)
    triangles = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    return (triangles * 2 / (high - low)).astype(np.float32)


def _frames(sound: Float[np.ndarray, " T"], window: int, hop: int) -> Iterator[Float[np.ndarray, "part window"]]:
    """Centred frames, some seconds of them at a time, so that a long sound needs little memory."""
    padded = np.pad(np.asarray(sound, np.float32), window // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    for start in range(0, len(frames), 512):
        yield frames[start : start + 512]


def _power(frames: Float[np.ndarray, "part window"]) -> Float[np.ndarray, "part bins"]:
    spectrum = np.fft.rfft(frames * np.hanning(frames.shape[1] + 1)[:-1].astype(np.float32))
    return spectrum.real**2 + spectrum.imag**2


def _entropy(count: Int[np.ndarray, " V"]) -> float:
    share = count[count > 0] / count.sum()
    return float(-np.sum(share * np.log2(share)))
