"""`l2m train`: a dataset to a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, UserError


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on a prepared dataset; the same command goes on where a stopped run was."""

    data: Path
    """Prepared dataset."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Run folder: config, metrics, checkpoints."""
    config: str = "small"
    """Preset (tiny, small, base, large, demo, benchmark) or path of a Python file that defines `config`."""
    valid: Path | None = None
    """Prepared dataset of held-out songs; its loss is logged."""
    coordinator: str = ""
    """More than one process where JAX does not find the others itself: HOST:PORT of process 0 (docs/parallel.md)."""
    processes: int = 0
    """With --coordinator: how many processes there are."""
    process: int = -1
    """With --coordinator: which of them this is, from 0."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.compiled import keep_compiled
        from l2m_jax.data import Dataset
        from l2m_jax.hosts import join, lead, leave, together
        from l2m_jax.train import train
        from l2m_jax.weights import load_codec

        join(self.coordinator, self.processes, self.process)
        keep_compiled()
        config = Config(self.model, self.train, self.mesh)
        with together():
            dataset = Dataset(self.data)
            valid = None if self.valid is None else Dataset(self.valid)
            made = dataset.made_with
            codec = load_codec(made.codec, made.codebooks) if self.train.sample_every else None
            if codec is not None and codec.fingerprint != made.codec_fingerprint:
                raise UserError(
                    f"{self.data} was prepared with {made.codec} [{made.codec_fingerprint}], where {codec.name} "
                    f"[{codec.fingerprint}] is now: train without --train.sample-every, or prepare the songs anew"
                )
        status = train(config, dataset, self.run_folder, codec, valid)
        with together():
            leave()
        if lead() and not status:
            print(f"trained: {self.run_folder}; sing with: l2m generate {self.run_folder} --lyrics TEXT -o song.wav")
        return status
