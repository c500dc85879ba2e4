"""Beginning with the weights of a trained model instead of random ones. After `checkpoint`, before `train`.

What says the same in both trainings is taken over: layers always; the rows of the window that both have; what reads and
says codes where the codec is the same, what reads text where the text encoder is. The rest begins as it would anyway.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from l2m_jax.checkpoint import WEIGHTS, RunInfo, default_run, load_model
from l2m_jax.config import ModelConfig, UserError
from l2m_jax.sharding import path_name

SHIPPED = "solfege"
"""Name of the model that comes with the package."""
APART = {"frames", "memory", "dtype", "entries", "codebooks", "text_width"}
"""Fields of `ModelConfig` in which the two may differ."""
CODES = ("token_embedding", "codebook_embedding", "head/")
TEXT = ("project/",)
WINDOW = "position_embedding"


class Beginning(NamedTuple):
    """The weights that a training begins with."""

    weights: dict[str, np.ndarray]
    """By the paths of the parameters; those that begin anew are missing."""
    told: str


def read_beginning(info: RunInfo) -> Beginning:
    """The weights of `info.config.train.init` that fit `info`.

    UserError where there is no model, its layers are of another shape, or (with more than one process) it is a run.
    """
    asked, wanted = info.config.train.init, info.config.model
    folder = default_run() if asked == SHIPPED else Path(asked)
    if not (folder / "config.json").is_file():
        raise UserError(f"train.init {asked}: no run and no exported model; give the folder of one, or {SHIPPED}")
    if jax.process_count() > 1 and not (folder / WEIGHTS).is_file():
        raise UserError(f"train.init {asked}: several processes need an exported model: l2m export {asked} FOLDER")
    trained, old, step = load_model(folder)
    apart = [
        f"model.{name} {had} -> {want}"
        for name in (field.name for field in dataclasses.fields(ModelConfig))
        if name not in APART and (had := getattr(old.config.model, name)) != (want := getattr(wanted, name))
    ]
    if apart:
        raise UserError(
            f"train.init {asked} is a model of another shape ({'; '.join(apart)}): give the same, or begin without"
        )
    told, anew = [f"begins with the weights of {asked}, step {step}"], ()
    mine, theirs = info.made_with, old.made_with
    if (mine.codec_fingerprint, mine.codebooks) != (theirs.codec_fingerprint, theirs.codebooks):
        told, anew = [*told, "it learns codes anew (another codec)"], anew + CODES
    if mine.text_fingerprint != theirs.text_fingerprint:
        told, anew = [*told, "it learns to read anew (another text encoder)"], anew + TEXT
    if wanted.frames > (had := old.config.model.frames):
        told.append(f"it learns the window anew from frame {had} on")
    paths = jax.tree.leaves_with_path(trained)
    weights = {name: np.asarray(x) for path, x in paths if not (name := path_name(path)).startswith(anew)}
    return Beginning(weights, "; ".join(told))


def take_over(beginning: Beginning, model: Any) -> Any:
    """The model with these weights, laid out on its devices as it was."""

    def take(path: tuple[Any, ...], new: jax.Array) -> jax.Array:
        found = beginning.weights.get(path_name(path))
        if found is None:
            return new
        if path_name(path) == WINDOW:
            found = found[: len(new)]
            return jax.jit(lambda x: x.at[: len(found)].set(found), out_shardings=new.sharding)(new)
        return jax.device_put(found, new.sharding)

    return jax.tree.map_with_path(take, model)
