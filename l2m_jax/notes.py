"""What was sung: the notes of a solfege song, read back from its sound, and how well they follow the lyrics.

Harmonic-sum pitch tracking (Noll, 1970; Hermes, 1988) over the one octave that the solfege voice uses; a note ends
where the pitch changes or the voice dips.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.signal import find_peaks, medfilt

from l2m_jax.solfege import CONSONANT, NOTE_HZ, SYLLABLES

HOP = 0.01  # seconds between frames
WINDOW = 0.05  # seconds; Hann, so half of it counts
SHORTEST = 0.08  # seconds of a note
SILENCE_DB = -12.0  # below the loud notes of the song
FLOOR_DB = -50.0  # of full scale: nothing is sung below
CLEAR = 0.2  # share of harmonics in a sound below which it is noise
DIP_DB = 5.0  # depth that parts two equal notes
HARMONICS = 5
SMOOTH = 5  # frames of the median that mends single wrong pitches

SCALE = np.array([NOTE_HZ[name] for name in SYLLABLES])
GRID = NOTE_HZ["do"] * 2 ** (np.arange(-6, 120) / 120)  # candidate pitches, 10 cents apart


class Note(NamedTuple):
    """One sung note."""

    syllable: str
    start: float
    """Seconds."""
    end: float
    """Seconds."""
    hz: float
    """Measured fundamental."""


def track_notes(samples: Float[np.ndarray, " T"], rate: int) -> list[Note]:
    """Notes sung in a mono song, in order.

    `samples` are at `rate` Hz. Each note is named after the nearest of the seven `NOTE_HZ`.
    """
    if len(samples) < SHORTEST * rate:
        return []
    level, pitch = track_voice(np.asarray(samples, np.float32), rate)
    nearest = np.abs(np.log2(pitch[:, None] / SCALE)).argmin(1)
    voiced = level > max(np.percentile(level, 90) + SILENCE_DB, FLOOR_DB)
    parts = np.zeros(len(level) + 1, bool)  # a note begins at this frame
    parts[find_peaks(-level, prominence=DIP_DB)[0]] = True
    parts[1:-1] |= (nearest[1:] != nearest[:-1]) | (voiced[1:] != voiced[:-1])
    parts[[0, -1]] = True
    edges = np.flatnonzero(parts)

    notes, shortest = [], round(SHORTEST / HOP)
    for first, last in pairwise(edges):
        if voiced[first] and last - first >= shortest:
            hz = float(np.median(pitch[first:last]))
            start = max(float(first * HOP) - CONSONANT, 0.0)  # the vowel is tracked; its consonant comes before it
            notes.append(Note(SYLLABLES[nearest[first]], start, float(last * HOP), hz))
    return notes


def note_accuracy(sung: Sequence[str], lyric: Sequence[str]) -> float:
    """max(0, 1 - edit distance / words of the lyric): 1 where every word is sung once, in order (Levenshtein, 1966)."""
    row = list(range(len(lyric) + 1))
    for i, note in enumerate(sung, 1):
        diagonal, row[0] = row[0], i
        for j, word in enumerate(lyric, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (note != word))
    return max(0.0, 1 - row[-1] / max(len(lyric), 1))


def track_voice(samples: Float[np.ndarray, " T"], rate: int) -> tuple[Float[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """Level in dB and pitch in Hz of the voice, every HOP seconds."""
    hop, window = round(HOP * rate), round(WINDOW * rate)
    padded = np.pad(samples, window // 2)  # frame i is centred at i HOP
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * np.hanning(window).astype(np.float32)
    size = 4 * 2 ** int(np.ceil(np.log2(window)))
    spectrum = np.abs(np.fft.rfft(frames, size)) * 4 / window  # a sine shows its amplitude
    bins = np.rint(GRID[:, None] * np.arange(1, HARMONICS + 1) * size / rate).astype(int)
    combs = spectrum[:, bins]  # [frames, pitches, harmonics]
    best = (combs * 0.8 ** np.arange(HARMONICS)).sum(-1).argmax(1)
    energy = (combs[np.arange(len(best)), best] ** 2).sum(-1)
    # Share of the sound that the harmonics explain: a sine spreads over 1.5 size / window bins of a Hann spectrum.
    share = energy * 1.5 * size / window / ((spectrum**2).sum(-1) + 1e-9)
    return 10 * np.log10(np.where(share > CLEAR, energy, 0) + 1e-9), medfilt(GRID[best], SMOOTH)
