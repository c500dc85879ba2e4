"""`l2m generate`: lyrics and a genre to a song."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.commands.arguments import Folder, read_text
from l2m_jax.config import SampleConfig


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sing a song: writes song.wav, song.ecdc, song.npz and song.json."""

    run_folder: Annotated[Folder, tyro.conf.arg(name="run")]
    """Run folder of a trained model."""
    lyrics: str
    """A UTF-8 text file, or the lyrics themselves."""
    genre: str = ""
    """The genre, in words; empty lets the model choose."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("song.wav")
    """The song; its .ecdc, .npz and .json stand beside it."""
    seconds: float | None = None
    """Longest that the song may get; the model's window by default. It ends earlier by itself."""
    seed: int = 0
    """The same seed gives the same song."""
    step: int | None = None
    """Checkpoint; the newest by default."""
    codec: str = ""
    """The codec, where it is no longer where the songs were prepared with it."""
    text_encoder: str = ""
    """The text encoder, likewise."""
    picture: bool = False
    """Draw song.png: waveform, spectrogram, lyrics."""
    sampling: Annotated[SampleConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SampleConfig)

    def run(self) -> int:
        """Does it; returns the exit status."""
        from rich.console import Console

        from l2m_jax.generate import check_output, generate, load_singer
        from l2m_jax.progress import Bar

        check_output(self.out)
        lyrics = read_text(self.lyrics)
        singer = load_singer(self.run_folder, self.step, self.codec, self.text_encoder)
        limit = singer.longest if self.seconds is None else self.seconds
        with Bar(Console(), "singing", limit, "s at most") as bar:
            about = generate(singer, lyrics, self.genre, self.out, self.sampling, self.seed, limit, bar.update)
        for warning in about["warnings"]:
            print(f"warning: {warning}")
        if self.picture:
            from l2m_jax.picture import draw_file

            draw_file(self.out, lyrics)
        print(f"{self.out}: {about['seconds']:.1f} s, {about['cut'] or 'ended by itself'}")
        return 0
