"""EnCodec, the model: layers that carry their state from chunk to chunk. codec.py runs it over songs.

The causal mono family of Défossez et al., "High Fidelity Neural Audio Compression" (2022), in the layout of
`transformers.EncodecModel`, whose codes and waveforms it reproduces: a convolutional encoder, an LSTM on a residual, a
residual vector quantizer and the mirrored decoder. Notable:

- every layer carries state, so that a song runs in chunks of one fixed shape (one compilation for any length) and the
  result is that of the whole song at once; the same state decodes a stream second by second;
- a layer is `layer(x, span, state) -> (y, span, state)`; encoder and decoder are lists of layers with the published
  indices, so that names of weights need no translation;
- a transposed convolution of stride s and width 2 s is one matrix product over a frame and the frame before it.

Letters: B batch, T samples or positions, F frames, K codebooks, V entries; C, G channels, D latent width, P padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from l2m_jax.config import UserError


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

    @classmethod
    def parse(cls, published: Mapping[str, Any], source: str) -> EncodecConfig:
        """From a config.json that was read; UserError names a setting that this code does not do (yet)."""
        only = {
            "model_type": "encodec", "audio_channels": 1, "normalize": False, "chunk_length_s": None,
            "norm_type": "weight_norm", "use_causal_conv": True, "pad_mode": "reflect", "trim_right_ratio": 1.0,
            "codebook_dim": published.get("hidden_size", cls.hidden_size),
        }  # fmt: skip
        for key, allowed in only.items():
            value = published.get(key, allowed)
            if value != allowed and not (key == "codebook_dim" and value is None):
                raise UserError(f"{source}: {key} is {value!r}; only {allowed!r} is supported (not yet any other)")
        known = {field.name for field in dataclasses.fields(cls)}
        ours: dict[str, Any] = {key: published[key] for key in known & published.keys()}
        ours |= {key: tuple(value) for key, value in ours.items() if isinstance(value, list)}
        config = cls(**ours)
        if config.codebook_size.bit_count() != 1:
            raise UserError(f"{source}: codebook_size is {config.codebook_size}; it must be a power of 2")
        return config

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> int:
        """Frames a second."""
        return math.ceil(self.sampling_rate / self.hop)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.codebook_size.bit_length() - 1

    def codebooks_at(self, bandwidth: float) -> int:
        """K at a bandwidth in kbit/s: bandwidth = K x frame rate x log2 V."""
        return max(1, int(1000 * bandwidth // (self.frame_rate * self.bits)))


class Span(NamedTuple):
    """Which part of a chunk is signal, and whether it goes on from a chunk before."""

    valid: Int[Array, ""]
    """Positions of the chunk that are signal; what stands behind them is never heard: all layers are causal."""
    started: Bool[Array, ""]
    """False in the first chunk, whose left edge is reflected."""


class State(NamedTuple):
    """What an encoder or decoder remembers between chunks."""

    started: Bool[Array, ""]
    layers: tuple

    @staticmethod
    def first(chain: Chain, batch: int) -> State:
        """Before the first chunk."""
        return State(jnp.array(False), chain.initial(batch))


Passed = tuple[Float[Array, "B T2 G"], Span, Any]
"""What a layer returns: its output, the span of that, and the state for the next chunk."""


class Layer(nnx.Module):
    """The interface of all layers; this one changes nothing and remembers nothing."""

    def initial(self, batch: int) -> Any:
        """The state before the first chunk, of `batch` signals."""
        return ()

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: Any) -> Passed:
        """One chunk."""
        return x, span, state


class Conv(Layer):
    """Causal convolution; the signal is reflected at the left, and at the right where the stride does not divide it."""

    def __init__(self, inputs: int, outputs: int, width: int, rngs: nnx.Rngs, stride: int = 1, dilation: int = 1):
        self.kernel = nnx.Param(_normal(rngs, (width, inputs, outputs), width * inputs))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride, self.dilation = stride, dilation
        self.pad = (width - 1) * dilation + 1 - stride

    def initial(self, batch: int) -> Float[Array, "B P C"]:
        """The last P inputs of the chunk before."""
        return jnp.zeros((batch, self.pad, self.kernel.shape[1]))

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: Float[Array, "B P C"]) -> Passed:
        """T2 = T / stride; T is a multiple of the stride."""
        valid = span.valid
        x = jnp.concatenate([jnp.where(span.started, state, self._reflected(x, valid)), x], axis=1)
        if self.stride > 1:
            x = self._mirror_end(x, span)
            span = span._replace(valid=-(-valid // self.stride))
        y = lax.conv_general_dilated(
            x, self.kernel[...], (self.stride,), "VALID", rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        return y + self.bias, span, x[:, x.shape[1] - self.pad :]

    def _reflected(self, x: Float[Array, "B T C"], valid: Int[Array, ""]) -> Float[Array, "B P C"]:
        """x[P], ..., x[1]; a signal of P samples or fewer counts as followed by zeros, as in the published model."""
        head = x[:, 1 : self.pad + 1]
        head = jnp.where((jnp.arange(1, head.shape[1] + 1) < valid)[:, None], head, 0)
        return jnp.pad(head, ((0, 0), (0, self.pad - head.shape[1]), (0, 0)))[:, ::-1]

    def _mirror_end(self, x: Float[Array, "B PT C"], span: Span) -> Float[Array, "B PT C"]:
        """Fills the last frame that holds signal: position valid + j becomes valid - 2 - j."""
        start = (-(-span.valid // self.stride) - 1) * self.stride
        at = start + jnp.arange(self.stride)
        frame = jnp.take(x, self.pad + jnp.where(at < span.valid, at, 2 * (span.valid - 1) - at), axis=1)
        short = ~span.started & (span.valid <= self.pad)
        frame = jnp.where((short & (at >= span.valid))[:, None], 0, frame)
        return lax.dynamic_update_slice_in_dim(x, frame, self.pad + start, axis=1)


class Upsample(Layer):
    """Causal transposed convolution of stride s and width 2 s."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_normal(rngs, (2, inputs, stride, outputs), 2 * inputs))
        """For the frame before, and for the frame itself."""
        self.bias = nnx.Param(jnp.zeros(outputs))

    def initial(self, batch: int) -> Float[Array, "B 1 C"]:
        """The last input of the chunk before; silence before the first."""
        return jnp.zeros((batch, 1, self.kernel.shape[1]))

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: Float[Array, "B 1 C"]) -> Passed:
        """T2 = T x stride."""
        _, inputs, stride, outputs = self.kernel.shape
        before = jnp.concatenate([state, x[:, :-1]], axis=1)
        y = jnp.concatenate([before, x], axis=-1) @ self.kernel[...].reshape(2 * inputs, stride * outputs)
        y = y.reshape(x.shape[0], -1, outputs) + self.bias
        return y, span._replace(valid=span.valid * stride), x[:, -1:]


