"""EnCodec, the model, of seanet's layers. codec.py runs it over songs.

Défossez et al., "High Fidelity Neural Audio Compression" (2022), in the layout of `transformers.EncodecModel`, whose
codes and waveforms it reproduces: a convolutional encoder, an LSTM on a residual, a residual vector quantizer and the
mirrored decoder. Encoder and decoder are lists of layers with the published indices, so that names of weights need
hardly any translation. Two families:

- causal (encodec_24khz): a song runs in chunks of one fixed shape (one compilation for any length), with the result of
  the whole song at once; the same state decodes a stream second by second;
- segmented (encodec_48khz): a song is cut into overlapping segments of 1 s (segments.py), each a signal of its own.

Letters: B batch, T samples or positions, F frames, K codebooks, V entries; C, G channels, D latent width; A channels
of the sound: none of mono, 2 of stereo.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from l2m_jax.config import UserError
from l2m_jax.seanet import Chain, Conv, Elu, Layer, Lstm, Passed, Span, State, Upsample, normal


@dataclasses.dataclass(frozen=True)
class EncodecConfig:
    """The settings of a published config.json that shape the model; defaults are those of encodec_24khz."""

    sampling_rate: int = 24_000
    num_filters: int = 32
    hidden_size: int = 128
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    num_residual_layers: int = 1
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    num_lstm_layers: int = 2
    use_conv_shortcut: bool = True
    codebook_size: int = 1024
    target_bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)

    audio_channels: int = 1
    use_causal_conv: bool = True
    norm_type: str = "weight_norm"
    normalize: bool = False
    """Whether each segment is divided by its loudness, its scale, before it is encoded."""
    chunk_length_s: float | None = None
    """Seconds of a segment; None: songs are one signal."""
    overlap: float | None = None
    """Part of a segment that it has in common with the next one."""

    @classmethod
    def parse(cls, published: Mapping[str, Any], source: str) -> EncodecConfig:
        """From a config.json that was read; UserError names a setting that this code does not do."""
        allowed: dict[str, tuple] = {
            "model_type": ("encodec",), "audio_channels": (1, 2), "pad_mode": ("reflect",), "trim_right_ratio": (1.0,),
            "norm_type": ("weight_norm", "time_group_norm"),
            "codebook_dim": (None, published.get("hidden_size", cls.hidden_size)),
        }  # fmt: skip
        if published.get("chunk_length_s") is None:  # what a stream cannot do
            allowed |= {"use_causal_conv": (True,), "norm_type": ("weight_norm",), "normalize": (False,)}
        for key, values in allowed.items():
            if key in published and published[key] not in values:
                choice = " or ".join(map(repr, (value for value in values if value is not None)))
                raise UserError(f"{source}: {key} is {published[key]!r}; only {choice} is supported here")
        known = {field.name for field in dataclasses.fields(cls)}
        ours: dict[str, Any] = {key: published[key] for key in known & published.keys()}
        ours |= {key: tuple(value) for key, value in ours.items() if isinstance(value, list)}
        for key, value in ours.items():
            numbers = value if isinstance(value, tuple) else (value,)
            least = 0 if key in ("overlap", "num_lstm_layers", "num_residual_layers") else 1e-9
            fits = [isinstance(n, bool) or (isinstance(n, int | float) and n >= least) for n in numbers]
            if not (value is None or key == "norm_type" or (fits and all(fits))):
                raise UserError(f"{source}: {key} is {list(numbers)}; numbers above 0 are needed")
        config = cls(**ours)
        if config.codebook_size.bit_count() != 1:
            raise UserError(f"{source}: codebook_size is {config.codebook_size}; it must be a power of 2")
        if config.chunk_length_s is not None:
            common = config.segment - config.segment_stride if config.overlap is not None else 0
            if config.segment % config.hop or not config.hop < common < 2 * config.hop:
                raise UserError(
                    f"{source}: overlap is {config.overlap!r} of {config.chunk_length_s} s; a segment must be whole"
                    " frames long and have between one and two frames in common with the next one"
                )
        return config

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def segment(self) -> int:
        """Samples of a segment; 0 where songs are one signal."""
        return int((self.chunk_length_s or 0) * self.sampling_rate)

    @property
    def segment_stride(self) -> int:
        """Samples from one segment's start to the next one's."""
        return int((1.0 - (self.overlap or 0)) * self.segment)

    @property
    def frame_rate(self) -> int:
        """Frames a second; of a segment's seconds, where there are segments."""
        return math.ceil(self.sampling_rate / self.hop)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.codebook_size.bit_length() - 1

    def codebooks_at(self, bandwidth: float) -> int:
        """K at a bandwidth in kbit/s: bandwidth = K x frame rate x log2 V."""
        return max(1, int(1000 * bandwidth // (self.frame_rate * self.bits)))


PUBLISHED = {
    "encodec_24khz": EncodecConfig(),
    "encodec_48khz": EncodecConfig(
        sampling_rate=48_000, target_bandwidths=(3.0, 6.0, 12.0, 24.0), audio_channels=2, use_causal_conv=False,
        norm_type="time_group_norm", normalize=True, chunk_length_s=1.0, overlap=0.01,
    ),
}  # fmt: skip
"""Meta's own checkpoints, which come without a config.json."""


class Residual(Layer):
    """shortcut(x) + Conv(ELU(Conv(ELU(x))))."""

    def __init__(self, width: int, dilation: int, config: EncodecConfig, rngs: nnx.Rngs):
        inner, conv = width // config.compress, _conv(config, rngs)
        wide = conv(width, inner, config.residual_kernel_size, dilation=dilation)
        self.block = Chain([Elu(), wide, Elu(), conv(inner, width, 1)])
        self.shortcut = Chain([conv(width, width, 1)] if config.use_conv_shortcut else [])

    def initial(self, batch: int) -> tuple:
        """States of both branches."""
        return self.block.initial(batch), self.shortcut.initial(batch)

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: tuple) -> Passed:
        """Same shape as x."""
        y, _, inner = self.block(x, span, state[0])
        z, _, outer = self.shortcut(x, span, state[1])
        return z + y, span, (inner, outer)


class Encodec(nnx.Module):
    """Encoder, codebooks and decoder; `codebooks` K of them."""

    def __init__(self, config: EncodecConfig, codebooks: int, rngs: nnx.Rngs):
        self.encoder = _encoder(config, rngs)
        self.codebooks = nnx.Param(normal(rngs, (codebooks, config.codebook_size, config.hidden_size), 1))
        self.decoder = _decoder(config, rngs)

    def embed(
        self, samples: Float[Array, "B T ..."], valid: Int[Array, "*B"], state: State
    ) -> tuple[Float[Array, "B F D"], State]:
        """Latents of chunks of samples, T a multiple of the hop, of which `valid` (of each, or of all) are signal."""
        x = samples.reshape(*samples.shape[:2], -1)
        x, _, layers = self.encoder(x, Span(valid, state.started), state.layers)
        return x, State(jnp.array(True), layers)

    def quantize(self, latents: Float[Array, "B F D"]) -> Int[Array, "B F K"]:
        """Nearest entry of each codebook to what the codebooks before it have left over (paper, 3.2)."""

        def step(rest, entries):
            distance = jnp.sum(entries**2, axis=-1) - 2 * rest @ entries.T  # less |rest|^2, the same for all entries
            code = jnp.argmin(distance, axis=-1)
            return rest - entries[code], code

        return jnp.moveaxis(lax.scan(step, latents, self.codebooks[...])[1], 0, -1)

    def synthesize(
        self, codes: Int[Array, "B F K"], valid: Int[Array, "*B"], state: State
    ) -> tuple[Float[Array, "B T ..."], State]:
        """Samples of chunks of codes, T = F x hop, of which `valid` frames (of each, or of all) are signal."""
        x = jnp.sum(self.codebooks[...][jnp.arange(codes.shape[-1]), codes], axis=-2)
        x, _, layers = self.decoder(x, Span(valid, state.started), state.layers)
        return x[..., 0] if x.shape[-1] == 1 else x, State(jnp.array(True), layers)


def _conv(config: EncodecConfig, rngs: nnx.Rngs) -> Callable[..., Conv]:
    """Conv in the config's kind."""
    return partial(Conv, rngs=rngs, causal=config.use_causal_conv, norm=config.norm_type == "time_group_norm")


def _residuals(width: int, config: EncodecConfig, rngs: nnx.Rngs) -> list[Residual]:
    dilations = [config.dilation_growth_rate**j for j in range(config.num_residual_layers)]
    return [Residual(width, dilation, config, rngs) for dilation in dilations]


def _encoder(config: EncodecConfig, rngs: nnx.Rngs) -> Chain:
    width, conv = config.num_filters, _conv(config, rngs)
    layers: list[Layer] = [conv(config.audio_channels, width, config.kernel_size)]
    for ratio in reversed(config.upsampling_ratios):
        layers += _residuals(width, config, rngs)
        layers += [Elu(), conv(width, 2 * width, 2 * ratio, stride=ratio)]
        width *= 2
    layers += [Lstm(width, config.num_lstm_layers, rngs), Elu()]
    return Chain([*layers, conv(width, config.hidden_size, config.last_kernel_size)])


def _decoder(config: EncodecConfig, rngs: nnx.Rngs) -> Chain:
    width, conv = config.num_filters * 2 ** len(config.upsampling_ratios), _conv(config, rngs)
    upsample = partial(Upsample, rngs=rngs, causal=config.use_causal_conv, norm=config.norm_type == "time_group_norm")
    layers: list[Layer] = [conv(config.hidden_size, width, config.kernel_size)]
    layers += [Lstm(width, config.num_lstm_layers, rngs)]
    for ratio in config.upsampling_ratios:
        layers += [Elu(), upsample(width, width // 2, ratio)]
        width //= 2
        layers += _residuals(width, config, rngs)
    return Chain([*layers, Elu(), conv(width, config.audio_channels, config.last_kernel_size)])
