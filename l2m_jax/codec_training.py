"""Training an EnCodec: vector quantization with moving averages, the step. After `codec_losses` and `optim`.

`scripts/train_codec.py` runs it in phases: an autoencoder without quantizer under a loss that is mostly waveform (it
keeps pitch; codebooks from the start collapse); codebooks by k-means over its latents; then both together; at last the
decoder alone, on codes that no longer move.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int, Key

from l2m_jax.codec_losses import Weights, all_losses
from l2m_jax.encodec import Encodec
from l2m_jax.seanet import Chain, Span, State

DECAY = 0.99  # of the moving averages behind the codebooks
DEAD = 0.1  # an entry chosen this much as often as the average one, or less, is revived
COMMITMENT = 4.0
"""What the latents' distance from their entries counts for. The slope that comes straight through the quantizer is that
of another point: at van den Oord's 0.25 it leads the encoder astray, and sound is worse after training than before."""


Phase = Literal["free", "bound", "decoder"]
"""Without quantizer; with it; with it, and encoder and codebooks as they are."""


class Codebooks(NamedTuple):
    """Codebooks with the moving averages that they are quotients of (van den Oord et al., 2017, appendix A.1)."""

    count: Float[Array, "K V"]
    total: Float[Array, "K V D"]

    @property
    def entries(self) -> Float[Array, "K V D"]:
        """total / count."""
        return self.total / jnp.maximum(self.count, 1e-5)[..., None]


class CodecState(NamedTuple):
    """What a training of the codec goes on from."""

    encoder: Chain
    decoder: Chain
    codebooks: Codebooks
    moments: optax.OptState
    """The optimizer's, of (encoder, decoder)."""


def start(module: Encodec, optimizer: optax.GradientTransformation) -> CodecState:
    """The state before the first step."""
    entries = module.codebooks[...]
    empty = Codebooks(jnp.ones(entries.shape[:2]), entries)
    nets: Any = (module.encoder, module.decoder)  # optax knows modules only as pytrees
    return CodecState(module.encoder, module.decoder, empty, optimizer.init(nets))


def run(chain: Chain, x: Float[Array, "B T C"]) -> Float[Array, "B T2 G"]:
    """An encoder or decoder over whole clips."""
    first = State.first(chain, x.shape[0])
    return chain(x, Span(jnp.array(x.shape[1]), first.started), first.layers)[0]


def quantize(
    latents: Float[Array, "P D"], importance: Float[Array, " P"], codebooks: Codebooks, key: Key[Array, ""]
) -> tuple[Float[Array, "P D"], Codebooks]:
    """Residual quantization of P latents, and the codebooks moved towards them.

    Each entry is the moving average of the latents that chose it, each of which counts for its `importance`; one that
    hardly any choose is put on one of the latents at hand, drawn by `key` (Dhariwal et al., 2020, "Jukebox", 3.1), the
    likelier the worse its own entry fits it: drawn evenly, most would stand where entries are dense already.
    """
    rest, counts, totals = latents, [], []
    for k, entries in enumerate(codebooks.entries):
        code = _nearest(rest, entries)
        chosen = jax.nn.one_hot(code, len(entries)) * importance[:, None]
        count = DECAY * codebooks.count[k] + (1 - DECAY) * chosen.sum(0)
        total = DECAY * codebooks.total[k] + (1 - DECAY) * jnp.matmul(chosen.T, rest, precision="float32")
        misfit = importance * jnp.sum((rest - entries[code]) ** 2, -1) / (jnp.sum(latents**2, -1) + 1e-9)
        drawn = jax.random.categorical(jax.random.fold_in(key, k), jnp.log(misfit + 1e-9), shape=(len(entries),))
        fresh = rest[drawn]
        # A revived entry counts as an averagely used one: it has some hundred steps to prove itself.
        mean = importance.sum() / len(entries)
        dead = count < DEAD * mean
        counts.append(jnp.where(dead, mean, count))
        totals.append(jnp.where(dead[:, None], fresh * mean, total))
        rest = rest - entries[code]
    return latents - rest, Codebooks(jnp.stack(counts), jnp.stack(totals))


