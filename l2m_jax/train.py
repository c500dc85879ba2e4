"""Training: the loop around the step. After `step`, before `generate`.

A checkpoint holds the step, and the batch of a step depends on (seed, step, row) alone: a run that was stopped goes on
exactly as if it had not been. With more than one process (`hosts`) every line here runs in each of them; process 0
alone writes the run folder, but for the checkpoints, and talks.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from l2m_jax.audio import write_atomic, write_wav
from l2m_jax.checkpoint import RunInfo, differences, open_checkpoints, prepare_run, restore, saving, steps_done
from l2m_jax.codec import Codec, decode
from l2m_jax.config import Config, MeshConfig, SampleConfig, UserError, from_json, to_json
from l2m_jax.data import Dataset, Example, batches, make_example
from l2m_jax.finetune import read_beginning, take_over
from l2m_jax.follow import make_follow
from l2m_jax.hosts import Agreement, decide, lead, meet, place, rows_here, together
from l2m_jax.log import Log, Silence
from l2m_jax.model import SoundTransformer, prompt_of
from l2m_jax.optim import schedule
from l2m_jax.progress import say
from l2m_jax.sample import sample_codes
from l2m_jax.sharding import make_mesh
from l2m_jax.step import Program, TrainState, make_program
from l2m_jax.stop import StopSignal
from l2m_jax.tokens import Layout, make_layout


def train(
    config: Config,
    dataset: Dataset,
    run: Path,
    codec: Codec | None,
    valid: Dataset | None = None,
    console: Console | None = None,
    songs_per_valid: int = 32,
    enough: Callable[[SoundTransformer, int], bool] | None = None,
) -> int:
    """Trains `run` to its last step, from its newest checkpoint where there is one. Returns the exit status.

    That is 0 where it got there or had `enough`, which is asked after each checkpoint, with the model and the steps
    done; 130 or 143 where Ctrl-C or SIGTERM, to any process, stopped it, with a checkpoint. `codec` turns sample songs
    into sound (train.sample_every). UserError where the dataset does not fit the model, or the run was begun with
    another config or songs of other encoders; other songs of the same are told. With more than one process an error of
    one ends them all: see `hosts.together`.
    """
    with together():
        return _train(config, dataset, run, codec, valid, console or Console(), songs_per_valid, enough)


def _train(
    config: Config,
    dataset: Dataset,
    run: Path,
    codec: Codec | None,
    valid: Dataset | None,
    console: Console,
    songs_per_valid: int,
    enough: Callable[[SoundTransformer, int], bool] | None,
) -> int:
    console = console if lead() else Console(quiet=True)
    for songs in (dataset, valid):
        if songs is not None:
            songs.check(config.model)
    if valid is not None and (apart := valid.made_with.differences(dataset.made_with)):
        raise UserError(f"{valid.folder} and {dataset.folder} were prepared differently ({'; '.join(apart)})")
    layout, mesh = make_layout(config.model), make_mesh(config.mesh)
    program = make_program(config, mesh)
    info = RunInfo(config, dataset.made_with, dataset.genres, dataset.fingerprint)
    beginning = read_beginning(info) if config.train.init and not steps_done(run) else None
    begin(run, info, len(dataset), console)
    report_songs(dataset, config, console)

    with jax.set_mesh(mesh):
        checkpoints = open_checkpoints(run, config.train.keep)
        latest = checkpoints.latest
        first = int(decide("first step", lambda: str(latest.step if latest else 0)))
        if not first:
            state = program.init()
            if beginning is not None:
                state = state._replace(model=take_over(beginning, state.model))
                say(console, f"{run}: {beginning.told}")
        else:
            state = TrainState(**restore(run, first, program.shapes._asdict(), program.shardings._asdict()))
            say(console, f"{run}: going on from step {first} of {config.train.steps}")
        parameters = sum(x.size for x in jax.tree.leaves(state.model))
        say(
            console,
            f"{parameters / 1e6:.1f} M parameters, {len(dataset)} songs, {config.train.batch} songs a step of "
            f"{layout.positions} positions, {config.model.layout} layout, {len(jax.devices())} device(s)"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        )
        evaluate = make_evaluate(config, layout, valid, program, songs_per_valid) if valid is not None else None
        watch = make_follow(valid or dataset, layout, config.model.memory, mesh)
        log = Log(run, first, config.train.steps, config.train.log_every, console) if lead() else Silence()
        rates = schedule(config.train)
        steps, rows = range(first, config.train.steps), rows_here(program.batch, config.train.batch)
        of_all = config.train.seed, config.train.batch, steps, rows, config.train.windows
        stream = batches(dataset, config.model, *of_all)
        stopped, agreement = StopSignal(), Agreement(mesh)
        step, stop, pending, began = first, 0, None, time.perf_counter()
        try:
            for step, batch in zip(steps, stream):
                placed = place(program.batch, config.train.batch, rows, batch)
                state, metrics = program.step(state, np.int32(step), placed)
                if pending is not None:  # one step late, so that reading it does not hold up the next step
                    began = _report(log, *pending, began)
                pending = (step, metrics, float(jnp.asarray(rates(step))))
                done = step + 1
                if done % config.train.valid_every == 0 or done == config.train.steps:
                    if evaluate is not None:
                        pending[1]["valid_loss"] = evaluate(state.model)
                    pending[1]["diagonality"], looks = watch(state.model)
                    if looks.size:  # some song has lyrics
                        log.image(done, looks.T)
                if codec is not None and config.train.sample_every and done % config.train.sample_every == 0:
                    _sample(run, log, done, state.model, dataset, config, layout, codec)
                stop = agreement.say(stopped.status)
                if done % config.train.checkpoint_every == 0 or done == config.train.steps or stop:
                    began = _report(log, *pending, began)  # first: a state that is not finite is not kept
                    pending = None
                    with saving(run):
                        checkpoints.save_checkpointables_async(done, state._asdict())
                    if enough is not None and not stop and enough(state.model, done):
                        return 0
                if stop:
                    break
            if pending is not None:
                _report(log, *pending, began)
        except Exception:
            with together():  # others would wait for ever in what follows
                raise
        finally:
            getattr(stream, "close", lambda: None)()
            stopped.restore()
            try:
                with saving(run):
                    checkpoints.close()  # waits for what is being saved
            finally:
                log.close()
    if step + 1 < config.train.steps:
        by = signal.Signals(stop - 128).name
        say(console, f"{run}: stopped by {by} after step {step + 1}; the same command goes on from there")
        return stop
    return 0


def begin(run: Path, info: RunInfo, songs: int, console: Console) -> None:
    """Process 0 makes or checks the run folder; the others check that they see it, and were asked for the same."""

    def made() -> str:
        prepare_run(run, info, console)
        if jax.process_count() > 1:
            write_atomic(run / ".seen", token := uuid.uuid4().bytes)
            return json.dumps([token.hex(), to_json(info.config), info.made_with, songs, info.songs])
        return ""

    decided = decide("run", made)
    if not lead():
        token, config, made_with, their_songs, fingerprint = json.loads(decided)
        if apart := differences(from_json(Config, config, "process 0"), info.config):
            raise UserError(f"this process was asked for another training than process 0: {'; '.join(apart)}")
        if (list(info.made_with), info.songs) != (made_with, fingerprint):
            raise UserError(
                f"this process was given {songs} songs, process 0 {their_songs}, or others: give all the same"
            )
        seen = run / ".seen"
        if not seen.is_file() or seen.read_bytes().hex() != token:
            raise UserError(
                f"{run} is not the folder that process 0 writes: --run must lie on storage that all machines share"
            )
    if jax.process_count() > 1:
        meet("run")
        if lead():
            (run / ".seen").unlink(missing_ok=True)


def report_songs(dataset: Dataset, config: Config, console: Console) -> None:
    """Says how much of the songs lies outside of the window, and how many can guide where guiding is asked for."""
    frames, timed = dataset.frames(), dataset.words_timed()
    cut = np.maximum(frames - config.model.frames, 0)
    if cut.any():
        say(
            console,
            f"note: {np.count_nonzero(cut)} of {len(frames)} songs are longer than the window of {config.model.frames} "
            f"frames; {100 * cut.sum() / frames.sum():.1f} % of all frames are not trained on (the dataset has them)",
        )
    if config.train.guide and not timed.all():
        say(
            console,
            f"note: {np.count_nonzero(timed)} of {len(timed)} songs have word times (words.csv); "
            "train.guide does nothing for the others",
        )


def make_evaluate(config: Config, layout: Layout, valid: Dataset, program: Program, songs: int) -> Callable:
    """A function model -> loss in nats per code on the first songs of `valid`, lyrics and genre kept."""
    batch, rows = config.train.batch, rows_here(program.batch, config.train.batch)
    examples = [make_example(valid[i], layout, config.model.memory) for i in range(min(songs, len(valid)))]
    while len(examples) % batch:  # one fixed shape: the last batch is filled with copies whose targets do not count
        examples.append(examples[0]._replace(targets=np.full_like(examples[0].targets, layout.pad)))
    stacked = [
        Example(*map(np.stack, zip(*(examples[i + row] for row in rows)))) for i in range(0, len(examples), batch)
    ]

    def evaluate(model: SoundTransformer) -> float:
        parts = [program.held_out(model, place(program.batch, batch, rows, part)) for part in stacked]
        return sum(float(p.nats.sum()) for p in parts) / sum(int(p.codes.sum()) for p in parts)

    return evaluate


def _report(log: Log | Silence, step: int, metrics: dict[str, Any], lr: float, began: float) -> float:
    values = {"loss": float(metrics["loss"])} | {name: float(value) for name, value in metrics.items()}
    if math.isnan(values.get("astray", 0.0)):  # no word of this batch has a time
        del values["astray"]
    codes = values.pop("codes")
    now = time.perf_counter()
    log.metrics(step, values | {"lr": lr, "codes_per_s": codes / (now - began)})
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise UserError(f"{name} of step {step} is {values[name]}; lower train.lr_max or lengthen train.warmup")
    return now


def _sample(
    run: Path,
    log: Log | Silence,
    step: int,
    model: SoundTransformer,
    dataset: Dataset,
    config: Config,
    layout: Layout,
    codec: Codec,
) -> None:
    """The first song's prompt, sung at this step: RUN/samples/step.wav and TensorBoard. Process 0 sings alone."""
    mine: Any = None
    if jax.process_count() > 1:
        model = multihost_utils.process_allgather(model, tiled=True)
        if not lead():
            return
        mine = jax.local_devices()[:1]
        model = jax.device_put(model, mine[0])
    example = make_example(dataset[0], layout, config.model.memory)
    prompt = jax.tree.map(lambda x: np.asarray(x)[None], prompt_of(example))
    frames = min(round(config.train.sample_seconds * codec.pace), layout.frames)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), mine)) if mine else contextlib.nullcontext():
        song = sample_codes(model, layout, prompt, SampleConfig(), [config.train.seed], max(frames, 1))[0]
        samples = decode(codec, song.codes)
    if samples.size:
        (run / "samples").mkdir(exist_ok=True)
        write_wav(run / "samples" / f"{step:07d}.wav", samples, codec.rate)
        log.audio(step, samples, codec.rate)
