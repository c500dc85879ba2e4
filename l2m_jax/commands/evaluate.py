"""`l2m evaluate`: does the music follow the words, and how well does it sound?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.commands.arguments import Folder
from l2m_jax.config import EvaluateConfig


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on held-out songs: writes evaluation.json, evaluation.md and plots.

    Bits per code with the right, another's and no lyrics and genre; word starts; songs sung from the lyrics, beside the
    codec's reconstructions of the true songs. A rerun sings only what is missing.
    """

    run_folder: Annotated[Folder, tyro.conf.arg(name="run")]
    """Run folder of a trained model."""
    data: Path
    """Prepared dataset of held-out songs."""
    out: Path | None = None
    """Folder for all that is written; RUN/evaluation by default."""
    valid: Path | None = None
    """Prepared dataset on whose word times attention heads are chosen; by default those of l2m align --choose stand,
    or a fifth of the held-out songs chooses."""
    reference: Path | None = None
    """What genres and Fréchet distances are measured against: a prepared dataset (its codec's reconstructions) or a
    folder of songs (their sound). By default the held-out songs, each without itself."""
    asr: str = ""
    """A speech recogniser of transformers, folder or hub id: word error rate, or that of phonemes where it writes
    them (extras torch and eval)."""
    step: int | None = None
    """Checkpoint; the newest by default."""
    codec: str = ""
    """The codec, where it is no longer where the songs were prepared with it."""
    text_encoder: str = ""
    """The text encoder, likewise."""
    settings: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=EvaluateConfig)

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.evaluate import evaluate, open_held_out
        from l2m_jax.heard import load_recogniser
        from l2m_jax.report import write_report

        out = self.out or self.run_folder / "evaluation"
        recogniser = load_recogniser(self.asr) if self.asr else None
        held_out = open_held_out(self.run_folder, self.data, self.step, self.codec, self.text_encoder)
        figures = evaluate(held_out, out, self.settings, self.valid, self.reference, recogniser)
        write_report(out, figures)
        return min(figures.get("generation", {}).get("failed", 0), 1)
