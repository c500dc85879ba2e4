"""How good a codec is on sound that it was not trained on: the table of its model card, and one JSON line last.

    python scripts/codec_report.py [--codec solfege] [--songs FOLDER] [--minutes 10]

Solfege songs and procedural clips are made anew from seeds that no training uses. FOLDER holds real songs, as
`l2m prepare` takes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from l2m_jax.audio import read_audio
from l2m_jax.cli import answering
from l2m_jax.codec import Codec
from l2m_jax.notes import HOP, track_voice
from l2m_jax.quality import Quality, measure
from l2m_jax.solfege import CONSONANT, make_song
from l2m_jax.songs import scan_songs
from l2m_jax.sounds import KINDS, kind_of, make_clip
from l2m_jax.weights import load_codec

HELD_OUT = 987_654  # seed
NOTES = (8, 12)
MELODIES = ("solfege", "voice", "string", "fm", "analogue", "mixture")
"""Kinds with one melody, or one that leads. What looks voiced in drums, noise, chords and bands has no one pitch."""


def main(codec: str = "solfege", songs: Path | None = None, minutes: float = 10) -> None:
    """Prints the table."""
    loaded, real = load_codec(codec), scan_songs(songs)[0] if songs else []
    figures: dict[str, Any] = {"codec": loaded.name, "fingerprint": loaded.fingerprint}
    print(
        "| sound | mel distance | SI-SDR dB | median cents | within 50 cents | entries used | level dB | peak | rtf |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")

    def note(title: str, key: str, clips: list[tuple[Quality, np.ndarray, np.ndarray]]) -> None:
        figures[key] = _mean([clip[0] for clip in clips], loaded, np.concatenate([clip[2] for clip in clips]))
        _row(title, figures[key])

    parts, cents, qualities = [], [], []
    while sum(q.seconds for q in qualities) < 60 * minutes:
        samples, times = make_song(HELD_OUT, len(qualities), NOTES)[2:]
        quality, heard, codes = measure(loaded, samples)
        qualities.append(quality)
        parts.append(codes)
        cents += _note_errors(samples, heard, times, loaded.rate)
    solfege = _mean(qualities, loaded, np.concatenate(parts))
    notes = np.array(cents)
    figures["solfege"] = solfege | {
        "notes": len(notes),
        "notes_within_50_cents": float(np.mean(notes <= 50)),
        "note_cents_median": float(np.median(notes)),
    }
    _row(f"solfege, {len(qualities)} songs, frames", solfege)
    print(
        f"| solfege, {len(notes)} notes | | | {np.median(notes):.1f} | {np.mean(notes <= 50):.2%} | | | | |", flush=True
    )

    for kind in list(KINDS)[1:]:
        clips = [measure(loaded, make_clip(HELD_OUT, i, 4.0, kind)) for i in range(30)]
        note(f"{kind}, 30 clips of 4 s", kind, clips)
    drawn = [(kind_of(HELD_OUT, i), measure(loaded, make_clip(HELD_OUT, i, 4.0))) for i in range(240)]
    note("all kinds as drawn, 240 clips of 4 s", "drawn", [clip for _, clip in drawn])
    melodies = [clip for kind, clip in drawn if kind in MELODIES]
    note(f"of these {len(melodies)} of one melody", "melodies", melodies)

    for song in real:
        whole = measure(loaded, read_audio(song.audio, loaded.rate))
        note(f"{song.id}, {whole[0].seconds:.0f} s", song.id, [whole])
    print(json.dumps(figures))


def _note_errors(samples: np.ndarray, heard: np.ndarray, times: np.ndarray, rate: int) -> list[float]:
    """Cents by which the pitch of each note's vowel moved: medians over its frames, before and after."""
    before, after = (track_voice(x, rate)[1] for x in (samples, heard))
    errors = []
    for start, end, _ in times:
        vowel = slice(round((start + CONSONANT + 0.02) / HOP), round((end - 0.03) / HOP))
        errors.append(float(1200 * abs(np.log2(np.median(after[vowel]) / np.median(before[vowel])))))
    return errors


def _mean(qualities: list[Quality], codec: Codec, codes: np.ndarray) -> dict[str, Any]:
    """Means weighted by seconds (pitch: by voiced seconds), codebook use over all codes."""
    seconds = [q.seconds for q in qualities]
    voiced = [q for q in qualities if q.pitch_cents_median is not None]

    def mean(name: str) -> float:
        return float(np.average([getattr(q, name) for q in qualities], weights=seconds))

    def pitch(name: str) -> float | None:
        return (
            float(np.average([getattr(q, name) for q in voiced], weights=[q.voiced_s for q in voiced]))
            if voiced
            else None
        )

    return {
        "seconds": sum(seconds),
        "mel_distance": mean("mel_distance"),
        "si_sdr_db": mean("si_sdr_db"),
        "pitch_cents_median": pitch("pitch_cents_median"),
        "pitch_within_50_cents": pitch("pitch_within_50_cents"),
        "voiced_s": sum(q.voiced_s for q in qualities),
        "entries_used": [len(np.unique(book)) / codec.entries for book in codes.T],
        "level_db": mean("level_db"),
        "peak": max(q.peak for q in qualities),
        "rtf": mean("rtf"),
    }


def _row(name: str, x: dict[str, Any]) -> None:
    cents = "-" if x["pitch_cents_median"] is None else f"{x['pitch_cents_median']:.1f}"
    within = "-" if x["pitch_within_50_cents"] is None else f"{x['pitch_within_50_cents']:.1%}"
    used = ", ".join(f"{share:.0%}" for share in x["entries_used"])
    print(
        f"| {name} | {x['mel_distance']:.2f} | {x['si_sdr_db']:.1f} | {cents} | {within} | {used} "
        f"| {x['level_db']:.1f} | {x['peak']:.2f} | {x['rtf']:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    with answering("codec_report"):
        tyro.cli(main)