class LstmLayer(nnx.Module):
    """One layer of an LSTM; gates stand in torch's order: input, forget, cell, output."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.input = nnx.Param(_normal(rngs, (width, 4 * width), width))
        self.recurrent = nnx.Param(_normal(rngs, (width, 4 * width), width))
        self.bias = nnx.Param(jnp.zeros(4 * width))

    def __call__(
        self, x: Float[Array, "B T C"], state: tuple[Float[Array, "B C"], Float[Array, "B C"]]
    ) -> tuple[Float[Array, "B T C"], tuple[Float[Array, "B C"], Float[Array, "B C"]]]:
        """The outputs, and the hidden and cell state after the last position."""
        recurrent = self.recurrent[...]

        def step(carry, driven):
            hidden, cell = carry
            enter, forget, new, leave = jnp.split(driven + hidden @ recurrent, 4, axis=-1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return (hidden, cell), hidden

        state, y = lax.scan(step, state, (x @ self.input[...] + self.bias).swapaxes(0, 1))
        return y.swapaxes(0, 1), state


class Lstm(Layer):
    """x + LSTM(x); with no layers, x."""

    def __init__(self, width: int, layers: int, rngs: nnx.Rngs):
        self.width = width
        self.layers = nnx.List([LstmLayer(width, rngs) for _ in range(layers)])

    def initial(self, batch: int) -> tuple:
        """Hidden and cell state of each layer."""
        return tuple((jnp.zeros((batch, layer.recurrent.shape[0])),) * 2 for layer in self.layers)

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: tuple) -> Passed:
        """Same shape as x."""
        y, after = x, []
        for layer, before in zip(self.layers, state):
            y, last = layer(y, before)
            after.append(last)
        return x + y if self.layers else x, span, tuple(after)


class Elu(Layer):
    """x, or exp(x) - 1 below zero; on CPU a third faster than with expm1, and within 6e-8."""

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: tuple) -> Passed:
        """Same shape as x."""
        return jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1), span, state


class Residual(Layer):
    """shortcut(x) + Conv(ELU(Conv(ELU(x))))."""

    def __init__(self, width: int, dilation: int, config: EncodecConfig, rngs: nnx.Rngs):
        inner = width // config.compress
        wide = Conv(width, inner, config.residual_kernel_size, rngs, dilation=dilation)
        self.block = Chain([Elu(), wide, Elu(), Conv(inner, width, 1, rngs)])
        self.shortcut = Chain([Conv(width, width, 1, rngs)] if config.use_conv_shortcut else [])

    def initial(self, batch: int) -> tuple:
        """States of both branches."""
        return self.block.initial(batch), self.shortcut.initial(batch)

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: tuple) -> Passed:
        """Same shape as x."""
        y, _, inner = self.block(x, span, state[0])
        z, _, outer = self.shortcut(x, span, state[1])
        return z + y, span, (inner, outer)


class Chain(Layer):
    """Layers, one after the other."""

    def __init__(self, layers: Sequence[Layer]):
        self.layers = nnx.List(layers)

    def initial(self, batch: int) -> tuple:
        """The states before the first chunk."""
        return tuple(layer.initial(batch) for layer in self.layers)

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: tuple) -> Passed:
        """T2 as the strides in the chain have it."""
        after = []
        for layer, before in zip(self.layers, state):
            x, span, last = layer(x, span, before)
            after.append(last)
        return x, span, tuple(after)


class Encodec(nnx.Module):
    """Encoder, codebooks and decoder; `codebooks` K of them."""

    def __init__(self, config: EncodecConfig, codebooks: int, rngs: nnx.Rngs):
        self.encoder = _encoder(config, rngs)
        self.codebooks = nnx.Param(_normal(rngs, (codebooks, config.codebook_size, config.hidden_size), 1))
        self.decoder = _decoder(config, rngs)

    def embed(
        self, samples: Float[Array, "B T"], valid: Int[Array, ""], state: State
    ) -> tuple[Float[Array, "B F D"], State]:
        """Latents of a chunk of samples, T a multiple of the hop, of which `valid` are signal."""
        x, _, layers = self.encoder(samples[..., None], Span(valid, state.started), state.layers)
        return x, State(jnp.array(True), layers)

    def quantize(self, latents: Float[Array, "B F D"]) -> Int[Array, "B F K"]:
        """Nearest entry of each codebook to what the codebooks before it have left over (paper, 3.2)."""

        def step(rest, entries):
            distance = jnp.sum(entries**2, axis=-1) - 2 * rest @ entries.T  # less |rest|^2, the same for all entries
            code = jnp.argmin(distance, axis=-1)
            return rest - entries[code], code

        return jnp.moveaxis(lax.scan(step, latents, self.codebooks[...])[1], 0, -1)

    def synthesize(
        self, codes: Int[Array, "B F K"], valid: Int[Array, ""], state: State
    ) -> tuple[Float[Array, "B T"], State]:
        """Samples of a chunk of codes, T = F x hop, of which `valid` frames are signal."""
        x = jnp.sum(self.codebooks[...][jnp.arange(codes.shape[-1]), codes], axis=-2)
        x, _, layers = self.decoder(x, Span(valid, state.started), state.layers)
        return x[..., 0], State(jnp.array(True), layers)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> Array:
    return jax.random.normal(rngs.params(), shape) * fan_in**-0.5


def _residuals(width: int, config: EncodecConfig, rngs: nnx.Rngs) -> list[Residual]:
    dilations = [config.dilation_growth_rate**j for j in range(config.num_residual_layers)]
    return [Residual(width, dilation, config, rngs) for dilation in dilations]


def _encoder(config: EncodecConfig, rngs: nnx.Rngs) -> Chain:
    width = config.num_filters
    layers: list[Layer] = [Conv(1, width, config.kernel_size, rngs)]
    for ratio in reversed(config.upsampling_ratios):
        layers += _residuals(width, config, rngs)
        layers += [Elu(), Conv(width, 2 * width, 2 * ratio, rngs, stride=ratio)]
        width *= 2
    layers += [Lstm(width, config.num_lstm_layers, rngs), Elu()]
    return Chain([*layers, Conv(width, config.hidden_size, config.last_kernel_size, rngs)])


def _decoder(config: EncodecConfig, rngs: nnx.Rngs) -> Chain:
    width = config.num_filters * 2 ** len(config.upsampling_ratios)
    layers: list[Layer] = [Conv(config.hidden_size, width, config.kernel_size, rngs)]
    layers += [Lstm(width, config.num_lstm_layers, rngs)]
    for ratio in config.upsampling_ratios:
        layers += [Elu(), Upsample(width, width // 2, ratio, rngs)]
        width //= 2
        layers += _residuals(width, config, rngs)
    return Chain([*layers, Elu(), Conv(width, 1, config.last_kernel_size, rngs)])