def train_step(
    state: CodecState,
    sound: Float[Array, "B T"],
    importance: Float[Array, " B"],
    key: Key[Array, ""],
    weights: Weights,
    phase: Phase,
    optimizer: optax.GradientTransformation,
) -> tuple[CodecState, dict[str, Array]]:
    """One step on B clips. Jit it with the last two arguments static.

    `importance`: what each clip counts for in the codebooks; in the loss all count the same.
    """

    def loss_of(nets: tuple[Chain, Chain]) -> tuple[Array, tuple[Codebooks, dict[str, Array]]]:
        encoder, decoder = nets
        latents = run(encoder, sound[..., None])
        through, codebooks, commitment, used = latents, state.codebooks, jnp.array(0.0), {}
        if phase != "free":
            flat = jax.lax.stop_gradient(latents.reshape(-1, latents.shape[-1]))
            counts = jnp.repeat(importance, latents.shape[1])
            nearest, codebooks = quantize(flat, counts, state.codebooks, key)
            nearest = nearest.reshape(latents.shape)
            # Relative to the latents' variance: their scale is free.
            commitment = jnp.mean((latents - nearest) ** 2) / jax.lax.stop_gradient(jnp.var(latents))
            through = latents + jax.lax.stop_gradient(nearest - latents)  # straight through (Bengio et al., 2013)
            if phase == "decoder":
                through, codebooks, commitment = nearest, state.codebooks, jnp.array(0.0)
            used = {f"perplexity_{k}": _perplexity(count) for k, count in enumerate(codebooks.count)}
        heard = run(decoder, through)[..., 0]
        parts = all_losses(sound, heard)
        loss = sum(weight * parts[name] for name, weight in weights._asdict().items()) + COMMITMENT * commitment
        return loss, (codebooks, {**parts, "commitment": commitment, **used})

    nets: Any = (state.encoder, state.decoder)
    (loss, (codebooks, parts)), gradient = jax.value_and_grad(loss_of, has_aux=True)(nets)
    updates, moments = optimizer.update(gradient, state.moments, nets)
    encoder, decoder = jax.tree.map(lambda x, update: x + update, nets, updates)
    if phase == "decoder":
        encoder = state.encoder  # its moments would still move it
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient), **parts}
    return CodecState(encoder, decoder, codebooks, moments), metrics


def k_means(points: Float[Array, "P D"], entries: int, rounds: int, key: Key[Array, ""]) -> tuple[Array, Array]:
    """Lloyd's algorithm (1982) from random points: centres [V, D] and how many points each has [V].

    A centre without points is put on a random one.
    """
    points = jnp.asarray(points)

    nearest = jax.jit(_nearest)

    @jax.jit
    def middle(code: Array, key: Array) -> tuple[Array, Array]:
        count = jax.ops.segment_sum(jnp.ones(len(points)), code, entries)
        total = jax.ops.segment_sum(points, code, entries)
        fresh = points[jax.random.choice(key, len(points), (entries,), replace=False)]
        return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], fresh), count

    centres, count = points[jax.random.choice(key, len(points), (entries,), replace=False)], jnp.zeros(entries)
    for i in range(rounds):
        code = jnp.concatenate([nearest(part, centres) for part in jnp.array_split(points, 16)])
        centres, count = middle(code, jax.random.fold_in(key, i))
    return centres, count


def first_codebooks(latents: Float[Array, "P D"], books: int, entries: int, key: Key[Array, ""]) -> Codebooks:
    """Residual codebooks by k-means; the counts are those of a step in which every entry is chosen about once."""
    rest, counts, totals = jnp.asarray(latents), [], []
    for k in range(books):
        centres, count = k_means(rest, entries, 20, jax.random.fold_in(key, k))
        share = jnp.maximum(count / len(latents) * entries, DEAD)
        counts.append(share)
        totals.append(centres * share[:, None])
        rest = rest - centres[_nearest(rest, centres)]
    return Codebooks(jnp.stack(counts), jnp.stack(totals))


def finished(state: CodecState, module: Encodec) -> Encodec:
    """The codec of a state, in the place of `module`'s parameters: its latents scaled to RMS 1.

    Their scale is free, and in training it grows beyond what float16 holds.
    """
    entries = state.codebooks.entries
    scale = jnp.sqrt(jnp.mean(jnp.sum(entries**2, axis=0)))
    module.encoder, module.decoder = jax.tree.map(lambda x: x, (state.encoder, state.decoder))  # a copy
    last: Any = module.encoder.layers[-1]
    first: Any = module.decoder.layers[0]
    last.kernel, last.bias = nnx.Param(last.kernel[...] / scale), nnx.Param(last.bias[...] / scale)
    first.kernel = nnx.Param(first.kernel[...] * scale)
    module.codebooks = nnx.Param(entries / scale)
    return module


def _nearest(points: Float[Array, "P D"], entries: Float[Array, "V D"]) -> Int[Array, " P"]:
    """The entry next to each point. Accelerators would round the product, and entries lie close."""
    return jnp.argmin(jnp.sum(entries**2, -1) - 2 * jnp.matmul(points, entries.T, precision="float32"), -1)


def _perplexity(count: Float[Array, " V"]) -> Float[Array, ""]:
    """exp(entropy): as many entries, evenly used, would say as much."""
    share = count / count.sum()
    return jnp.exp(-jnp.sum(share * jnp.log(share + 1e-9)))
