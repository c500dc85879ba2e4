"""What a training tells: metrics.jsonl, TensorBoard, and one live line. After `checkpoint`, before `sample`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - generated code
from tensorboardX.summary import audio, image, scalar

from l2m_jax.audio import write_atomic
from l2m_jax.progress import Bar


class Log:
    """Metrics of a run. Opened at a step, it drops what metrics.jsonl says of later ones: they are trained again."""

    def __init__(self, run: Path, step: int, steps: int, every: int, console: Console):
        path = run / "metrics.jsonl"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = before.splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
        if (after := "".join(line + "\n" for line in kept)) != before:
            write_atomic(path, after.encode())
        self._file = path.open("a", encoding="utf-8")
        (run / "tensorboard").mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and the training then waits for it for ever.
        self._board = EventsWriter(str(run / "tensorboard" / "events"))
        self._show(step, session_log=SessionLog(status=SessionLog.START))  # TensorBoard drops later steps too
        self._every = every
        self._bar = Bar(console, "training", steps, "steps", done=step).__enter__()

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; every `every` steps TensorBoard and, off a terminal, a printed line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        shown = step % self._every == 0 or "diagonality" in values
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self._bar.update(step + 1, text, line=shown)
        if shown:
            for name, value in values.items():
                self._show(step, summary=scalar(name, value))
            self._board.flush()

    def audio(self, step: int, samples: Float[np.ndarray, "T ..."], rate: int) -> None:
        """A sample song in TensorBoard: [T] or, of a stereo codec, [T, 2]."""
        self._show(step, summary=audio("sample", np.clip(samples, -1, 1), rate))

    def image(self, step: int, looks: Float[np.ndarray, "R F"]) -> None:
        """In TensorBoard: rows of the lyrics against frames, white where the best head looks; at most 1,024 wide."""
        looks = looks[:, :: -(-looks.shape[1] // 1024)]
        self._show(step, summary=image("attention", looks / max(looks.max(initial=0), 1e-6), dataformats="HW"))

    def _show(self, step: int, **content: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Writes what is buffered."""
        self._bar.__exit__(None, None, None)
        self._file.close()
        self._board.close()


class Silence:
    """The log of a process that does not tell."""

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Says nothing."""

    def audio(self, step: int, samples: np.ndarray, rate: int) -> None:
        """Says nothing."""

    def image(self, step: int, looks: np.ndarray) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Has nothing to write."""
