"""How many notes does a model sing right? Sings the lyrics of a folder of solfege songs and tracks the pitch.

    python scripts/solfege_score.py RUN SONGS OUT [--temperature 0.7] [--songs 64]

Writes OUT/score.json and, for the first few songs, sound and picture: what was asked for and what was sung.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

from l2m_jax.audio import read_audio, write_wav
from l2m_jax.codec import decode, encode
from l2m_jax.config import SampleConfig
from l2m_jax.notes import note_accuracy, track_notes
from l2m_jax.picture import Label, draw_song
from l2m_jax.request import Request
from l2m_jax.singer import load
from l2m_jax.solfege import words_of
from l2m_jax.songs import scan_songs


@dataclasses.dataclass(frozen=True)
class Score:
    """Sing the lyrics of solfege songs and count the right notes."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    songs_folder: tyro.conf.Positional[Path]
    """Folder of solfege songs whose lyrics are sung."""
    out: tyro.conf.Positional[Path]
    """Where score, sounds and pictures go."""
    songs: int = 64
    """How many songs, sung as one batch."""
    pictures: int = 3
    """How many of them are drawn and written."""
    sampling: SampleConfig = dataclasses.field(
        default_factory=lambda: SampleConfig(temperature=0.7, guidance_lyrics=2.0)
    )


def main(job: Score) -> None:
    """Sings, tracks, counts; beside it the same count for the codec's reconstruction of the true songs."""
    singer = load(job.run)
    codec = singer.codec
    songs = scan_songs(job.songs_folder)[0][: job.songs]
    rule = dataclasses.asdict(job.sampling)
    requests = [Request(lyrics=song.lyrics, genre=song.genre, seed=i, **rule) for i, song in enumerate(songs)]
    sung = singer.generate_batch(requests, batch=len(requests))
    job.out.mkdir(parents=True, exist_ok=True)
    accuracies, ceilings, perfect, counts = [], [], 0, 0
    for i, (song, result) in enumerate(zip(songs, sung)):
        asked = words_of(song.lyrics).split()
        notes = track_notes(result.samples, codec.rate)
        names = [note.syllable for note in notes]
        accuracies.append(note_accuracy(names, asked))
        perfect += names == asked
        counts += len(names) == len(asked)
        true = decode(codec, encode(codec, read_audio(song.audio, codec.rate)))
        ceilings.append(note_accuracy([note.syllable for note in track_notes(true, codec.rate)], asked))
        if i < job.pictures:
            write_wav(job.out / f"{song.id}.wav", result.samples, codec.rate)
            labels = [Label(note.syllable, note.start, note.end) for note in notes]
            title = f"{song.genre}: asked for {' '.join(asked)}; {accuracies[-1]:.0%} of the notes right"
            draw_song(job.out / f"{song.id}.png", result.samples, codec.rate, song.lyrics, {"sung": labels}, title)
    score = {
        "songs": len(songs),
        "note_accuracy": round(float(np.mean(accuracies)), 4),
        "codec_ceiling": round(float(np.mean(ceilings)), 4),
        "songs_without_a_mistake": round(perfect / len(songs), 4),
        "right_number_of_notes": round(counts / len(songs), 4),
        "ended_by_themselves": round(float(np.mean([s.ended for s in sung])), 4),
        "sampling": rule,
        "step": singer.step,
    }
    (job.out / "score.json").write_text(json.dumps(score, indent=2) + "\n", encoding="utf-8")
    print(
        f"{score['note_accuracy']:.1%} of the notes of {len(songs)} unseen lyrics are right "
        f"(the codec alone: {score['codec_ceiling']:.1%}); {score['songs_without_a_mistake']:.0%} of the songs have no "
        f"mistake, {score['ended_by_themselves']:.0%} ended by themselves"
    )


if __name__ == "__main__":
    main(tyro.cli(Score))
