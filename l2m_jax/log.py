"""What a training tells: metrics.jsonl, TensorBoard, and one live line. After `checkpoint`, before `sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class Log:
    """Metrics of a run. Opened at a step, it drops what metrics.jsonl says of later ones: they will be trained again."""

    def __init__(self, run: Path, step: int, steps: int, every: int, console: Console):
        path = run / "metrics.jsonl"
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step if step else None)
        self._every, self._console = every, console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps, completed=step)
        self._progress.start()

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; every `every` steps TensorBoard and, where there is no terminal, a printed line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self._progress.update(self._task, completed=step + 1, description=text)
        if step % self._every == 0 or "valid_loss" in values:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            if not self._console.is_terminal:
                self._console.print(f"step {step}  {text}", highlight=False, soft_wrap=True)

    def audio(self, step: int, samples: np.ndarray, rate: int) -> None:
        """A sample song in TensorBoard."""
        self._board.add_audio("sample", samples[None], step, sample_rate=rate)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Writes what is buffered."""
        self._progress.stop()
        self._file.close()
        self._board.close()
