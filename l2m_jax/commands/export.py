"""`l2m export`: a trained model to pass on."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from l2m_jax.commands.arguments import Folder


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of a run as a small folder to pass on: float16, with a card; it can be used like the run."""

    run_folder: Annotated[Folder, tyro.conf.arg(name="run")]
    """Run folder of a trained model."""
    out: Folder
    """Folder to make."""
    step: int | None = None
    """Checkpoint; the newest by default."""
    licence: str = "unknown"
    """What the card says, such as apache-2.0; weights are derived from songs, whose licences bind them."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.shipped import export

        size = export(self.run_folder, self.out, self.step, self.licence)
        print(f"{self.out}: {size / 1e6:.1f} MB; sing with: l2m generate {self.out} --lyrics TEXT -o song.wav")
        return 0
