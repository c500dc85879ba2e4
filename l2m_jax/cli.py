"""The command `l2m`; its subcommands are in `commands/`, which import JAX only when run, so that --help is quick.

Exit status: 0 done; 1 done, but something was left out; 2 a mistake in the command or its input; 130 (Ctrl-C) and 143
(SIGTERM) stopped, to be gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.commands.align import Align
from l2m_jax.commands.codec import Codec
from l2m_jax.commands.decode import Decode
from l2m_jax.commands.evaluate import Evaluate
from l2m_jax.commands.export import Export
from l2m_jax.commands.generate import Generate
from l2m_jax.commands.inspect import Inspect
from l2m_jax.commands.plan import Plan
from l2m_jax.commands.prepare import Prepare
from l2m_jax.commands.solfege import Solfege
from l2m_jax.commands.train import Train
from l2m_jax.config import Config, UserError

PRESETS = ("tiny", "small", "base", "large", "demo", "benchmark")


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
    with answering("l2m"):
        sys.exit(parse(sys.argv[1:] if arguments is None else arguments).run())


@contextlib.contextmanager
def answering(name: str) -> Iterator[None]:
    """Where a user's mistake, or a signal, ends the process: in a line, after `name`, with its exit status."""
    try:
        yield
        return
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def parse(
    arguments: list[str],
) -> Prepare | Inspect | Train | Plan | Generate | Align | Evaluate | Export | Decode | Codec | Solfege:
    """The command of the arguments; a preset gives the defaults of `train` and `plan`."""
    preset = Config()
    if arguments[:1] in (["train"], ["plan"]):
        named = [b for a, b in itertools.pairwise(arguments) if a == "--config"]
        named += [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
        preset = load_preset(named[-1] if named else "small")
    train = Train(tyro.MISSING, tyro.MISSING, model=preset.model, train=preset.train, mesh=preset.mesh)
    plan = Plan(tyro.MISSING, model=preset.model, train=preset.train)
    commands = (
        Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Plan, tyro.conf.subcommand("plan", default=plan)]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Align, tyro.conf.subcommand("align")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[Codec, tyro.conf.subcommand("codec")]
        | Annotated[Solfege, tyro.conf.subcommand("solfege")]
    )
    return tyro.cli(
        commands, prog="l2m", description="Full lyrics and a genre go in, a whole song comes out.", args=arguments
    )


if __name__ == "__main__":
    main()
