"""The torch originals in the place of our encoders: `--codec-backend torch`, `--text-backend torch`. After `weights`.

They make the same records, and where the weights are the same the fingerprints are too, so that songs prepared by the
one go on with the other. Needs the extra `torch`. Letters: T positions or samples, F frames, K codebooks, E text width.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from l2m_jax.config import UserError
from l2m_jax.lyrics import TextEncoder, plain_tokenizer
from l2m_jax.published import fingerprint, resolve
from l2m_jax.weights import bert_arrays, minilm_folder, text_fingerprint, text_layer

_UNUSED = r".*\bpooler\..*|.*\.codebook\.(inited|cluster_size|embed_avg)"  # of training; or made anew by every loading

_NEEDED = ("hidden_size", "num_hidden_layers", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class TorchCodec:
    """EncodecModel of transformers, as far as preparation asks of a `codec.Codec`."""

    name: str
    fingerprint: str
    rate: int
    codebooks: int
    entries: int
    bandwidth: float
    """kbit/s: the lowest that has that many codebooks."""
    module: Any
    channels: int = 1
    """Mono: others are refused."""

    def encode(self, samples: Float[np.ndarray, " T"]) -> Int[np.ndarray, "F K"]:
        """Codes, int32, of a mono signal at the codec's rate, in one piece."""
        import torch

        with torch.inference_mode():
            codes = self.module.encode(torch.from_numpy(samples)[None, None], bandwidth=self.bandwidth).audio_codes
        return codes[0, 0, : self.codebooks].T.numpy().astype(np.int32)


class _TorchText:
    """Any encoder of transformers as `TextEncoder.module`."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, ids: Int[np.ndarray, "1 T"], mask: Bool[np.ndarray, "1 T"], layer: int) -> np.ndarray:
        import torch

        states = np.zeros((*ids.shape, self.model.config.hidden_size), np.float32)
        with torch.inference_mode():  # without the padding: what stands for it differs from model to model
            text = torch.from_numpy(ids[mask]).long()[None]
            states[mask] = self.model(text, output_hidden_states=True).hidden_states[layer][0].numpy()
        return states


def load_torch_codec(name: str = "solfege", codebooks: int | None = None) -> TorchCodec:
    """Like `weights.load_codec`, for mono codecs of transformers."""
    short, folder = resolve(name)
    model, tensors = _load("EncodecModel", str(folder))
    config = model.config
    if config.audio_channels != 1:
        raise UserError(f"{name}: has {config.audio_channels} channels; --codec-backend torch takes mono codecs")
    counts = {b: model.quantizer.get_num_quantizers_for_bandwidth(b) for b in sorted(config.target_bandwidths)}
    chosen, most = min(counts.values()) if codebooks is None else codebooks, max(counts.values())
    if not 1 <= chosen <= most:
        raise UserError(f"codebooks is {chosen}; codec {short} has 1 to {most}")
    return TorchCodec(
        name=short,
        fingerprint=fingerprint(tensors),
        rate=config.sampling_rate,
        codebooks=chosen,
        entries=config.codebook_size,
        bandwidth=next(bandwidth for bandwidth, count in counts.items() if count >= chosen),
        module=model,
    )


def load_torch_text_encoder(name: str, layer: int) -> TextEncoder:
    """Like `weights.load_text_encoder`, for any encoder that AutoModel knows."""
    short, folder = ("minilm", minilm_folder()) if name == "minilm" else resolve(name)
    model, tensors = _load("AutoModel", str(folder))
    try:
        from transformers import AutoTokenizer

        fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # whatever it says of files that lack or cannot be read
        raise UserError(f"{folder}: its tokenizer cannot be used ({_line(error)})") from None
    tokenizer = plain_tokenizer(fast, str(folder))
    config = model.config
    if config.is_encoder_decoder or not all(hasattr(config, key) for key in _NEEDED):
        raise UserError(f"{folder}: {config.model_type} is no plain text encoder, such as BERT, XLM-R or ModernBERT")
    depth = text_layer(layer, config.num_hidden_layers, short)
    arrays = bert_arrays(tensors, folder) if config.model_type == "bert" else tensors
    # A RoBERTa counts its positions from the padding's id + 1: as many of them are lost.
    lost = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return TextEncoder(
        name=short,
        fingerprint=text_fingerprint(arrays, tokenizer, depth),
        width=config.hidden_size,
        positions=config.max_position_embeddings - lost,
        layer=depth,
        tokenizer=tokenizer,
        module=_TorchText(model),
    )


def _load(kind: str, folder: str) -> tuple[Any, dict[str, np.ndarray]]:
    """The model of a folder in float32, and its tensors but for those that no state depends on."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"--codec-backend and --text-backend torch need the extra `torch` ({error})") from None
    transformers.utils.logging.set_verbosity_error()  # it reports tensors that we know are not there
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever transformers says of files that lack or cannot be read
        raise UserError(f"{folder}: transformers cannot load it ({_line(error)})") from None
    if missing := [key for key in info["missing_keys"] if not re.fullmatch(_UNUSED, key)]:
        raise UserError(f"{folder}: lacks the tensors {', '.join(sorted(missing)[:4])}")
    model.eval()
    return model, {k: v.numpy() for k, v in model.state_dict().items() if not re.fullmatch(_UNUSED, k)}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
