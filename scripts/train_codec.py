"""Trains a codec as the one that ships with the package, from nothing: an EnCodec of 16 filters, 24 kHz, 1.5 kbit/s.

    python scripts/train_codec.py OUT [--steps 13000] [--filters 16] ...

An hour on two cores; on an accelerator take larger batches, longer clips and more --workers (the card of the codec that
ships has its commands). Stop it at any time: the same command goes on at the last checkpoint, to the bit. The sound is
made as it goes (`l2m_jax.sounds`: a pure function of seed and step). OUT gets settings.json, metrics.jsonl, TensorBoard
events with sound, checkpoints, and at the end codec/, a folder that `--codec` and
`transformers.EncodecModel.from_pretrained` load.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console

from l2m_jax.checkpoint import open_checkpoints, restore, saving
from l2m_jax.cli import answering
from l2m_jax.codec_losses import Weights
from l2m_jax.codec_training import CodecState, Phase, finished, first_codebooks, quantize, run, start, train_step
from l2m_jax.config import UserError
from l2m_jax.encodec import Encodec, EncodecConfig
from l2m_jax.log import Log
from l2m_jax.progress import say
from l2m_jax.publish import save_codec
from l2m_jax.published import resolve
from l2m_jax.sharding import path_name
from l2m_jax.sounds import KINDS, RATE, SHARES, kind_of, make_clip
from l2m_jax.weights import codec_tensors, load_codec

WEIGHTS: dict[Phase, Weights] = {
    "free": Weights(1.0, 0.3, 0.1, 0.05, 0.3, 0.2, 0.2, 0.0),
    "bound": Weights(0.4, 1.5, 0.3, 0.3, 0.7, 3.0, 10.0, 0.0),
    "decoder": Weights(0.1, 2.0, 0.4, 0.5, 1.0, 8.0, 8.0, 0.2),
}
"""The loss of each phase."""
PARTS = 4  # clips that are cut from one
AHEAD = 16  # steps whose sound is being made


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of; another value is another run."""

    init: str = ""
    """Another run of the same shapes, finished or not, or a codec of them (a folder, or solfege): its last networks and
    codebooks are the first ones here. Where all steps are the decoder's, a codec keeps its codes to the bit."""
    steps: int = 13_000
    """All steps."""
    free_steps: int = 6_000
    """Steps of the autoencoder without quantizer, before k-means; 0 after --init, whose codebooks then go on."""
    decoder_steps: int = 2_500
    """The last steps, of the decoder alone."""
    batch: int = 4
    frames: int = 50
    """Length of a clip; 75 frames are a second."""
    filters: int = 16
    hidden: int = 32
    """Width of a latent, and of the codebooks' entries."""
    lstm_layers: int = 1
    """0 is stored as one layer of zeros: it saves no room, only time."""
    lr: float = 8e-4
    bound_lr: float = 7e-5
    decoder_lr: float = 3e-4
    """Highest learning rates of the phases; each warms up and falls as a cosine."""
    solfege: float = 5.0
    """What a solfege song counts for in the codebooks; what is no band either counts for 1. They are a solfege model's
    words first: otherwise four entries in ten are for sound that it never sings."""
    band: float = 5.0
    """What a band counts for: few entries lie as far out as dense and loud sound, which is else played too low."""
    shares: tuple[float, ...] = SHARES
    """How often each of `sounds.KINDS` is drawn."""
    latents: int = 100_000
    """That k-means sees."""
    seed: int = 0

    def __post_init__(self) -> None:
        least = 0 if self.init else 1
        if min(self.phases.values()) < 0 or min(self.free_steps, self.phases["bound"]) < least:
            raise UserError(
                f"phases of {self.phases} steps: give more --steps, or fewer of these; without --init, free and bound "
                "need one each at least"
            )
        if len(self.shares) != len(KINDS) or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"--shares {self.shares}: give one for each of {', '.join(KINDS)}, with a sum of 1")

    @property
    def config(self) -> EncodecConfig:
        """Of the codec."""
        return EncodecConfig(
            num_filters=self.filters,
            hidden_size=self.hidden,
            num_lstm_layers=self.lstm_layers,
            target_bandwidths=(1.5,),
        )

    @property
    def phases(self) -> dict[Phase, int]:
        """Steps of each."""
        bound = self.steps - self.free_steps - self.decoder_steps
        return {"free": self.free_steps, "bound": bound, "decoder": self.decoder_steps}


