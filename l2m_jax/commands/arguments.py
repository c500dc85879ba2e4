"""Kinds of arguments that commands share."""

from __future__ import annotations

from pathlib import Path

import tyro

from l2m_jax.config import UserError

Folder = tyro.conf.Positional[Path]


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
