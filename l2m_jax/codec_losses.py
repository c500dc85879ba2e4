"""What a codec is trained to keep of a sound. After `quality`; for `codec_training`.

Every loss is 0 where y is x [B, T], both at 24 kHz and below CLIPPED; clips are a tenth of a second at least.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from l2m_jax.quality import FLOOR, mel_filters

WINDOWS = (256, 512, 1024, 2048)  # samples; a quarter of each is its hop
BANDS = (32, 48, 64, 80)
COUNTS = (1, 1, 1, 3)  # the longest tells harmonics from what is between them, where a codec's noise is heard
BIN_FLOOR = 1e-2  # a mel band adds up its bins with weights of about a hundredth
LAGS = slice(40, 400)  # samples of the autocorrelation: 600 to 60 Hz
CLIPPED = 0.95  # of full scale: clips of `sounds` stay below
HEARD, HIGHEST, LOWEST = 1440, 24, 437  # samples: 60 ms; lags of 1,000 and 55 Hz


class Weights(NamedTuple):
    """What the parts of the loss count for, relative to each other."""

    waveform: float
    """Mean |x - y| relative to the clip's RMS: keeps phase, and with it pitch."""
    spectrum: float
    """Multi-scale log-mel distance and spectral convergence: keeps timbre, and the level of what has no pitch."""
    harmonics: float
    """Log-spectral distance bin by bin: keeps the pitch of what is quiet or low, which mel bands do not resolve."""
    envelope: float
    """Log peak and log RMS of every 10 ms: against clicks, which to a spectrum are as good as hiss, and lost level."""
    pitch: float
    """Normalised autocorrelation: the pitch of what is quiet counts as much as that of what is loud."""
    salience: float
    """Which pitch is heard in what is voiced: against a harmonic or an octave in the place of the note."""
    peaks: float
    """What shoots beyond the loudest sample nearby."""
    clipping: float
    """What shoots beyond full scale, where a WAV is cut."""


def waveform_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean |x - y| relative to each clip's RMS."""
    level = jnp.sqrt(jnp.mean(x**2, -1)) + 1e-2
    return jnp.mean(jnp.mean(jnp.abs(x - y), -1) / level)


def spectral_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Over four window lengths: mean |log-mel(x) - log-mel(y)| (as `quality` has it) plus spectral convergence."""
    loss = jnp.array(0.0)
    for size, bands, count in zip(WINDOWS, BANDS, COUNTS):
        filters = mel_filters(size, bands)
        (p, a), (q, b) = _spectra(x, size, filters), _spectra(y, size, filters)
        distance = jnp.mean(jnp.abs(jnp.log(p + FLOOR) - jnp.log(q + FLOOR)))
        # Of all clips together: relative to a silent clip any sound is infinite. The root of 0 has no slope.
        loss += count * (distance + jnp.sqrt(jnp.sum((a - b) ** 2) / (jnp.sum(a**2) + 1e-3) + 1e-12))
    return loss / sum(COUNTS)


def harmonic_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean |log P(x) - log P(y)| of the power in every bin of 2,048 samples up to 3 kHz."""
    low = np.eye(256, 1025, dtype=np.float32)
    p, q = (_spectra(sound, 2048, low)[0] for sound in (x, y))
    return jnp.mean(jnp.abs(jnp.log(p + BIN_FLOOR) - jnp.log(q + BIN_FLOOR)))