def main(
    out: tyro.conf.Positional[Path],
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
    checkpoint_every: int = 250,
    workers: int = 1,
) -> None:
    """Trains, or goes on training, the codec in OUT; `workers` processes make its sound, which is the same with any."""
    console = Console()
    config = settings.config
    stored = out / "settings.json"
    if settings.init and not stored.exists():
        _check_shapes(settings)
    out.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    if stored.exists() and json.loads(stored.read_text()) != wanted:
        raise UserError(f"{out} holds a run with other settings, {stored.read_text()}: choose another folder")
    stored.write_text(json.dumps(wanted))

    ends = list(itertools.accumulate(settings.phases.values()))
    optimizer = _optimizer(settings)
    step = jax.jit(functools.partial(train_step, optimizer=optimizer), static_argnames="phase", donate_argnums=0)
    module = Encodec(config, 2, nnx.Rngs(settings.seed))
    state = start(module, optimizer)

    with open_checkpoints(out, 2) as checkpoints:
        latest = checkpoints.latest
        first = 0 if latest is None else latest.step
        if first:
            state = _restored(out, first, state)
            say(console, f"going on at step {first}")
        elif settings.init:
            state = _begun(settings, state, optimizer)
        log = Log(out, first, settings.steps, 25, console)
        for index, (sound, importance) in enumerate(_clips(settings, range(first, settings.steps), workers), first):
            if index == settings.free_steps and (index or not settings.init):
                say(console, "k-means of the latents")
                state = state._replace(codebooks=_k_means(state, settings, config, workers))
            key = jax.random.fold_in(jax.random.key(settings.seed), index)
            phase = list(WEIGHTS)[bisect.bisect_right(ends, index)]
            state, metrics = step(state, sound, importance, key, WEIGHTS[phase], phase=phase)
            log.metrics(index, {name: float(value) for name, value in jax.device_get(metrics).items()})
            if (index + 1) % checkpoint_every == 0 or index + 1 == settings.steps:
                with saving(out):
                    checkpoints.save_checkpointables(index + 1, {"state": _by_name(state)})
            if (index + 1) % (4 * checkpoint_every) == 0:
                log.audio(index, _listen(state, settings, phase != "free"), config.sampling_rate)
        log.close()
    if settings.init and not _is_run(settings.init) and settings.decoder_steps == settings.steps:
        module, tensors = load_codec(settings.init).module, codec_tensors(resolve(settings.init)[1])
        module.decoder = state.decoder
        # Another export would round them anew, and codes with them.
        kept = {name: array for name, array in tensors.items() if not name.startswith("decoder.")}
        save_codec(out / "codec", module, config, kept)
    else:
        save_codec(out / "codec", finished(state, module), config)
    say(console, f"the codec is in {out / 'codec'}; how good it is: l2m codec song.wav --codec {out / 'codec'}")


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW, with a cosine for each phase."""
    highest = [(settings.lr, 10), (settings.bound_lr, 100), (settings.decoder_lr, 100)]
    phases = [(steps, lr, fall) for steps, (lr, fall) in zip(settings.phases.values(), highest) if steps]
    rate = optax.join_schedules(
        [
            optax.warmup_cosine_decay_schedule(0, lr, min(200, steps // 2), steps, lr / fall)
            for steps, lr, fall in phases
        ],
        list(itertools.accumulate(steps for steps, *_ in phases))[:-1],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))


def _restored(run: Path, step: int, state: CodecState) -> CodecState:
    """The state that was saved after so many steps, in the place of `state`."""
    # By name: Orbax sorts the keys of a tree, and in ours some are numbers and some are words.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes, placed = _by_name(jax.eval_shape(lambda: state)), _by_name(jax.tree.map(lambda _: device, state))
    leaves = restore(run, step, {"state": shapes}, {"state": placed})["state"]
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in _by_name(state)])


def _is_run(init: str) -> bool:
    return (Path(init) / "settings.json").is_file()


def _check_shapes(settings: Settings) -> None:
    """UserError where nothing is at --init, or it has other shapes."""
    if _is_run(settings.init):
        found = Settings(**json.loads((Path(settings.init) / "settings.json").read_text())).config
    else:
        try:
            found = load_codec(settings.init).config
        except UserError as error:
            raise UserError(f"--init {settings.init}: no run of this script is there, and no codec: {error}") from None
    theirs, ours = (dataclasses.asdict(config) for config in (found, settings.config))
    flags = {"num_filters": "--filters", "hidden_size": "--hidden", "num_lstm_layers": "--lstm-layers"}
    apart = [name for name in ours if ours[name] != theirs[name] and name != "target_bandwidths"]
    if others := [f"{name} {theirs[name]}, not {ours[name]}" for name in apart if name not in flags]:
        raise UserError(f"--init {settings.init}: no codec of the kind that this script trains: {'; '.join(others)}")
    if apart:
        wanted = " ".join(f"{flag} {theirs[name]}" for name, flag in flags.items())
        raise UserError(f"--init {settings.init} has other shapes than this run: give {wanted}")


def _begun(settings: Settings, state: CodecState, optimizer: optax.GradientTransformation) -> CodecState:
    """The networks and codebooks at --init, in the place of those of `state`."""
    init = Path(settings.init)
    if not _is_run(settings.init):
        return start(load_codec(settings.init).module, optimizer)
    with open_checkpoints(init, 2) as checkpoints:
        latest = checkpoints.latest
    if latest is None:
        raise UserError(f"--init {init}: it has no checkpoint yet")
    theirs = Settings(**json.loads((init / "settings.json").read_text()))
    moments = jax.eval_shape(_optimizer(theirs).init, (state.encoder, state.decoder))
    found = _restored(init, latest.step, state._replace(moments=moments))
    return found._replace(moments=state.moments)


def _by_name(state: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _clips(settings: Settings, steps: range, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The clips of each step, and their importance, made while the steps before are computed.

    They are parts of longer ones: notes begin before them, end after.
    """
    size = round(settings.frames / 75 * RATE)
    counts = {"solfege": settings.solfege, "band": settings.band}
    made: dict[int, Future[np.ndarray]] = {}
    # Spawned: a fork of a process that runs JAX may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for index in range(steps.start - AHEAD, steps.stop):
            for whole, _ in _cuts(settings, index + AHEAD) if index + AHEAD < steps.stop else ():
                if whole not in made:
                    kind = _kind(settings, whole)
                    made[whole] = pool.submit(make_clip, settings.seed, whole, PARTS * size / RATE, kind)
            if index < steps.start:
                continue
            cuts = _cuts(settings, index)
            clips = [made[whole].result()[part * size :][:size] for whole, part in cuts]
            importance = [counts.get(_kind(settings, whole), 1.0) for whole, _ in cuts]
            for whole, part in cuts:
                if part == PARTS - 1:
                    del made[whole]
            yield np.stack(clips), np.array(importance, np.float32)


