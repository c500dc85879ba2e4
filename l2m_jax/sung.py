"""Whether songs sing the notes that their solfege lyrics name. After `notes` and `bootstrap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from l2m_jax.bootstrap import estimate, share
from l2m_jax.notes import Note, note_accuracy, track_notes
from l2m_jax.solfege import SYLLABLES, words_of


class Sung(NamedTuple):
    """What a solfege song was to sing, and what it sang."""

    asked: list[str]
    notes: list[Note]

    @property
    def names(self) -> list[str]:
        """Syllables of the notes that were sung."""
        return [note.syllable for note in self.notes]

    @property
    def accuracy(self) -> float:
        """See `notes.note_accuracy`."""
        return note_accuracy(self.names, self.asked)


def is_solfege(lyrics: str) -> bool:
    """Whether every word is a syllable that names a note, and there is one."""
    words = words_of(lyrics).split()
    return bool(words) and set(words) <= set(SYLLABLES)


def listen(samples: Float[np.ndarray, " T"], rate: int, lyrics: str) -> Sung:
    """Tracks the notes of a mono song at `rate` Hz whose solfege lyrics are `lyrics`."""
    return Sung(words_of(lyrics).split(), track_notes(samples, rate))


def score(songs: Sequence[Sung]) -> dict[str, Any]:
    """Share of notes that are right, of songs with the right number of notes and without a mistake; with intervals."""
    asked = np.array([len(song.asked) for song in songs], float)
    return {
        "songs": len(songs),
        "note_accuracy": estimate(np.array([song.accuracy for song in songs]) * asked, asked),
        "right_number_of_notes": share([len(song.notes) == len(song.asked) for song in songs]),
        "songs_without_a_mistake": share([song.names == song.asked for song in songs]),
    }
