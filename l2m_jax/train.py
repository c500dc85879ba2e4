"""Training: the loss, the step, and the loop around it. After `sample`, before `generate`.

The step is pure and compiled once. The batch of step n depends on (seed, n, row) alone and a checkpoint holds the
step, so that a run that was stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key
from rich.console import Console

from l2m_jax.audio import write_wav
from l2m_jax.checkpoint import RunInfo, differences, open_checkpoints, read_run, restore, saving, write_run
from l2m_jax.codec import Codec, decode
from l2m_jax.config import Config, SampleConfig, TrainConfig, UserError
from l2m_jax.data import Dataset, Example, batches, make_example
from l2m_jax.follow import make_follow
from l2m_jax.log import Log
from l2m_jax.model import KINDS, Prompt, Remat, SoundTransformer
from l2m_jax.optim import optimizer, schedule
from l2m_jax.progress import say
from l2m_jax.sample import sample_codes
from l2m_jax.sharding import batch_sharding, check_divides, make_mesh, position_sharding, state_shardings
from l2m_jax.stop import StopSignal
from l2m_jax.tokens import AnyArray, Layout, make_layout


class TrainState(NamedTuple):
    """What a step takes and gives."""

    model: Any  # SoundTransformer; to optax and Orbax it is a pytree like any other
    optimizer: Any


class Totals(NamedTuple):
    """Sums over the targets that count, a stream each; the loss is their quotient."""

    nats: Float[Array, " J"]
    codes: Int[Array, " J"]


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
    model: SoundTransformer, batch: Example, keep: Bool[Array, "B kinds"], layout: Layout, chunk: int, remat: Remat
) -> Totals:
    """Cross-entropy of the next code over the whole id space, PAD ignored, `chunk` positions' logits at a time.

    Where positions are split over devices, each goes through its own: no chunk reaches over the edge of a shard.
    """
    ids, targets = jnp.asarray(batch.ids), jnp.asarray(batch.targets)
    memory = model.memory(Prompt(batch.states, batch.kind, batch.section, batch.position), keep)
    hidden = model.hidden(ids, layout.place(jnp.arange(ids.shape[1])), memory, remat)
    shards = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    size = math.gcd(chunk, ids.shape[1] // shards)

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], shards, -1, size, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def add(totals: Totals, part: tuple[Array, Array]) -> tuple[Totals, None]:
        hidden, targets = part
        counts = targets != layout.pad
        nats = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)
        nats = jnp.where(counts, nats, 0.0)
        return Totals(totals.nats + nats.sum((0, 1, 2)), totals.codes + counts.sum((0, 1, 2))), None

    zero = Totals(jnp.zeros(layout.streams), jnp.zeros(layout.streams, jnp.int32))
    return jax.lax.scan(add, zero, (split(hidden), split(targets)))[0]


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
            totals = losses(model, batch, keep, layout, train.chunk, train.remat)
            return totals.nats.sum() / total, totals

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
        metrics = {"loss": totals.nats.sum() / totals.codes.sum(), "grad_norm": optax.tree.norm(gradient)}
        if layout.streams > 1:
            for j in range(layout.streams):
                metrics[f"loss_{j}"] = totals.nats[j] / totals.codes[j]
        return TrainState(optax.apply_updates(state.model, updates), new), metrics

    return step


def train(
    config: Config,
    dataset: Dataset,
    run: Path,
    codec: Codec | None,
    valid: Dataset | None = None,
    console: Console | None = None,
    songs_per_valid: int = 32,
) -> bool:
    """Trains `run` to its last step, from its newest checkpoint where there is one; True when it got there.

    SIGTERM and Ctrl-C save a checkpoint and return False. `codec` turns sample songs into sound (train.sample_every).
    UserError where the dataset does not fit the model, or the run was begun with another config or dataset.
    """
    console = console or Console()
    for songs in (dataset, valid):
        if songs is not None:
            songs.check(config.model)
    if valid is not None and (apart := valid.made_with.differences(dataset.made_with)):
        raise UserError(f"{valid.folder} and {dataset.folder} were prepared differently ({'; '.join(apart)})")
    layout, mesh = make_layout(config.model), make_mesh(config.mesh)
    micro = config.train.batch // config.train.accumulate
    check_divides(mesh, micro, config.model.heads, config.model.width, layout.positions, config.model.key_heads)
    prepare_run(run, RunInfo(config, dataset.made_with, dataset.genres), console)
    report_cut(dataset, config, console)

    def init() -> TrainState:
        model: Any = SoundTransformer(config.model, rngs=nnx.Rngs(config.train.seed))
        return TrainState(model, optimizer(config.train).init(model))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init)
        shardings = state_shardings(shapes, mesh)
        on_batch, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        positions = position_sharding(mesh)
        step_function = jax.jit(
            make_step(config, layout, lambda x: jax.lax.with_sharding_constraint(x, positions)),
            in_shardings=(shardings, everywhere, on_batch),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        )
        checkpoints = open_checkpoints(run, config.train.keep)
        latest = checkpoints.latest
        if latest is None:
            state, first = jax.jit(init, out_shardings=shardings)(), 0
        else:
            state = TrainState(**restore(run, latest.step, shapes._asdict(), shardings._asdict()))
            first = latest.step
            say(console, f"{run}: going on from step {first} of {config.train.steps}")
        parameters = sum(x.size for x in jax.tree.leaves(state.model))
        say(
            console,
            f"{parameters / 1e6:.1f} M parameters, {len(dataset)} songs, {config.train.batch} songs a step of "
            f"{layout.positions} positions, {config.model.layout} layout, {len(jax.devices())} device(s)",
        )
        log = Log(run, first, config.train.steps, config.train.log_every, console)
        evaluate = make_evaluate(config, layout, valid, on_batch, songs_per_valid) if valid is not None else None
        apart = mesh.shape["data"] * mesh.shape["fsdp"]  # the fewest songs that divide
        watch = make_follow(valid or dataset, layout, config.model.memory, apart, on_batch, everywhere)
        rates = schedule(config.train)
        stream = batches(dataset, config.model, config.train.seed, config.train.batch, range(first, config.train.steps))
        stopped = StopSignal()
        step, pending, began = first, None, time.perf_counter()
        try:
            for step, batch in zip(range(first, config.train.steps), stream):
                codes = int((batch.targets != layout.pad).sum())
                placed = jax.device_put(batch, on_batch)
                state, metrics = step_function(state, jnp.array(step), placed)
                if pending is not None:  # one step late, so that reading it does not hold up the next step
                    began = _report(log, *pending, began)
                pending = (step, metrics, codes, float(jnp.asarray(rates(step))))
                done = step + 1
                if done % config.train.valid_every == 0 or done == config.train.steps:
                    if evaluate is not None:
                        pending[1]["valid_loss"] = evaluate(state.model)
                    pending[1]["diagonality"], looks = watch(state.model)
                    if looks.size:  # some song has lyrics
                        log.image(done, looks.T)
                if codec is not None and config.train.sample_every and done % config.train.sample_every == 0:
                    _sample(run, log, done, state.model, dataset, config, layout, codec)
                stop = stopped.by
                if done % config.train.checkpoint_every == 0 or done == config.train.steps or stop:
                    began = _report(log, *pending, began)  # first: a state that is not finite is not kept
                    pending = None
                    with saving(run):
                        checkpoints.save_checkpointables_async(done, state._asdict())
                if stop:
                    break
            if pending is not None:
                _report(log, *pending, began)
        finally:
            getattr(stream, "close", lambda: None)()
            stopped.restore()
            try:
                with saving(run):
                    checkpoints.close()  # waits for what is being saved
            finally:
                log.close()
    if step + 1 < config.train.steps:
        say(console, f"{run}: stopped by {stopped.by} after step {step + 1}; the same command goes on from there")
        return False
    return True


def prepare_run(run: Path, info: RunInfo, console: Console) -> None:
    """Makes the run folder, or checks that what was begun there can go on with this config and dataset."""
    if not (run / "config.json").exists():
        if run.is_dir() and any(run.iterdir()):
            raise UserError(f"{run} is not empty and not a run folder; name another with --run")
        return write_run(run, info)
    old = read_run(run)
    if apart := old.made_with.differences(info.made_with):
        raise UserError(
            f"{run} was trained on songs prepared differently ({'; '.join(apart)}): "
            "prepare these the same way, or name another --run"
        )
    changed = differences(old.config, info.config)
    free = ("train.log_every", "train.checkpoint_every", "train.keep", "train.valid_every", "train.sample", "mesh.")
    free += ("train.remat", "train.chunk")  # the same loss, but for rounding
    fixed = [c for c in changed if not c.startswith(free)]
    if fixed:
        raise UserError(
            f"{run} was begun with another config ({'; '.join(fixed)}): give the same, or name another --run"
        )
    if changed:
        say(console, f"{run}: {'; '.join(changed)}")
        write_run(run, info)
    return None


def report_cut(dataset: Dataset, config: Config, console: Console) -> None:
    """Says how much of the songs lies outside of the window."""
    frames = dataset.frames()
    cut = np.maximum(frames - config.model.frames, 0)
    if cut.any():
        say(
            console,
            f"note: {np.count_nonzero(cut)} of {len(frames)} songs are longer than the window of {config.model.frames} "
            f"frames; {100 * cut.sum() / frames.sum():.1f} % of all frames are not trained on (the dataset has them)",
        )


def make_evaluate(config: Config, layout: Layout, valid: Dataset, placed: NamedSharding, songs: int) -> Callable:
    """A function model -> loss in nats per code on the first songs of `valid`, lyrics and genre kept."""
    batch = config.train.batch
    examples = [make_example(valid[i], layout, config.model.memory) for i in range(min(songs, len(valid)))]
    while len(examples) % batch:  # one fixed shape: the last batch is filled with copies whose targets do not count
        examples.append(examples[0]._replace(targets=np.full_like(examples[0].targets, layout.pad)))
    stacked = [Example(*map(np.stack, zip(*examples[i : i + batch]))) for i in range(0, len(examples), batch)]

    @jax.jit
    def totals(model: SoundTransformer, batch: Example) -> Totals:
        keep = jnp.ones((len(batch.ids), KINDS), bool)
        return losses(model, batch, keep, layout, config.train.chunk, remat="none")

    def evaluate(model: SoundTransformer) -> float:
        parts = [totals(model, jax.device_put(batch, placed)) for batch in stacked]
        return sum(float(p.nats.sum()) for p in parts) / sum(int(p.codes.sum()) for p in parts)

    return evaluate


def _report(log: Log, step: int, metrics: dict[str, Any], codes: int, lr: float, began: float) -> float:
    values = {"loss": float(metrics["loss"])} | {name: float(value) for name, value in metrics.items()}
    now = time.perf_counter()
    log.metrics(step, values | {"lr": lr, "codes_per_s": codes / (now - began)})
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise UserError(f"{name} of step {step} is {values[name]}; lower train.lr_max or lengthen train.warmup")
    return now


def _sample(
    run: Path,
    log: Log,
    step: int,
    model: SoundTransformer,
    dataset: Dataset,
    config: Config,
    layout: Layout,
    codec: Codec,
) -> None:
    """The first song's prompt, sung at this step: RUN/samples/step.wav and TensorBoard."""
    example = make_example(dataset[0], layout, config.model.memory)
    prompt = Prompt(*(np.asarray(x)[None] for x in example[2:]))
    frames = min(round(config.train.sample_seconds * codec.frame_rate), layout.frames)
    song = sample_codes(model, layout, prompt, SampleConfig(), [config.train.seed], max(frames, 1))[0]
    samples = decode(codec, song.codes)
    if samples.size:
        (run / "samples").mkdir(exist_ok=True)
        write_wav(run / "samples" / f"{step:07d}.wav", samples, codec.rate)
        log.audio(step, samples, codec.rate)