def _kind(settings: Settings, whole: int) -> str:
    return kind_of(settings.seed, whole, settings.shares)


def _cuts(settings: Settings, index: int) -> list[tuple[int, int]]:
    """For each clip of a step the longer one that it is cut from, and which part of that; each row is at another."""
    places = [divmod(index + row, PARTS) for row in range(settings.batch)]
    return [(whole * settings.batch + row, part) for row, (whole, part) in enumerate(places)]


def _k_means(state: CodecState, settings: Settings, config: EncodecConfig, workers: int):
    """Codebooks of the latents of sound that no step uses, each as often as its clip is important."""
    encode = jax.jit(lambda encoder, sound: run(encoder, sound[..., None]).reshape(-1, config.hidden_size))
    batches = -(-settings.latents // (settings.batch * settings.frames))
    other, latents, importance = dataclasses.replace(settings, seed=settings.seed + 1), [], []
    for sound, counts in _clips(other, range(batches), workers):
        latents.append(encode(state.encoder, sound))
        importance.append(np.repeat(counts, settings.frames))
    weights = np.concatenate(importance)
    drawn = np.random.default_rng(settings.seed).choice(len(weights), len(weights), p=weights / weights.sum())
    found = np.concatenate(latents)[drawn]
    return first_codebooks(jnp.asarray(found), 2, config.codebook_size, jax.random.key(settings.seed))


@functools.partial(jax.jit, static_argnames="quantized")
def _through(state: CodecState, sound: jax.Array, quantized: bool) -> jax.Array:
    latents = run(state.encoder, sound[..., None])
    if quantized:
        latents = quantize(latents[0], jnp.ones(latents.shape[1]), state.codebooks, jax.random.key(0))[0][None]
    return run(state.decoder, latents)[0, :, 0]


def _listen(state: CodecState, settings: Settings, quantized: bool) -> np.ndarray:
    """Four clips of three seconds, each followed by what the codec makes of it."""
    clips = [
        make_clip(settings.seed + 2, i, 3.0, kind) for i, kind in enumerate(("solfege", "voice", "string", "mixture"))
    ]
    return np.concatenate([x for clip in clips for x in (clip, np.asarray(_through(state, clip[None], quantized)))])


if __name__ == "__main__":
    with answering("train_codec"):
        tyro.cli(main)
