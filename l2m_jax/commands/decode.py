"""`l2m decode`: codes to sound."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from l2m_jax.commands.arguments import Folder


@dataclasses.dataclass(frozen=True)
class Decode:
    """Turn codes (song.ecdc or song.npz) into sound."""

    codes: Folder
    """A .ecdc or .npz."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out.wav")
    """The sound."""
    codec: str = "solfege"
    """The codec that the codes are of: `solfege`, a folder, a checkpoint of Meta's (.th), or a hub id."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.generate import decode_file

        print(f"{self.out}: {decode_file(self.codes, self.out, self.codec):.1f} s")
        return 0
