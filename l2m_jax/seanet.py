"""SEANet's layers, of which EnCodec is made: they carry their state from chunk to chunk. After config, before encodec.

Tagliasacchi et al., "SEANet" (2020), as `transformers` and Meta's `encodec` compute it. A layer is
`layer(x, span, state) -> (y, span, state)`. Causal layers run a song in chunks of one fixed shape, with the result of
the whole song at once; the others see both sides, and so take a whole signal. Songs of a batch may differ in length.

Letters: B batch, T samples or positions; C, G channels, P padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Span(NamedTuple):
    """Which part of a chunk is signal, and whether it goes on from a chunk before."""

    valid: Int[Array, "*B"]
    """Positions of each chunk, or of all, that are signal; what stands behind them is never heard."""
    started: Bool[Array, ""]
    """False in the first chunk, whose left edge is reflected."""

    def mask(self, positions: int) -> Bool[Array, "#B T 1"]:
        """True where there is signal."""
        return jnp.arange(positions)[:, None] < jnp.reshape(self.valid, (-1, 1, 1))


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


class GroupNorm(Layer):
    """Each signal, all channels and positions together, gets mean 0 and variance 1, then a gain and a bias."""

    def __init__(self, width: int):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: tuple) -> Passed:
        """Same shape as x."""
        mask = span.mask(x.shape[1])
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) * x.shape[2]
        mean = _sum(jnp.where(mask, x, 0)) / count
        variance = _sum(jnp.where(mask, x - mean, 0) ** 2) / count
        return (x - mean) * lax.rsqrt(variance + 1e-5) * self.scale[...] + self.bias[...], span, state


class Conv(Layer):
    """Convolution of a signal that is reflected at both edges.

    Causal: all of the padding stands at the left, and at the right only what the stride needs.
    """

    def __init__(
        self, inputs: int, outputs: int, width: int, rngs: nnx.Rngs, stride: int = 1, dilation: int = 1,
        causal: bool = True, norm: bool = False,
    ):  # fmt: skip
        self.kernel = nnx.Param(normal(rngs, (width, inputs, outputs), width * inputs))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.norm = GroupNorm(outputs) if norm else Layer()
        self.stride, self.dilation = stride, dilation
        padding = (width - 1) * dilation + 1 - stride
        self.right = 0 if causal else padding // 2
        self.left = padding - self.right

    def initial(self, batch: int) -> Float[Array, "B P C"]:
        """The last P inputs of the chunk before."""
        return jnp.zeros((batch, self.left, self.kernel.shape[1]))

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: Float[Array, "B P C"]) -> Passed:
        """T2 = T / stride; T is a multiple of the stride."""
        positions, reach = x.shape[1], self.right + self.stride - 1
        x = jnp.concatenate([jnp.where(span.started, state, self._reflected(x, span)), x], axis=1)
        if reach:  # the last frame of the signal may see so far beyond it
            x = jnp.pad(x, ((0, 0), (0, reach), (0, 0)))
            ends = 0 if span.valid.ndim else None
            x = jax.vmap(self._mirror_end, in_axes=(0, ends, None, None))(x, span.valid, span.started, reach)
        y = lax.conv_general_dilated(
            x, self.kernel[...], (self.stride,), "VALID", rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        y, span, _ = self.norm(y + self.bias, span._replace(valid=-(-span.valid // self.stride)), ())
        return y, span, x[:, positions : positions + self.left]

    def _reflected(self, x: Float[Array, "B T C"], span: Span) -> Float[Array, "B P C"]:
        """x[P], ..., x[1]; a signal of P samples or fewer counts as followed by zeros, as in the published model."""
        head = jnp.where(span.mask(x.shape[1]), x, 0)[:, 1 : self.left + 1]
        return jnp.pad(head, ((0, 0), (0, self.left - head.shape[1]), (0, 0)))[:, ::-1]

    def _mirror_end(
        self, x: Float[Array, "PT C"], valid: Int[Array, ""], started: Bool[Array, ""], reach: int
    ) -> Float[Array, "PT C"]:
        """Behind one signal: position valid + j becomes valid - 2 - j. A short one is lengthened by zeros first."""
        extra = -valid % self.stride
        short = 1 + jnp.maximum(self.left, self.right + extra)
        last = jnp.where(started, valid, jnp.maximum(valid, short)) - 1
        at = valid + jnp.arange(reach)
        source = jnp.where(at > last, 2 * last - at, at)
        tail = jnp.where((source < valid)[:, None], jnp.take(x, self.left + source, axis=0, mode="clip"), 0)
        return lax.dynamic_update_slice_in_dim(x, tail, self.left + valid, axis=0)


class Upsample(Layer):
    """Transposed convolution of stride s and width 2 s, cut to s positions a frame: at the right, or at both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs, causal: bool = True, norm: bool = False):
        self.kernel = nnx.Param(normal(rngs, (2, inputs, stride, outputs), 2 * inputs))
        """For the frame before, and for the frame itself."""
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.norm = GroupNorm(outputs) if norm else Layer()
        self.cut = 0 if causal else stride - stride // 2

    def initial(self, batch: int) -> Float[Array, "B 1 C"]:
        """The last input of the chunk before; silence before the first."""
        return jnp.zeros((batch, 1, self.kernel.shape[1]))

    def __call__(self, x: Float[Array, "B T C"], span: Span, state: Float[Array, "B 1 C"]) -> Passed:
        """T2 = T x stride."""
        _, inputs, stride, outputs = self.kernel.shape
        valid, positions, last = span.valid, x.shape[1], x[:, -1:]
        if self.cut:  # what sounds on after the last frame is heard as well
            x = jnp.pad(jnp.where(span.mask(positions), x, 0), ((0, 0), (0, 1), (0, 0)))
            valid = valid + 1
        before = jnp.concatenate([state, x[:, :-1]], axis=1)
        y = jnp.concatenate([before, x], axis=-1) @ self.kernel[...].reshape(2 * inputs, stride * outputs)
        y = y.reshape(x.shape[0], -1, outputs) + self.bias
        y, _, _ = self.norm(y, span._replace(valid=valid * stride), ())
        return y[:, self.cut : self.cut + positions * stride], span._replace(valid=span.valid * stride), last


class LstmLayer(nnx.Module):
    """One layer of an LSTM; gates stand in torch's order: input, forget, cell, output."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.input = nnx.Param(normal(rngs, (width, 4 * width), width))
        self.recurrent = nnx.Param(normal(rngs, (width, 4 * width), width))
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


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> Array:
    """Random weights of variance 1 / fan_in."""
    return jax.random.normal(rngs.params(), shape) * fan_in**-0.5


def _sum(x: Float[Array, "B T C"]) -> Float[Array, "B 1 1"]:
    """Over positions first: fewer terms in each float32 sum."""
    return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=2, keepdims=True)
