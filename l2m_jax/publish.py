"""A codec in the published layout: what `weights.load_codec` reads, written. After `codec_training`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from l2m_jax.audio import write_atomic
from l2m_jax.encodec import Encodec, EncodecConfig, Residual
from l2m_jax.seanet import Chain, Conv, Layer, Lstm, Upsample

Tensors = Iterator[tuple[str, np.ndarray]]


def save_codec(
    folder: Path, module: Encodec, config: EncodecConfig, kept: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes config.json and model.safetensors (float16, lengths float32) as `transformers.EncodecModel` names them.

    An LSTM that is not there is stored as one layer of zeros, which on its residual is exactly none: the published
    layout knows no model without. Tensors of these names in `kept` are written in the place of those of `module`,
    in float32 where float16 would round them.
    ValueError for a codec with group norms, whose gains this does not write.
    """
    if config.norm_type != "weight_norm":
        raise ValueError(f"norm_type is {config.norm_type}; only weight_norm is written")
    layers = max(config.num_lstm_layers, 1)
    tensors = dict(_chain("encoder", module.encoder)) | dict(_chain("decoder", module.decoder))
    for k, entries in enumerate(np.asarray(module.codebooks[...])):
        book = f"quantizer.layers.{k}.codebook"
        # Running averages of training, as a codec that is at rest has them.
        tensors |= {
            f"{book}.embed": entries,
            f"{book}.inited": np.ones(1),
            f"{book}.cluster_size": np.ones(len(entries)),
        }
    tensors |= {name: array for name, array in (kept or {}).items() if name in tensors}
    folder.mkdir(parents=True, exist_ok=True)
    # Lengths of weights may lie beyond float16's 65,504: a decoder that expects latents of RMS 1 has such.
    wide = {name for name in tensors if name.endswith("original0")}
    wide |= {name for name, array in (kept or {}).items() if not np.array_equal(array.astype(np.float16), array)}
    kinds = {name: np.float32 if name in wide else np.float16 for name in tensors}
    stored = {name: np.ascontiguousarray(array, kinds[name]) for name, array in tensors.items()}
    write_atomic(folder / "model.safetensors", save(stored, metadata={"format": "pt"}))
    published = dataclasses.asdict(config) | {
        "architectures": ["EncodecModel"], "model_type": "encodec", "codebook_dim": config.hidden_size,
        "num_lstm_layers": layers, "pad_mode": "reflect", "trim_right_ratio": 1.0, "dtype": "float32",
    }  # fmt: skip
    write_atomic(folder / "config.json", (json.dumps(published, indent=2) + "\n").encode())


def _chain(name: str, chain: Chain) -> Tensors:
    for i, layer in enumerate(chain.layers):
        yield from _layer(f"{name}.layers.{i}", layer)


def _layer(name: str, layer: Layer) -> Tensors:
    if isinstance(layer, Conv):
        yield from _weight_norm(name, np.asarray(layer.kernel[...]).transpose(2, 1, 0), np.asarray(layer.bias[...]))
    elif isinstance(layer, Upsample):
        two = np.asarray(layer.kernel[...])  # [2, C, s, G]: the frame before, the frame itself
        kernel = two.transpose(1, 3, 0, 2)[:, :, ::-1].reshape(two.shape[1], two.shape[3], -1)
        yield from _weight_norm(name, kernel, np.asarray(layer.bias[...]))
    elif isinstance(layer, Residual):
        for j, inner in enumerate(layer.block.layers):
            yield from _layer(f"{name}.block.{j}", inner)
        for inner in layer.shortcut.layers:
            yield from _layer(f"{name}.shortcut", inner)
    elif isinstance(layer, Lstm):
        yield from _lstm(name, layer)


def _weight_norm(name: str, weight: np.ndarray, bias: np.ndarray) -> Tensors:
    """Direction and length apart (Salimans and Kingma, 2016)."""
    weight = np.asarray(weight, np.float64)
    length = np.sqrt(np.sum(weight**2, (1, 2), keepdims=True))
    yield f"{name}.conv.parametrizations.weight.original0", length
    yield f"{name}.conv.parametrizations.weight.original1", weight / np.maximum(length, 1e-30)
    yield f"{name}.conv.bias", np.asarray(bias)


def _lstm(name: str, lstm: Lstm) -> Tensors:
    layers = [(x.input[...], x.recurrent[...], x.bias[...]) for x in lstm.layers]
    if not layers:
        square = np.zeros((lstm.width, 4 * lstm.width))
        layers = [(square, square, np.zeros(4 * lstm.width))]
    for i, (entered, recurrent, bias) in enumerate(layers):
        yield f"{name}.lstm.weight_ih_l{i}", np.transpose(entered)
        yield f"{name}.lstm.weight_hh_l{i}", np.transpose(recurrent)
        yield f"{name}.lstm.bias_ih_l{i}", np.asarray(bias)
        yield f"{name}.lstm.bias_hh_l{i}", np.zeros_like(bias)
