"""Which controls sing best? Sings lyrics of solfege songs under many settings and counts the right notes.

    l2m solfege TUNING --songs 64 --seed 777 ...           lyrics that neither training nor the demo's score has seen
    python scripts/tune_sampling.py RUN TUNING

First every temperature with every guidance, then, from the best of these, each other control by itself.
Prints a row a setting: the share of right notes, of songs with the right number of notes, of songs that ended by
themselves, nats a code under the model's own distribution; --out has the same as JSON.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import tyro

from l2m_jax.cli import answering
from l2m_jax.codec import decode
from l2m_jax.config import SampleConfig
from l2m_jax.notes import note_accuracy, track_notes
from l2m_jax.sample import said, sample_states
from l2m_jax.singer import load, make_prompt
from l2m_jax.solfege import words_of
from l2m_jax.songs import scan_songs

PLAIN = SampleConfig(top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, guidance_genre=1.0)
ALONE = {
    "top_k": (10, 50, 250),
    "top_p": (0.8, 0.9, 0.95),
    "min_p": (0.02, 0.05, 0.1),
    "repetition_penalty": (1.05, 1.2),
    "guidance_genre": (0.5, 1.5),
}


@dataclasses.dataclass(frozen=True)
class Tune:
    """Sing the same lyrics under many settings."""

    run: tyro.conf.Positional[Path]
    """Run folder of a model that sings solfege."""
    songs_folder: tyro.conf.Positional[Path]
    """Folder of solfege songs whose lyrics are sung."""
    out: Path = Path("tuning.json")
    """Where the table goes as JSON."""
    songs: int = 64
    """How many songs, sung as one batch."""
    temperatures: tuple[float, ...] = (0.4, 0.5, 0.7, 0.85, 1.0)
    """Tried with every guidance."""
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Of the lyrics; tried with every temperature."""


def main(job: Tune) -> None:
    """Sings, counts, prints."""
    singer = load(job.run)
    songs = scan_songs(job.songs_folder)[0][: job.songs]
    prompts = [make_prompt(singer, song.lyrics, song.genre)[0] for song in songs]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *prompts)
    frames, rows = singer.layout.frames, []

    def measure(rule: SampleConfig) -> float:
        states = sample_states(singer.model, singer.layout, together, rule, range(len(songs)), frames)
        sung = said(collections.deque(states, maxlen=1).pop(), singer.layout, frames)
        accuracies, counts = [], []
        for song, result in zip(songs, sung):
            asked = words_of(song.lyrics).split()
            notes = track_notes(decode(singer.codec, result.codes), singer.codec.rate)
            accuracies.append(note_accuracy([note.syllable for note in notes], asked))
            counts.append(len(notes) == len(asked))
        row = {
            "note_accuracy": float(np.mean(accuracies)),
            "right_number": float(np.mean(counts)),
            "ended": float(np.mean([song.ended for song in sung])),
            "nats_per_code": -sum(song.logprob for song in sung) / sum(song.codes.size for song in sung),
        }
        changed = {k: v for k, v in dataclasses.asdict(rule).items() if v != getattr(PLAIN, k) or k == "temperature"}
        rows.append({"sampling": dataclasses.asdict(rule)} | row)
        shown = "  ".join(f"{name} {value:6.3f}" for name, value in row.items())
        print(f"{shown}  {' '.join(f'{k}={v:g}' for k, v in changed.items())}", flush=True)
        job.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return row["note_accuracy"]

    grid = itertools.product(job.temperatures, job.guidances)
    settings = [dataclasses.replace(PLAIN, temperature=t, guidance_lyrics=g) for t, g in grid]
    best = max(settings, key=measure)
    for name, values in ALONE.items():
        for value in values:
            measure(dataclasses.replace(best, **{name: value}))


if __name__ == "__main__":
    with answering("tune_sampling"):
        main(tyro.cli(Tune))
