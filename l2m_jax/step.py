"""Loss and train step: pure, compiled once, laid out on a mesh. After `sample`, before `train`.

The batch of step n depends on (seed, n, row) alone, and so do the draws that are made here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from l2m_jax.config import Config, TrainConfig
from l2m_jax.data import Example
from l2m_jax.follow import Astray, astray, positions_of_a_frame
from l2m_jax.model import KINDS, Remat, SoundTransformer, prompt_of
from l2m_jax.optim import optimizer
from l2m_jax.sharding import batch_sharding, check_divides, gathered, position_sharding, state_shardings
from l2m_jax.tokens import AnyArray, Layout, make_layout, windows


class TrainState(NamedTuple):
    """What a step takes and gives."""

    model: Any  # SoundTransformer; to optax and Orbax it is a pytree like any other
    optimizer: Any


class Totals(NamedTuple):
    """Sums over the targets that count, a stream each; the loss is their quotient."""

    nats: Float[Array, " J"]
    codes: Int[Array, " J"]
    astray: Astray


def keep_conditions(
    key: Key[Array, ""], step: Array, rows: Int[Array, " B"], config: TrainConfig
) -> Bool[Array, "B 2"]:
    """Condition dropout: which of (genre, lyrics) each song keeps, one draw a song, a function of (seed, step, row)."""
    no_lyrics, no_genre, neither = config.dropout
    draws = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, step), row)))(rows)
    keep_lyrics = draws >= no_lyrics + neither
    keep_genre = (draws >= neither) & ((draws < no_lyrics + neither) | (draws >= no_lyrics + neither + no_genre))
    return jnp.stack([keep_genre, keep_lyrics], axis=-1)


def losses(
    model: SoundTransformer,
    batch: Example,
    keep: Bool[Array, "B kinds"],
    layout: Layout,
    chunk: int,
    remat: Remat,
    guided: bool = False,
) -> Totals:
    """Cross-entropy of the next code over the whole id space, PAD ignored, `chunk` positions' logits at a time.

    With `guided` also what the first head of the middle layer goes `follow.astray` by.
    Where positions are split over devices, each goes through its own: no chunk reaches over the edge of a shard.
    """
    ids, targets = jnp.asarray(batch.ids), jnp.asarray(batch.targets)
    model = gathered(model)
    memory, places = model.memory(prompt_of(batch), keep), layout.place(jnp.arange(ids.shape[1]))
    asked = ids, places, memory, remat
    hidden, look = model.hidden_and_look(*asked) if guided else (model.hidden(*asked), None)
    frames = (jnp.arange(ids.shape[1]) // positions_of_a_frame(layout) + 0.5)[None]  # the middle of what is said
    shards = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    size = math.gcd(chunk, ids.shape[1] // shards)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], shards, -1, size, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def add(totals: Totals, part: tuple[Array, Array, Array, Array | None]) -> tuple[Totals, None]:
        hidden, targets, frames, queries = part
        counts = targets != layout.pad
        nats = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)
        nats = jnp.where(counts, nats, 0.0)
        found = Totals(nats.sum((0, 1, 2)), counts.sum((0, 1, 2)), none)
        if look is not None and queries is not None:
            of_shard = jax.vmap(functools.partial(astray, look.keys, memory.seen, jnp.asarray(batch.sung)), 1)
            found = found._replace(astray=jax.tree.map(jnp.sum, of_shard(queries, frames, counts.any(-1))))
        return jax.tree.map(jnp.add, totals, found), None

    none = Astray(jnp.zeros(()), jnp.zeros((), jnp.int32))
    zero = Totals(jnp.zeros(layout.streams), jnp.zeros(layout.streams, jnp.int32), none)
    parts = (split(hidden), split(targets), split(frames), None if look is None else split(look.queries))
    return jax.lax.scan(add, zero, parts)[0]


def make_step(
    config: Config, layout: Layout, shard_positions: Callable[[AnyArray], AnyArray] = lambda x: x
) -> Callable:
    """The train step: (state, step, batch) -> (state, metrics). Gradients of the micro-batches are summed over the
    global count of codes, so that accumulation does not change the loss. `shard_positions` constrains [B, T, ...].
    """
    rules, train = optimizer(config.train), config.train
    key = jax.random.key(train.seed)

    def step(state: TrainState, step: Array, batch: Example) -> tuple[TrainState, dict[str, Array]]:
        batch = batch._replace(ids=shard_positions(batch.ids), targets=shard_positions(batch.targets))
        keep = keep_conditions(key, step, jnp.arange(train.batch), train)
        total = (batch.targets != layout.pad).sum()

        def loss(model: SoundTransformer, batch: Example, keep: Array) -> tuple[Array, Totals]:
            totals = losses(model, batch, keep, layout, train.chunk, train.remat, train.guide > 0)
            return (totals.nats.sum() + train.guide * totals.astray.nats) / total, totals

        def micro(carry: tuple, part: tuple[Example, Array]) -> tuple[tuple, None]:
            (_, totals), gradient = jax.value_and_grad(loss, has_aux=True)(state.model, *part)
            return jax.tree.map(jnp.add, carry, (gradient, totals)), None

        (_, totals), gradient = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), state.model, batch, keep)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradient, totals))
        # Rows of a micro-batch are strided, so that each stays spread over all devices.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, train.accumulate, *x.shape[1:]), 0, 1), (batch, keep))
        if train.accumulate == 1:
            (gradient, totals), _ = micro(zero, (batch, keep))
        else:
            (gradient, totals), _ = jax.lax.scan(micro, zero, parts)
        updates, new = rules.update(gradient, state.optimizer, state.model)
        codes = totals.codes.sum()
        metrics = {"codes": codes, "loss": totals.nats.sum() / codes, "grad_norm": optax.tree.norm(gradient)}
        if layout.streams > 1:
            for j in range(layout.streams):
                metrics[f"loss_{j}"] = totals.nats[j] / totals.codes[j]
        if train.guide:
            metrics["astray"] = totals.astray.nats / totals.astray.positions  # NaN where no word is sung
        return TrainState(optax.apply_updates(state.model, updates), new), metrics

    return step


class Program(NamedTuple):
    """The training of a config on a mesh: to be called, or compiled for devices that are not there."""

    init: Callable  # () -> TrainState, jitted
    step: Callable  # (TrainState, step, Example) -> (TrainState, metrics), jitted; the state is donated
    held_out: Callable  # (model, Example) -> Totals, jitted; lyrics and genre kept
    shapes: TrainState  # of `jax.ShapeDtypeStruct`
    shardings: TrainState
    batch: NamedSharding  # of every array of an Example


def make_program(config: Config, mesh: Mesh) -> Program:
    """Init, step and held-out loss under the rules of `sharding`; call them, or lower them, under `jax.set_mesh(mesh)`.

    UserError where a dimension of the model or of the batch does not divide over its axis.
    """
    layout = make_layout(config.model)
    micro = config.train.batch // config.train.accumulate
    for window in windows(layout, config.train.windows):
        check_divides(mesh, micro, dataclasses.replace(config.model, frames=window.frames))

    def init() -> TrainState:
        model: Any = SoundTransformer(config.model, rngs=nnx.Rngs(config.train.seed))
        return TrainState(model, optimizer(config.train).init(model))

    def held_out(model: SoundTransformer, batch: Example) -> Totals:
        keep = jnp.ones((len(batch.ids), KINDS), bool)
        return losses(model, batch, keep, layout, config.train.chunk, remat="none")

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, mesh)
    on_batch, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    positions = position_sharding(mesh)
    step = jax.jit(
        make_step(config, layout, lambda x: jax.lax.with_sharding_constraint(x, positions)),
        in_shardings=(shardings, everywhere, on_batch),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    asked = jax.jit(held_out, in_shardings=(shardings.model, on_batch), out_shardings=everywhere)
    return Program(jax.jit(init, out_shardings=shardings), step, asked, shapes, shardings, on_batch)
