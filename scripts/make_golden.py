"""Remakes the golden files of the torch-free parity tests: python scripts/make_golden.py; needs the extra `torch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def bert() -> None:
    """tests/golden/bert.npz: ids and last states of the default text encoder for a verse in four scripts."""
    from transformers import BertModel, BertTokenizer

    from l2m_jax.weights import minilm_folder

    text = "Sing, moon, over the silver river\nПой, луна, над рекой\n月よ、銀の川で歌え\nغنِّ يا قمر 🌙"
    ids = BertTokenizer.from_pretrained(minilm_folder())(text)["input_ids"]
    with torch.no_grad():
        states = BertModel.from_pretrained(minilm_folder())(torch.tensor([ids])).last_hidden_state[0].numpy()
    np.savez_compressed(GOLDEN / "bert.npz", text=text, ids=np.array(ids, np.int32), states=states)


def codec() -> None:
    """tests/golden/codec.npz: a sound, and what the shipped codecs and a small random one with an LSTM make of it."""
    from transformers import EncodecConfig, EncodecModel

    from l2m_jax.published import SHIPPED, resolve

    time = np.arange(24_017) / 24_000  # a whole second, and 17 samples that fill no frame
    noise = np.random.default_rng(0).normal(0, 0.02, len(time))
    tune = sum(0.3 / n * np.sin(2 * np.pi * n * 220 * 2 ** (np.floor(4 * time) / 6) * time) for n in range(1, 6))
    sound = np.round((tune * np.exp(-3 * (4 * time % 1)) + noise) * 16_384).astype(np.int16)

    small = {
        "num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2], "num_residual_layers": 2, "num_lstm_layers": 2,
        "codebook_size": 32, "target_bandwidths": [60.0], "use_conv_shortcut": False, "model_type": "encodec",
    }  # fmt: skip
    torch.manual_seed(0)
    random: Any = EncodecModel(EncodecConfig(**small))  # Any: transformers types what calls return as unions
    for layer in random.quantizer.layers:
        layer.codebook.embed.normal_(0, 0.2)
    weights = {f"weight/{key}": value.numpy() for key, value in random.state_dict().items() if "embed_avg" not in key}

    golden = {"sound": sound, "config": json.dumps(small), **weights}
    shipped: Any = [(name, EncodecModel.from_pretrained(resolve(name)[1]), len(sound)) for name in SHIPPED]
    for name, model, length in (*shipped, ("small", random, 4_003)):
        samples = torch.from_numpy(sound[:length].astype(np.float32) / 32_768)[None, None]
        with torch.no_grad():
            latents = model.eval().encoder(samples)[0].T
            codes = model.encode(samples).audio_codes
            golden |= {f"{name}/latents": latents.numpy(), f"{name}/codes": codes[0, 0].T.numpy().astype(np.int32)}
            golden[f"{name}/wave"] = model.decode(codes, [None]).audio_values[0, 0].numpy()
    np.savez_compressed(GOLDEN / "codec.npz", **golden)


def segmented() -> None:
    """tests/golden/segmented.npz: a stereo sound, and what a small random codec of encodec_48khz's kind makes of it."""
    from transformers import EncodecConfig, EncodecModel

    small = {
        "model_type": "encodec", "sampling_rate": 800, "audio_channels": 2, "normalize": True, "chunk_length_s": 1.0,
        "overlap": 0.015, "norm_type": "time_group_norm", "use_causal_conv": False, "num_filters": 4, "hidden_size": 8,
        "upsampling_ratios": [4, 2], "num_residual_layers": 2, "num_lstm_layers": 1, "codebook_size": 32,
        "target_bandwidths": [2.0], "use_conv_shortcut": True,
    }  # fmt: skip
    time = np.arange(1_999) / 800  # three segments; the last one ends in the midst of a frame
    tune = 0.4 * np.sin(2 * np.pi * np.stack([60 * time, 90 * time**2], axis=1)) * np.exp(-2 * (2 * time % 1))[:, None]
    noise = np.random.default_rng(0).normal(0, 0.02, tune.shape)
    sound = np.round((tune + noise) * 16_384).astype(np.int16)
    torch.manual_seed(0)
    model: Any = EncodecModel(EncodecConfig(**small)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # as a trained model has them
            weight.data += 0.3 * torch.randn(weight.shape)
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(0, 0.4)
    weights = {f"weight/{key}": value.numpy() for key, value in model.state_dict().items() if "embed_avg" not in key}
    with torch.no_grad():
        given = torch.from_numpy(sound.astype(np.float32).T / 32_768)[None]
        codes, scales, pad = model.encode(given, return_dict=False)
        wave = model.decode(codes, scales, last_frame_pad_length=pad).audio_values[0].numpy().T
    flat = codes[:, 0].mT.reshape(-1, codes.shape[2]).numpy().astype(np.int32)
    golden = {"codes": flat[: len(flat) - pad], "scales": np.array([float(scale) for scale in scales]), "wave": wave}
    np.savez_compressed(GOLDEN / "segmented.npz", sound=sound, config=json.dumps(small), **golden, **weights)


if __name__ == "__main__":
    codec()
    segmented()
    bert()
