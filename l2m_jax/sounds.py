"""Procedural sound, without anybody's licence: what the shipped codec is trained on. After `solfege`.

A clip is a pure function of (seed, index). Its kind is one of `KINDS`: solfege songs as the corpus has them; melodies
by a source-filter voice (Fant, 1960) over wide pitch, vowel and timbre, by Karplus-Strong strings, plucked and struck
(Karplus and Strong, 1983), by frequency modulation (Chowning, 1973) and by a subtractive synthesizer; chords; drums;
coloured noise; mixtures of two or three; and whole bands. Melodies keep to the keys of a piano, a little out of tune.
All but the solfege songs then pass through a random equaliser, some through a reverb or a limiter, and are played at a
random level; solfege songs are played about as loud as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy.signal import fftconvolve, lfilter

from l2m_jax.solfege import FORMANTS, GENRES, random_lyrics, sing

RATE = 24_000
LOUD, QUIET = -0.5, -14.0  # dB of full scale: between these a clip has its peak

Sound = Float[np.ndarray, " T"]


def make_clip(seed: int, index: int, seconds: float, kind: str | None = None) -> Sound:
    """Clip `index` of the corpus `seed`: float32, 24 kHz, peak below 1. `kind` (of `KINDS`) is drawn if None."""
    rng = np.random.default_rng((seed, index))
    drawn = _draw_kind(rng, SHARES)
    kind, size = kind or drawn, round(seconds * RATE)
    sound = KINDS[kind](rng, size)
    if kind == "solfege":
        # A stretch between two notes stays as quiet as it is; the codec need not know every level of them.
        return (sound * 10 ** (rng.uniform(-3, 3) / 20)).astype(np.float32)
    sound = _equalise(sound, rng)
    if rng.random() < 0.3:
        sound = _reverb(sound, rng)
    sound = sound / max(np.abs(sound).max(), 1e-9)
    if kind == "band" or rng.random() < 0.3:  # dense and loud, as released songs are
        drive = rng.uniform(2, 8) if kind == "band" else rng.uniform(1, 5)
        sound = np.tanh(drive * sound) / np.tanh(drive)
    return (sound * 10 ** (rng.uniform(LOUD - 4 if kind == "band" else QUIET, LOUD) / 20)).astype(np.float32)


def kind_of(seed: int, index: int, shares: Sequence[float] | None = None) -> str:
    """Which of `KINDS` is drawn for a clip: by `make_clip`, where each has its share of SHARES."""
    return _draw_kind(np.random.default_rng((seed, index)), shares or SHARES)


def _draw_kind(rng: np.random.Generator, shares: Sequence[float]) -> str:
    return str(rng.choice(list(KINDS), p=shares))


def _solfege(rng: np.random.Generator, size: int) -> Sound:
    """A stretch of a solfege song."""
    most = 2 + round(size / RATE / 0.3)
    sound = sing(random_lyrics(rng, 2, most), str(rng.choice(list(GENRES))), rng)[0]
    start = rng.integers(0, max(len(sound) - size, 0) + 1)
    return np.pad(sound[start : start + size], (0, max(size - len(sound), 0)))


def _melody(note: Callable[[np.random.Generator, float, int], Sound], lo: float, hi: float) -> Callable:
    """Notes of 0.1 to 0.8 s between `lo` and `hi` Hz that ring on into the next; `note` is (rng, hz, samples)."""

    def play(rng: np.random.Generator, size: int) -> Sound:
        out = np.zeros(size)
        now, mean, hz = 0, rng.uniform(0.12, 0.6), _hz(rng, lo, hi)
        while now < size:
            step = round(RATE * mean * rng.uniform(0.6, 1.5))
            if rng.random() > 0.1:  # else a rest
                ring = min(round(step * rng.uniform(0.8, 1.3)), size - now)
                sound = note(rng, hz, ring) * rng.uniform(0.5, 1)
                fade = min(ring, 200)
                sound[-fade:] *= np.linspace(1, 0, fade)
                out[now : now + ring] += sound
            now += step
            hz = (
                float(np.clip(hz * 2 ** (rng.integers(-7, 8) / 12), lo, hi)) if rng.random() < 0.8 else _hz(rng, lo, hi)
            )
        return out

    return play


def _voice(rng: np.random.Generator, hz: float, size: int) -> Sound:
    """A vowel that glides into another: harmonics of a bent, trembling pitch under three formants, and breath."""
    time = np.arange(size) / RATE
    vowels, scale = rng.choice(list(FORMANTS.values()), 2), rng.uniform(0.85, 1.25)  # scale: length of the vocal tract
    tilt, width, depth = rng.uniform(0.9, 2.2), rng.uniform(60, 200), rng.uniform(0, 40)
    bend = rng.normal(0, 30) * np.exp(-time / 0.05)  # cents
    cents = bend + depth * np.sin(2 * np.pi * (rng.uniform(4, 7) * time + rng.random()))
    cycles = np.cumsum(hz * 2 ** (cents / 1200)) / RATE
    harmonic = np.arange(1, int(9000 / hz) + 1)
    phases = rng.uniform(0, 1, len(harmonic))
    tables = []
    for formants in vowels:
        peaks = sum(1 / (1 + ((harmonic * hz - f * scale) / width) ** 2) / 2**i for i, f in enumerate(formants))
        spectrum = np.zeros(1025, complex)
        spectrum[harmonic] = (peaks + rng.uniform(0.02, 0.2)) * harmonic**-tilt * np.exp(2j * np.pi * phases)
        tables.append(np.fft.irfft(spectrum))
    at = (cycles * 2048).astype(int) % 2048
    mix = np.linspace(0, 1, size) ** rng.uniform(0.5, 3)
    voice = _unit((1 - mix) * tables[0][at] + mix * tables[1][at])
    breath = np.diff(rng.standard_normal(size + 1)) * rng.uniform(0, 0.03)
    return (voice + breath) * _envelope(rng, size, attack=0.05)


def _string(rng: np.random.Generator, hz: float, size: int) -> Sound:
    """Karplus-Strong: a burst goes round a delay line that averages neighbours; plucked (noise) or struck (soft)."""
    period = RATE / hz - 0.5  # the average delays by half a sample
    whole = int(period)
    part = period - whole
    decay = 0.5 * 10 ** (-3 / (hz * rng.uniform(0.8, 3)))  # by 60 dB in so many seconds
    burst = rng.standard_normal(whole + 1)
    if rng.random() < 0.5:  # a felt hammer: a smooth bump at one place of the string
        burst = np.convolve(burst, np.hanning(max(whole // 4, 3)), "same")
    at = max(int(whole * rng.uniform(0.1, 0.5)), 1)  # where it is plucked: a comb
    burst = burst - np.roll(burst, at)
    feedback = np.zeros(whole + 3)
    feedback[0] = 1
    # y[n] = x[n] + decay (z[n] + z[n - 1]), z the line read between its samples at `period`
    feedback[whole : whole + 3] -= decay * np.array([1 - part, 1, part])
    struck = np.pad(burst, (0, max(size - len(burst), 0)))[:size]
    return _unit(np.asarray(lfilter([1.0], feedback, struck)))


def _modulated(rng: np.random.Generator, hz: float, size: int) -> Sound:
    """FM: bells, brass and electric pianos, as ratio and index have it. Whole ratios keep the pitch at `hz`."""
    time = np.arange(size) / RATE
    ratio, index = rng.integers(1, 4), rng.uniform(0.3, 2.5)
    strength = index * np.exp(-time / rng.uniform(0.1, 2)) if rng.random() < 0.7 else index
    phase = 2 * np.pi * hz * time
    return np.sin(phase + strength * np.sin(ratio * phase + rng.uniform(0, 6))) * _envelope(rng, size, attack=0.03)


def _analogue(rng: np.random.Generator, hz: float, size: int) -> Sound:
    """Subtractive: saw or pulse, a second one a little apart, under a resonant low pass that closes."""
    time = np.arange(size) / RATE
    harmonic = np.arange(1, int(10_000 / hz) + 1)
    pulse = rng.random() < 0.5
    width = rng.uniform(0.1, 0.5)
    level = np.sin(np.pi * harmonic * width) / harmonic if pulse else 1 / harmonic
    cutoff, resonance = rng.uniform(500, 6000), rng.uniform(0, 2)

    def table(cutoff: float) -> Sound:
        x = harmonic * hz / cutoff
        spectrum = np.zeros(1025)
        spectrum[harmonic] = level / np.sqrt((1 - x**2) ** 2 + (x / (0.7 + resonance)) ** 2)
        return np.fft.irfft(spectrum * 1j)

    bright, dull = table(cutoff), table(max(cutoff * rng.uniform(0.2, 1), hz))
    mix = np.exp(-time / rng.uniform(0.05, 1))
    sound = np.zeros(size)
    for cents in (0.0, *rng.uniform(-8, 8, rng.integers(0, 2))):
        at = (np.cumsum(np.full(size, hz * 2 ** (cents / 1200))) / RATE * 2048).astype(int) % 2048
        sound += mix * bright[at] + (1 - mix) * dull[at]
    return _unit(sound) * _envelope(rng, size, attack=0.02)


NOTES = (_voice, _string, _modulated, _analogue)


def _chords(rng: np.random.Generator, size: int) -> Sound:
    """Triads and sevenths, 0.3 to 1.5 s each, of one instrument."""
    note = NOTES[rng.integers(len(NOTES))]
    out, now = np.zeros(size), 0
    while now < size:
        step = min(round(RATE * rng.uniform(0.3, 1.5)), size - now)
        root, third = _hz(rng, 90, 350), rng.integers(3, 5)
        for semitones in (0, third, 7, *rng.choice([10, 11, 12], rng.integers(0, 2))):
            out[now : now + step] += note(rng, root * 2 ** (semitones / 12), step) * rng.uniform(0.4, 1)
        now += step
    return out


def _drums(rng: np.random.Generator, size: int) -> Sound:
    """Kick, snare and hi-hat on a grid."""
    out, grid = np.zeros(size), round(RATE * rng.uniform(0.09, 0.22))
    time = np.arange(round(0.35 * RATE)) / RATE
    low, snap = rng.uniform(40, 70), rng.uniform(0.02, 0.05)
    kick = np.sin(2 * np.pi * (low * time - 2 * np.exp(-time / snap))) * np.exp(-time / rng.uniform(0.05, 0.15))
    body = np.sin(2 * np.pi * rng.uniform(150, 230) * time) * np.exp(-time / 0.06)
    snare = body + rng.uniform(0.4, 1) * rng.standard_normal(len(time)) * np.exp(-time / rng.uniform(0.04, 0.12))
    hat = np.diff(rng.standard_normal(len(time) + 1)) * np.exp(-time / rng.uniform(0.01, 0.06)) * 0.3
    pattern = rng.random((3, 8)) < np.array([[0.35], [0.25], [0.6]])
    for beat, start in enumerate(range(0, size, grid)):
        for sound, played in zip((kick, snare, hat), pattern[:, beat % 8]):
            if played:
                end = min(start + len(sound), size)
                out[start:end] += sound[: end - start] * rng.uniform(0.6, 1)
    return out + 1e-4 * rng.standard_normal(size)


def _noise(rng: np.random.Generator, size: int) -> Sound:
    """Noise of a random slope, swelling and falling: breath, wind, applause."""
    spectrum = np.fft.rfft(rng.standard_normal(size)) * np.maximum(np.arange(size // 2 + 1), 1.0) ** -rng.uniform(
        0, 1.2
    )
    knots = rng.uniform(0.05, 1, rng.integers(2, 12))
    return _unit(np.fft.irfft(spectrum, size)) * np.interp(
        np.linspace(0, len(knots) - 1, size), range(len(knots)), knots
    )


def _mixture(rng: np.random.Generator, size: int) -> Sound:
    """A lead over one or two others, 3 to 15 dB below it."""
    lead = _unit(KINDS[str(rng.choice(["voice", "string", "fm", "analogue"]))](rng, size))
    for kind in rng.choice(["string", "analogue", "chords", "drums", "noise"], rng.integers(1, 3), replace=False):
        lead = lead + _unit(KINDS[str(kind)](rng, size)) * 10 ** (-rng.uniform(3, 15) / 20)
    return lead


def _band(rng: np.random.Generator, size: int) -> Sound:
    """Drums, a bass, chords and a lead, about as loud as each other: dense as released songs are."""
    bass = _melody(NOTES[rng.integers(1, len(NOTES))], 41, 110)
    lead = _melody(NOTES[rng.integers(len(NOTES))], 165, 523)
    parts = [_unit(play(rng, size)) * 10 ** (rng.uniform(-6, 3) / 20) for play in (_drums, bass, _chords, lead)]
    return np.sum(parts, axis=0)


KINDS: dict[str, Callable[[np.random.Generator, int], Sound]] = {
    "solfege": _solfege,
    "voice": _melody(_voice, 82, 523),
    "string": _melody(_string, 82, 440),
    "fm": _melody(_modulated, 98, 523),
    "analogue": _melody(_analogue, 65, 440),
    "chords": _chords,
    "drums": _drums,
    "noise": _noise,
    "mixture": _mixture,
    "band": _band,
}
SHARES = (0.40, 0.15, 0.11, 0.09, 0.06, 0.04, 0.03, 0.02, 0.05, 0.05)
"""How often each kind is drawn: the voice of the project first."""


def _hz(rng: np.random.Generator, lo: float, hi: float) -> float:
    """A key of the piano, all alike likely, some cents out of tune."""
    lowest, highest = np.ceil(12 * np.log2(lo / 440)), np.floor(12 * np.log2(hi / 440))
    return float(440 * 2 ** ((rng.integers(lowest, highest + 1) + rng.normal(0, 0.07)) / 12))


def _unit(sound: Sound) -> Sound:
    """RMS 1."""
    return sound / max(float(np.sqrt(np.mean(sound**2))), 1e-9)


def _envelope(rng: np.random.Generator, size: int, attack: float) -> Sound:
    """Rises within `attack` seconds at most and then decays or stays."""
    time = np.arange(size) / RATE
    fall = np.exp(-time / rng.uniform(0.15, 3)) if rng.random() < 0.7 else np.ones(size)
    return np.minimum(time / rng.uniform(0.002, attack), 1) * fall


def _equalise(sound: Sound, rng: np.random.Generator) -> Sound:
    """A smooth random curve over the octaves, of some 5 dB."""
    spectrum = np.fft.rfft(sound)
    hz = np.linspace(0, RATE / 2, len(spectrum))
    octaves = np.log2(np.maximum(hz, 20) / 20)
    return np.fft.irfft(spectrum * 10 ** (np.interp(octaves, range(11), rng.normal(0, 5, 11)) / 20), len(sound))


def _reverb(sound: Sound, rng: np.random.Generator) -> Sound:
    """A room: decaying noise, 0.1 to 1 s to the sixtieth decibel, 6 to 20 dB below the sound itself."""
    tail = rng.uniform(0.1, 1)
    time = np.arange(round(tail * RATE)) / RATE
    room = rng.standard_normal(len(time)) * 10 ** (-3 * time / tail)
    wet = fftconvolve(sound, room)[: len(sound)]
    dry = np.sqrt(np.mean(sound**2) / max(np.mean(wet**2), 1e-12))
    return sound + wet * dry * 10 ** (-rng.uniform(6, 20) / 20)
