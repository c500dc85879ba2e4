"""What turns sound and text into records, by name: codec and text encoder, ours or the torch originals.

After `data` and `originals`, before `prepare`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from l2m_jax.codec import Codec, encode_many
from l2m_jax.config import TEXT_LAYER
from l2m_jax.data import VERSION, MadeWith
from l2m_jax.lyrics import TextEncoder
from l2m_jax.originals import TorchCodec, load_torch_codec, load_torch_text_encoder
from l2m_jax.published import SHIPPED
from l2m_jax.weights import load_codec, load_text_encoder

Backend = Literal["jax", "torch"]
BATCH = 8
"""Songs of similar length that an accelerator encodes together."""


class Encoders(NamedTuple):
    """Names of what turns sound and text into records, as `weights` takes them."""

    codec: str = "solfege"
    codebooks: int | None = None
    text_encoder: str = "minilm"
    text_layer: int = TEXT_LAYER
    codec_backend: Backend = "jax"
    text_backend: Backend = "jax"

    def load(self) -> tuple[Codec | TorchCodec, TextEncoder]:
        """Both, loaded."""
        load = load_torch_codec if self.codec_backend == "torch" else load_codec
        return load(self.codec, self.codebooks), self.load_text_encoder()

    def load_text_encoder(self) -> TextEncoder:
        """The text encoder alone."""
        load = load_torch_text_encoder if self.text_backend == "torch" else load_text_encoder
        return load(self.text_encoder, self.text_layer)


def signature(encoders: Encoders, codec: Codec | TorchCodec, encoder: TextEncoder) -> MadeWith:
    """What records made by these carry."""

    def place(name: str) -> str:
        packaged = name in (*SHIPPED, "minilm")  # whatever is called so here
        return str(Path(name).resolve()) if Path(name).exists() and not packaged else name

    return MadeWith(
        version=VERSION,
        codec=place(encoders.codec),
        codec_fingerprint=codec.fingerprint,
        text_encoder=place(encoders.text_encoder),
        text_layer=encoders.text_layer,
        text_fingerprint=encoder.fingerprint,
        codebooks=codec.codebooks,
        entries=codec.entries,
        text_width=encoder.width,
        text_backend=encoders.text_backend,
    )


def together(codec: Codec | TorchCodec) -> int:
    """Songs that are encoded at a time: more than one pays on an accelerator only."""
    return BATCH if isinstance(codec, Codec) and jax.default_backend() != "cpu" else 1


def encode_sounds(codec: Codec | TorchCodec, sounds: list[Float[np.ndarray, "_ ..."]]) -> list[Int[np.ndarray, "_ K"]]:
    """Codes of each sound, float32 at the codec's rate."""
    if isinstance(codec, TorchCodec):
        return [codec.encode(samples) for samples in sounds]
    return encode_many(codec, sounds) if sounds else []
