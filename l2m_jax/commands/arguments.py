"""Kinds of arguments that commands share."""

from __future__ import annotations

from pathlib import Path

import tyro

Folder = tyro.conf.Positional[Path]
