"""`l2m inspect`: what is in a prepared dataset, and in one of its songs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from l2m_jax.commands.arguments import Folder


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Tell what a prepared dataset holds; with SONG, what the model will see of that song."""

    data: Folder
    """Prepared dataset."""
    song: tyro.conf.Positional[str] = ""
    """One of its songs."""
    out: Path | None = None
    """Folder for SONG.wav, the song as its codes have it, and SONG.png, its picture."""
    codec: str = ""
    """The codec, where it is no longer where the songs were prepared with it."""
    text_encoder: str = ""
    """The text encoder, likewise."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.config import UserError
        from l2m_jax.data import Dataset
        from l2m_jax.inspection import describe, describe_song, draw_record, find_song

        if self.out is not None and not self.song:
            raise UserError("--out is for the sound and picture of one song: name the song")
        dataset = Dataset(self.data)
        if not self.song:
            print("\n".join(describe(dataset)))
            return 0
        record = find_song(dataset, self.song)
        print("\n".join(describe_song(record, dataset.made_with, self.text_encoder)))
        if self.out is not None:
            for path in draw_record(record, dataset.made_with, self.out, self.codec):
                print(path)
        return 0
