"""How far a long job is: a live bar on a terminal, a line now and then anywhere else. After `config`."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(console: Console, text: str) -> None:
    """One line as it is, above a bar where there is one: not wrapped, and a "[verse]" or a path is no markup."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class Bar:
    """Progress of a job of `total` units (`unit` names them); use it as a context, and tell it how much is done."""

    def __init__(self, console: Console, what: str, total: float, unit: str, done: float = 0):
        self._console, self._what, self._total, self._unit = console, what, total, unit
        self._start, self._first, self._printed = time.monotonic(), done, done
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.7g} of {task.total:.7g} " + unit),
        )
        self._live = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self._task = self._live.add_task(what, total=total)
        self._live.update(self._task, completed=done)

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, done: float, text: str = "", line: bool | None = None) -> None:
        """`done` of the total; `text` replaces the description.

        Off a terminal a line is printed when `line` says so, by default at every tenth of the job.
        """
        if self._console.is_terminal:
            self._live.update(self._task, completed=done, description=text or self._what)
            return
        if line is None:
            line = done - self._printed >= self._total / 10 or done >= self._total > self._printed
        if line:
            self._printed = done
            share = (done - self._first) / max(self._total - self._first, 1e-9)
            left = (time.monotonic() - self._start) * (1 / share - 1) if share > 0 else 0
            say(self._console, f"{text or self._what}: {done:.7g} of {self._total:.7g} {self._unit}, {left:.0f} s left")
