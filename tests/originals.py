"""Codecs of the published configurations with random weights, written by Meta's `encodec` and by `transformers`."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

SETTINGS = {
    "encodec_24khz": {},
    "encodec_48khz": {
        "sampling_rate": 48_000, "audio_channels": 2, "use_causal_conv": False, "norm_type": "time_group_norm",
        "normalize": True, "chunk_length_s": 1.0, "overlap": 0.01, "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
    },
}  # fmt: skip
RENAMED = {
    ".model.": ".layers.", ".convtr.convtr.": ".conv.", ".conv.conv.": ".conv.", ".convtr.norm.": ".norm.",
    ".conv.norm.": ".norm.", "quantizer.vq.": "quantizer.", "._codebook.": ".codebook.",
    ".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1",
}  # fmt: skip


class Originals(NamedTuple):
    """One codec, twice."""

    meta: Any
    """encodec.EncodecModel."""
    transformers: Any
    """transformers.EncodecModel with the same weights."""
    th: Path
    """Of the former, as torch.save writes it."""
    folder: Path
    """Of the latter, as save_pretrained writes it."""


def music(samples: int, rate: int, channels: int = 1) -> np.ndarray:
    """Plucked notes with harmonics over a little noise, float32 [T], or [T, 2] with another tune on each side."""
    time = np.arange(samples) / rate
    sides = []
    for side in range(channels):
        note = 220 * 2 ** (np.floor(4 * time) / (6 - side))
        tune = sum(0.3 / n * np.sin(2 * np.pi * n * note * time) for n in range(1, 6)) * np.exp(-3 * (4 * time % 1))
        sides.append(tune + np.random.default_rng(side).normal(0, 0.02, samples))
    return np.stack(sides, axis=1).astype(np.float32) if channels > 1 else sides[0].astype(np.float32)


@contextlib.contextmanager
def encodec() -> Iterator[Any]:
    """Meta's package, with an empty torchaudio: of that, it needs only what reads files."""
    with pytest.MonkeyPatch.context() as patch:
        if "encodec" not in sys.modules:
            patch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
        yield pytest.importorskip("encodec", reason="needs Meta's package: pip install --no-deps encodec")


def make(name: str, root: Path) -> Originals:
    """The codec `name` with random weights, and codebooks that its latents of music choose among."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    with encodec() as package, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm has a newer spelling
        model = getattr(package.EncodecModel, f"encodec_model_{name.split('_')[1]}")(pretrained=False)
    model.name = name
    with torch.no_grad():
        sound = torch.from_numpy(music(model.sample_rate, model.sample_rate, model.channels))
        sound = sound.reshape(1, -1, model.channels)
        # As in trained codecs, sound passes with about its loudness, latents lie around 0, and each codebook takes
        # little from what the ones before it leave: else the last codes would be a matter of rounding.
        for key, gain in model.encoder.named_parameters():
            gain.mul_(2 if key.endswith("weight_g") else 1)
        rest = model.encoder(sound.mT / (sound.mean(2).std() if model.normalize else 1))[0].T
        last = model.encoder.model[-1].conv
        (last.norm if model.normalize else last.conv).bias.sub_(rest.mean(0))
        rest = rest - rest.mean(0)
        for layer in model.quantizer.vq.layers:
            drawn = rest[torch.randint(len(rest), (1024,))]
            entries = 0.1 * drawn + 0.3 * rest.std() * torch.randn_like(drawn)
            layer._codebook.embed.copy_(entries)
            rest = rest - entries[torch.cdist(rest, entries).argmin(1)]
    th, folder = root / f"{name}-0badcafe.th", root / name
    torch.save(model.state_dict(), th)

    weights = {}
    for key, value in model.state_dict().items():
        for theirs, common in RENAMED.items():
            key = key.replace(theirs, common)
        weights[key] = value
    twin = transformers.EncodecModel(transformers.EncodecConfig(**SETTINGS[name])).eval()
    twin.load_state_dict(weights)
    twin.save_pretrained(folder)
    return Originals(model.eval(), twin, th, folder)
