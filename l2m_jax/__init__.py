"""Full lyrics and a genre go in, a whole song comes out.

import l2m_jax

model = l2m_jax.load("run")
song = model.generate(lyrics="sol mi do", genre="march")
song.save("song.wav")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2m_jax.config import UserError
    from l2m_jax.request import Request
    from l2m_jax.singer import Singer, Stream, load
    from l2m_jax.song import Song

__all__ = ["Request", "Singer", "Song", "Stream", "UserError", "load"]
_HOMES = {"UserError": "config", "Request": "request", "Song": "song"}  # the others: singer


def __getattr__(name: str) -> Any:
    """What is public, imported when it is asked for: `import l2m_jax` alone imports no JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'l2m_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"l2m_jax.{_HOMES.get(name, 'singer')}"), name)
