"""`l2m solfege`: the corpus that the project makes itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from l2m_jax.commands.arguments import Folder


@dataclasses.dataclass(frozen=True)
class Solfege:
    """Make a small corpus of sung solfege songs with lyrics, genres and word times."""

    out: Folder
    """Folder of songs to make."""
    songs: int = 64
    """How many."""
    seed: int = 7
    """The same seed gives the same songs."""
    notes: tuple[int, int] = (4, 10)
    """Fewest and most notes of a song."""
    sections: float = 0.0
    """Share of songs that are [verse], [chorus], [verse], [chorus], both choruses of the same words."""
    repeats: float = 0.0
    """Chance that a syllable is the one before once more, beside what chance gives (one in seven)."""
    exclude: tuple[Path, ...] = ()
    """Folders of songs whose lyrics must not be sung again: what is made is held out from them."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.solfege import make_solfege, words_of
        from l2m_jax.songs import scan_songs

        known = {words_of(song.lyrics) for folder in self.exclude for song in scan_songs(folder)[0]}
        make_solfege(self.out, self.songs, self.seed, self.notes, self.sections, known, self.repeats)
        print(f"{self.songs} songs in {self.out}")
        return 0