def envelope_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean |log p(x) - log p(y)| + |log r(x) - log r(y)| of the peak p and the RMS r of every 240 samples."""
    peaks, levels = [], []
    for sound in (x, y):
        blocks = sound[:, : sound.shape[1] // 240 * 240].reshape(len(sound), -1, 240)
        peaks.append(jnp.log(jnp.max(jnp.abs(blocks), -1) + 1e-3))
        levels.append(0.5 * jnp.log(jnp.mean(blocks**2, -1) + 1e-6))
    return jnp.mean(jnp.abs(peaks[0] - peaks[1])) + jnp.mean(jnp.abs(levels[0] - levels[1]))


def pitch_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean |r(x) - r(y)| of the autocorrelation r of every 1,024 samples at LAGS, relative to that at 0."""

    def correlation(sound: Array) -> Array:
        parts = sound[:, : sound.shape[1] // 512 * 512].reshape(len(sound), -1, 512)
        frames = jnp.concatenate([parts[:, :-1], parts[:, 1:]], -1) * np.hanning(1024).astype(np.float32)
        spectrum = jnp.fft.rfft(frames, 2048)
        found = jnp.fft.irfft(spectrum.real**2 + spectrum.imag**2)
        return found[..., LAGS] / (found[..., :1] + 1e-3)  # nothing below -55 dB of full scale has a pitch

    return jnp.mean(jnp.abs(correlation(x) - correlation(y)))


def salience_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean KL(p(x) | p(y)) where x is voiced; p is the softmax, over lags of 1,000 to 55 Hz, of n / 0.1.

    n is the normalised square difference (McLeod and Wyvill, 2005) that `quality.track_pitch` finds pitches by. Where a
    low note is left with every other harmonic only, waveform and spectrum are near, and this is not.
    """

    def clear(sound: Array) -> Array:
        starts = np.arange(0, sound.shape[1] - HEARD - LOWEST, 480)
        frames = sound[:, starts[:, None] + np.arange(HEARD + LOWEST)]
        spectrum, head = jnp.fft.rfft(frames, 2048), jnp.fft.rfft(frames[..., :HEARD], 2048)
        cross = jnp.fft.irfft(spectrum * head.conj())[..., HIGHEST:LOWEST]
        energy = jnp.pad(jnp.cumsum(frames**2, -1), ((0, 0), (0, 0), (1, 0)))
        shifted = energy[..., HEARD : HEARD + LOWEST] - energy[..., :LOWEST]
        return 2 * cross / (shifted[..., :1] + shifted[..., HIGHEST:] + 1e-4)

    target, found = clear(x), clear(y)
    voiced = jnp.clip((jnp.max(target, -1) - 0.7) / 0.2, 0, 1)
    p, q = jax.nn.log_softmax(target / 0.1), jax.nn.log_softmax(found / 0.1)
    return jnp.mean(voiced * jnp.sum(jnp.exp(p) * (p - q), -1))


def peak_loss(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Mean of what samples of y have beyond the loudest of x in their 10 ms and those beside, by the clip's RMS."""
    blocks = [sound[:, : sound.shape[1] // 240 * 240].reshape(len(sound), -1, 240) for sound in (x, y)]
    loudest = jnp.pad(jnp.max(jnp.abs(blocks[0]), -1), ((0, 0), (1, 1)), mode="edge")
    nearby = jnp.maximum(jnp.maximum(loudest[:, :-2], loudest[:, 2:]), loudest[:, 1:-1])[..., None]
    beyond = jnp.maximum(jnp.abs(blocks[1]) - 1.1 * nearby - 0.01, 0)
    return jnp.mean(jnp.mean(beyond, (1, 2)) / (jnp.sqrt(jnp.mean(x**2, -1)) + 1e-2))


def clipping_loss(y: Float[Array, "B T"]) -> Float[Array, ""]:
    """Sum of what samples have beyond CLIPPED, a mean over clips: one sample of a thousand is cut as any other is."""
    return jnp.mean(jnp.sum(jnp.maximum(jnp.abs(y) - CLIPPED, 0), -1))


def all_losses(x: Float[Array, "B T"], y: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """The loss of each of the `Weights`, by its name."""
    return {
        "waveform": waveform_loss(x, y),
        "spectrum": spectral_loss(x, y),
        "harmonics": harmonic_loss(x, y),
        "envelope": envelope_loss(x, y),
        "pitch": pitch_loss(x, y),
        "salience": salience_loss(x, y),
        "peaks": peak_loss(x, y),
        "clipping": clipping_loss(y),
    }


def _spectra(x: Float[Array, "B T"], size: int, filters: np.ndarray) -> tuple[Array, Array]:
    """Mel power [B, frames, bands] and magnitudes [B, frames, bins]."""
    hop = size // 4
    parts = x[:, : x.shape[1] // hop * hop].reshape(x.shape[0], -1, hop)
    frames = jnp.concatenate([parts[:, i : parts.shape[1] - 3 + i] for i in range(4)], axis=-1)
    spectrum = jnp.fft.rfft(frames * np.hanning(size + 1)[:-1].astype(np.float32))
    power = spectrum.real**2 + spectrum.imag**2
    return power @ filters.T, jnp.sqrt(power + 1e-8)
