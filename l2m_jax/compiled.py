"""Compiled programs that outlive the process: JAX's persistent compilation cache. The commands switch it on.

And how long this process has been compiling: what is sung or trained takes no longer for it the next time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

_seconds = [0.0]


def _heard(event: str, duration_secs: float, **about: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":  # or reading it from the cache
        _seconds[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_heard)


def compiling() -> float:
    """Seconds that XLA has compiled in this process until now."""
    return _seconds[0]


def keep_compiled() -> None:
    """Keeps compiled programs in $XDG_CACHE_HOME/l2m_jax (~/.cache/l2m_jax), so that the next run starts at once.

    $JAX_COMPILATION_CACHE_DIR goes before; where the folder cannot be written, each run compiles for itself.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2m_jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter: no home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small ones add up
