"""A run on disk: its config and its checkpoints. After `optim`, before `log`.

A run folder holds config.json, metrics.jsonl, TensorBoard events and checkpoints/STEP/{model,optimizer}: apart, so that
sampling loads the model alone. The data position is the step; no iterator state is stored. A model that `shipped` has
exported has model.safetensors instead of checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tensorstore
from flax import nnx
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from l2m_jax.audio import write_atomic
from l2m_jax.config import Config, UserError, from_json, to_json
from l2m_jax.data import MadeWith
from l2m_jax.model import SoundTransformer
from l2m_jax.progress import say
from l2m_jax.published import read_tensors
from l2m_jax.sharding import path_name

WEIGHTS = "model.safetensors"
DEFAULT = Path(__file__).parent / "assets" / "solfege_model"
"""The model that comes with the package, where one does."""


class RunInfo(NamedTuple):
    """What config.json says: the config, and of the dataset what it was prepared with, its genres and fingerprint."""

    config: Config
    made_with: MadeWith
    genres: list[str]
    songs: str = ""  # `Dataset.fingerprint`; runs of before it was kept have none


def write_run(run: Path, info: RunInfo) -> None:
    """Makes the run folder and its config.json."""
    content = {"l2m_jax": "run", "config": to_json(info.config), "made_with": info.made_with._asdict()}
    content |= {"genres": info.genres, "songs": info.songs}
    write_atomic(run / "config.json", (json.dumps(content, indent=2) + "\n").encode())


def read_run(run: Path) -> RunInfo:
    """What the run folder's config.json says; UserError where it is not a run."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder (it has no config.json); make one with: l2m train --run {run}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_with = MadeWith(**content["made_with"])
        values, genres, songs = content["config"], list(content["genres"]), str(content.get("songs", ""))
        if isinstance(remat := values["train"].get("remat"), bool):  # of runs begun when it was yes or no
            values["train"]["remat"] = "layer" if remat else "none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the config of a run ({error})") from None
    return RunInfo(from_json(Config, values, str(path)), made_with, genres, songs)


def prepare_run(run: Path, info: RunInfo, console: Console) -> None:
    """Makes the run folder, or checks that what was begun there can go on with this config and dataset.

    UserError where it cannot, and where the run is an exported model: it has no optimizer to go on with.
    """
    if (run / WEIGHTS).exists():
        raise UserError(f"{run} is an exported model and cannot be trained: name another folder with --run")
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
    free += ("train.steps",)  # told, for the learning rate changes: a run that is done can be made longer
    fixed = [c for c in changed if not c.startswith(free)]
    if fixed:
        raise UserError(
            f"{run} was begun with another config ({'; '.join(fixed)}): give the same, or name another --run"
        )
    if (done := max(steps_done(run), default=0)) > info.config.train.steps:
        raise UserError(f"{run} has {done} steps done: train.steps {info.config.train.steps} must be no fewer")
    if old.config.train.steps != info.config.train.steps:
        changed.append("the learning rate follows the cosine of these steps from here on")
    if old.songs not in ("", info.songs):
        changed.append("other songs than before, in an order of their own from here on")
    if changed:
        say(console, f"{run}: {'; '.join(changed)}")
        write_run(run, info)
    return None


def open_checkpoints(run: Path, keep: int) -> ocp.training.Checkpointer:
    """The run's checkpoints; the newest `keep` are kept. Close it when done: saving is asynchronous."""
    # Any: the policies do not name their arguments as Orbax's own protocols do.
    every: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)  # the trainer decides
    newest: Any = ocp.training.preservation_policies.LatestN(keep)
    return ocp.training.Checkpointer(
        str((run / "checkpoints").resolve()),
        save_decision_policy=every,
        preservation_policy=newest,
        cleanup_tmp_directories=True,
    )


@contextlib.contextmanager
def saving(run: Path) -> Iterator[None]:
    """Around what saves, or waits for what is being saved: UserError where it cannot be written."""
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore's errors are ValueErrors
        reason = str(error).partition("\n")[0]
        raise UserError(f"{run}/checkpoints: cannot be written ({reason}); the checkpoint before stands") from error


def restore(run: Path, step: int, shapes: dict[str, Any], shardings: dict[str, Any]) -> dict[str, Any]:
    """The named parts (`model`, `optimizer`) of a checkpoint, placed on devices as `shardings` say."""
    folder = (run / "checkpoints" / str(step)).resolve()
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    try:
        for part, wanted in shapes.items():
            _check_stored(folder / part, wanted)
        return ocp.load_checkpointables(str(folder), like)
    except Exception as error:  # Orbax raises all kinds, bare Exception among them
        reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
        raise UserError(
            f"{folder} cannot be restored ({reason}); if it is damaged or of another model, delete it to use the "
            "checkpoint before"
        ) from error


def _check_stored(part: Path, wanted: Any) -> None:
    """Touches the last byte of every array and compares the shapes: Orbax would do so with pages of tracebacks."""
    base = {"driver": "file", "path": f"{part}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    # Where the file behind a key is gone, TensorStore answers with an empty value, not with an error.
    if any(len(store.read(key, byte_range=slice(-1, None)).result().value) != 1 for key in keys):
        raise ValueError(f"{part} lacks arrays")
    stored = [tuple(json.loads(store[key])["shape"]) for key in keys if key.endswith(b"/zarr.json")]
    if sorted(stored) != sorted(leaf.shape for leaf in jax.tree.leaves(wanted)):
        raise ValueError(f"{part} has arrays of other shapes")


def load_model(run: Path, step: int | None = None) -> tuple[SoundTransformer, RunInfo, int]:
    """The model of a run at `step` (the newest by default) on the first device, for sampling."""
    info = read_run(run)
    shapes = jax.eval_shape(lambda: SoundTransformer(info.config.model, rngs=nnx.Rngs(0)))
    if (run / WEIGHTS).exists():
        model, only = _read_exported(run, shapes)
        if step not in (None, only):
            raise UserError(f"{run} has no checkpoint of step {step}; it is an exported model of step {only}")
        return model, info, only
    steps = steps_done(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet; train it first: l2m train --run {run}")
    if step is not None and step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts = restore(run, chosen, {"model": shapes}, {"model": jax.tree.map(lambda _: device, shapes)})
    return parts["model"], info, chosen


def steps_done(run: Path) -> list[int]:
    """Steps of which the run has a checkpoint, the newest last."""
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _read_exported(run: Path, shapes: Any) -> tuple[SoundTransformer, int]:
    """The model whose weights lie in the folder, in float32, and its step."""
    tensors = read_tensors(run)

    def read(path: tuple[Any, ...], like: Any) -> jax.Array:
        found = tensors.get(path_name(path))
        if found is None or found.shape != like.shape:
            raise UserError(f"{run / WEIGHTS} is of another model: no {path_name(path)} of shape {like.shape}")
        return jax.numpy.asarray(found, like.dtype)

    return jax.tree_util.tree_map_with_path(read, shapes), int(tensors.get("step", 0))


def default_run() -> Path:
    """The model that comes with the package; UserError where none does."""
    if not (DEFAULT / WEIGHTS).is_file():
        raise UserError("no trained model comes with this version: name the run folder of one, as `make demo` makes it")
    return DEFAULT


def differences(old: Config, new: Config) -> list[str]:
    """Fields in which two configs differ, as `train.batch 8 -> 4`."""
    found = []
    for part in dataclasses.fields(Config):
        a, b = getattr(old, part.name), getattr(new, part.name)
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if x != y:
                found.append(f"{part.name}.{field.name} {x} -> {y}")
    return found
