"""Pictures of songs, for people who would rather look than read. Before `generate`; imports matplotlib when used."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.signal import ShortTimeFFT

from l2m_jax.audio import read_audio
from l2m_jax.config import UserError


class Label(NamedTuple):
    """A word under the spectrogram, from `start` to `end` in seconds."""

    text: str
    start: float
    end: float


def draw_song(
    path: Path,
    samples: Float[np.ndarray, " T"],
    rate: int,
    lyrics: str,
    rows: dict[str, Sequence[Label]] | None = None,
    title: str = "",
) -> None:
    """Waveform, spectrogram, rows of labels at their times, and the lyrics under it, as a PNG.

    A song with labels is the wider the longer it is; labels that would stand in each other's way are put lower.
    """
    plt = _pyplot()
    rows = rows or {}
    seconds = len(samples) / rate
    width = min(max(11, seconds / 4), 40) if any(rows.values()) else 11
    lows = {name: stagger(words, 0.1 * seconds / width) for name, words in rows.items()}
    heights = [1, 3, *(0.35 + 0.2 * max(low, default=0) for low in lows.values())]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(width, 1.5 * sum(heights) / 1.2), height_ratios=heights, sharex=True, squeeze=False
    )
    wave, spectrum, *labels = axes[:, 0]
    wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4, color="#245a8d")
    wave.set(ylim=(-1, 1), yticks=[])
    wave.set_title(title, parse_math=False)
    _spectrogram(spectrum, samples, rate)
    for axis, (name, words) in zip(labels, rows.items()):
        lines = 1 + max(lows[name], default=0)
        axis.set(ylim=(lines, 0), yticks=[], ylabel="")
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
        for word, low in zip(words, lows[name]):
            height = 1 - (low + 1) / lines, 1 - low / lines
            axis.axvspan(word.start, word.end, *height, facecolor="#d5e5f5", edgecolor="white")
            axis.text(word.start, low + 0.5, word.text, va="center", fontsize=9, clip_on=True, parse_math=False)
    axes[-1, 0].set(xlim=(0, max(seconds, 0.01)), xlabel="seconds")
    lines = [line for line in lyrics.splitlines() if line.strip()]
    shown = lines if len(lines) <= 12 else [*lines[:11], f"... {len(lines) - 11} more lines"]
    figure.text(0.5, -0.01, "\n".join(shown), ha="center", va="top", fontsize=10, parse_math=False)
    _save(plt, figure, path)


def draw_spectrograms(path: Path, sounds: dict[str, Float[np.ndarray, " T"]], rate: int, columns: int = 1) -> None:
    """Spectrograms under their names, row by row, to compare them by eye."""
    plt = _pyplot()
    rows = -(-len(sounds) // columns)
    size = (max(11, 5.5 * columns), 2.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (name, samples) in zip(axes.flat, sounds.items()):
        _spectrogram(axis, samples, rate)
        axis.set_title(name, fontsize=10, parse_math=False)
    longest = max(len(samples) for samples in sounds.values()) / rate
    for axis in axes.flat[len(sounds) :]:
        axis.set_axis_off()
    axes[-1, 0].set(xlabel="seconds", xlim=(0, max(longest, 0.01)))
    _save(plt, figure, path)


def draw_lines(path: Path, x: Sequence[float], curves: dict[str, Sequence[float | None]], across: str, up: str) -> None:
    """Named curves over the same x; None leaves a gap."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, y in curves.items():
        axis.plot(x, y, marker="o", label=name)
    axis.set(xlabel=across, ylabel=up)
    axis.legend()
    _save(plt, figure, path)


def draw_bars(path: Path, bars: dict[str, tuple[float, float | None, float | None]], across: str) -> None:
    """Named values, with the interval (low, high) of those that have one."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(bars) + 1.2), layout="constrained")
    for row, (value, low, high) in enumerate(bars.values()):
        axis.barh(row, value, color="#8fb8de")
        if low is not None:
            axis.plot([low, high], [row, row], color="#1d3d5c", marker="|")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set(xlabel=across)
    axis.invert_yaxis()
    _save(plt, figure, path)


def draw_confusion(path: Path, tables: dict[str, dict[str, dict[str, int]]]) -> None:
    """Of each named table, how often each kind (rows) was taken for each (columns)."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(tables), figsize=(4.5 * len(tables), 4), squeeze=False, layout="constrained")
    for axis, (title, table) in zip(axes[0], tables.items()):
        names = list(table)
        counts = np.array([[table[a][b] for b in names] for a in names])
        axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            axis.text(column, row, str(count), ha="center", va="center")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        axis.set(xlabel="sounds like", ylabel="is of", title=title)
    _save(plt, figure, path)


def draw_file(song: Path, lyrics: str, words: Sequence[Label] = (), out: Path | None = None) -> None:
    """song.png, or `out`, of a file of sound, with the words at their times where they are known."""
    rows = {"words": words} if words else {}
    draw_song(out or song.with_suffix(".png"), read_audio(song, 24_000), 24_000, lyrics, rows, song.name)


def stagger(labels: Sequence[Label], letter: float) -> list[int]:
    """Row of each label, from 0: the first in which none before it reaches its start; a letter takes `letter` s."""
    ends: list[float] = []
    found = []
    for label in labels:
        row = next((i for i, end in enumerate(ends) if end <= label.start), len(ends))
        ends[row : row + 1] = [max(label.end, label.start + letter * (len(label.text) + 1))]
        found.append(row)
    return found


def _spectrogram(axis: Any, samples: np.ndarray, rate: int) -> None:
    """Decibels from 80 Hz to 8 kHz, logarithmic, as melodies are."""
    window = 2048
    padded = np.pad(samples, (0, max(window - len(samples), 0)))
    transform = ShortTimeFFT(np.hanning(window), hop=240, fs=rate, mfft=2 * window)
    power = transform.spectrogram(padded.astype(np.float64))
    level = 10 * np.log10(power + 1e-10)
    times = np.arange(level.shape[1]) * 240 / rate + transform.p_min * 240 / rate
    kept = transform.f >= 80
    axis.pcolormesh(
        times, transform.f[kept], level[kept], vmin=level.max() - 70, vmax=level.max(), cmap="magma", shading="nearest"
    )
    axis.set(yscale="log", ylim=(80, 8000), xlim=(0, max(len(samples) / rate, 0.01)), ylabel="Hz")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # emoji: a box is drawn, which says as much
            figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)
