"""`l2m align`: when each word of a song is sung."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.commands.arguments import Folder
from l2m_jax.config import UserError
from l2m_jax.request import read_text


@dataclasses.dataclass(frozen=True)
class Align:
    """Tell when each word of a song is sung: writes song.lrc, lines and words at their times.

    The song may be real or generated. --choose first finds the attention heads of the model that follow the words.
    """

    run_folder: Annotated[Folder, tyro.conf.arg(name="run")]
    """Run folder of a trained model."""
    song: tyro.conf.Positional[str] = ""
    """A song folder (song_001/), a song of l2m generate (song.wav beside its song.json), or sound with --lyrics."""
    choose: Path | None = None
    """Prepared songs, best held out and with word times (words.csv), on which heads are chosen: RUN/alignment.json."""
    songs: int = 32
    """Songs of --choose that are used."""
    lyrics: str = ""
    """A text file, or the lyrics themselves, where the song does not bring them."""
    genre: str = ""
    """The genre, likewise."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file of times; song.lrc beside the song, or in its folder, by default."""
    picture: bool = False
    """Draw song.png beside it: waveform, spectrogram, the words at their times."""
    step: int | None = None
    """Checkpoint; the newest by default."""
    codec: str = ""
    """The codec, where it is no longer where the songs were prepared with it."""
    text_encoder: str = ""
    """The text encoder, likewise."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        if not self.song and self.choose is None:
            raise UserError("name a song to align, or choose heads with --choose DATA")
        if self.songs < 1:
            raise UserError(f"--songs is {self.songs}; allowed: 1 and above")
        if self.out is not None and self.out.suffix.lower() != ".lrc":
            raise UserError(f"{self.out}: the output must end in .lrc")
        import numpy as np

        from l2m_jax.align import alignment_errors
        from l2m_jax.data import Dataset
        from l2m_jax.lrc import choose_reading, describe_errors, labels, read_source, time_words, write_lrc
        from l2m_jax.picture import draw_file
        from l2m_jax.singer import load

        singer = load(self.run_folder, self.step, self.codec, self.text_encoder)
        if self.choose is not None:
            reading, errors = choose_reading(singer, Dataset(self.choose), self.songs)
            heads = ", ".join(f"{head} of layer {layer}" for layer, head in reading.heads)
            found = describe_errors(errors) if errors.words else "by how it goes along: no word times are known"
            print(f"{self.run_folder / 'alignment.json'}: heads {heads}; {found}")
        if not self.song:
            return 0
        source = read_source(Path(self.song), singer, read_text(self.lyrics), self.genre)
        out = self.out or source.out
        times, warnings = time_words(singer, source.codes, source.lyrics, source.genre)
        write_lrc(out, source.lyrics, times)
        if self.picture:
            draw_file(source.sound, source.lyrics, labels(source.lyrics, times), out.with_suffix(".png"))
        for warning in warnings:
            print(f"warning: {warning}")
        print(f"{out}: {np.isfinite(times[:, 0]).sum()} words")
        if source.starts is not None and (errors := alignment_errors(times[:, 0], source.starts)).words:
            print(f"against words.csv: {describe_errors(errors)}")
        return 0
