"""`l2m generate`: lyrics and a genre to a song, to several, or to sound in a pipe; requests to songs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.config import UserError
from l2m_jax.request import Request, read_text


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sing a song: writes song.wav, song.ecdc, song.npz and song.json.

    Ctrl-C ends it early and keeps what was sung by then.
    """

    run_folder: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(name="run")] = None
    """Run folder of a trained model; without one, the model that comes with the package sings."""
    request: Annotated[Request, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Request)
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("song.wav")
    """The song; its .ecdc, .npz and .json stand beside it. `-` sends a WAV to standard output while it is sung."""
    count: int = 1
    """Variations to sing, with seed, seed + 1, ...: song_1.wav is the likeliest to the model; song.png shows all."""
    requests: Path | None = None
    """A file with a JSON object a line: id, lyrics, genre, any other of these controls; --out is then a folder.
    What a line does not say is as on the command line. A rerun sings only what is missing."""
    batch: int = 8
    """Songs of --count or --requests that are sung at the same time; fewer take less memory."""
    step: int | None = None
    """Checkpoint; the newest by default."""
    codec: str = ""
    """The codec, where it is no longer where the songs were prepared with it."""
    text_encoder: str = ""
    """The text encoder, likewise."""
    picture: bool = False
    """Draw song.png: waveform, spectrogram, lyrics; each word at its time once l2m align --choose has been run."""
    lrc: bool = False
    """Write song.lrc: lines and words at their times."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        self._check()
        from l2m_jax.generate import check_output, sing_one, sing_requests, sing_variations, variation
        from l2m_jax.singer import load
        from l2m_jax.stop import StopSignal

        request = dataclasses.replace(self.request, lyrics=read_text(self.request.lyrics))
        out = None if str(self.out) == "-" else self.out
        if out and not self.requests:
            for path in [variation(out, i + 1) for i in range(self.count)] if self.count > 1 else [out]:
                check_output(path, request.prompt)
        singer, failed = load(self.run_folder, self.step, self.codec, self.text_encoder), 0
        stop = StopSignal()
        try:
            if self.requests:
                failed = sing_requests(singer, self.requests, request, self.batch, self.out, stop)
            elif self.count > 1:
                sing_variations(singer, request, self.count, self.batch, self.out, stop)
            else:
                sing_one(singer, request, out, self.picture, stop, self.lrc)
        finally:
            stop.restore()
        return stop.status or min(failed, 1)

    def _check(self) -> None:
        """What does not go together; before the long work."""
        for name in ("count", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; allowed: 1 and above")
        piped, several = str(self.out) == "-", self.count > 1 or self.requests is not None
        if piped and (several or self.picture or self.lrc):
            raise UserError("-o - sends one song to a pipe: not with --count, --requests, --picture or --lrc")
        if piped and sys.stdout.isatty():
            raise UserError("-o - sends a WAV to a pipe, as in: l2m generate ... -o - | ffplay -; here is a terminal")
        if self.lrc and several:
            raise UserError("--lrc is for one song: not with --count or --requests; l2m align times any song later")
        if self.requests is not None and (self.count > 1 or self.picture):
            raise UserError("--requests goes with neither --count nor --picture")
        if self.requests is not None and (self.out.suffix.lower() == ".wav" or self.out.is_file()):
            raise UserError(f"--requests puts its songs into a folder: --out FOLDER, not {self.out}")
        if self.requests is None and not self.request.lyrics.strip():
            raise UserError("--lyrics is needed: a text file, or the lyrics themselves; or --requests FILE")
