"""Ctrl-C and SIGTERM end long work at its next whole piece. After `progress`."""

from __future__ import annotations

import os
import signal
from typing import Any


class StopSignal:
    """Remembers SIGTERM or SIGINT until the piece at hand is done; a second one ends the process at once."""

    def __init__(self) -> None:
        self.by = ""
        self._old = {s: signal.signal(s, self._caught) for s in (signal.SIGTERM, signal.SIGINT)}

    def _caught(self, number: int, frame: Any) -> None:
        if self.by:
            os._exit(128 + number)
        self.by = signal.Signals(number).name

    @property
    def status(self) -> int:
        """Exit status of a process that this has stopped: 130 or 143, as shells have it; 0 where nothing has."""
        return 128 + signal.Signals[self.by] if self.by else 0

    def restore(self) -> None:
        """Gives the signals back to who had them."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
