"""A trained model to pass on: weights in float16, what it was trained with, a card. After `lrc`.

    FOLDER/config.json          as in the run
           model.safetensors    parameters in float16 by their paths (layers/up/kernel), and `step`
           alignment.json       which heads follow the words, where they were chosen
           README.md            the card; its evaluation is that of RUN/evaluation/evaluation.md

The folder is as good as a run for every command but `l2m train`; `checkpoint.load_model` reads it.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save

from l2m_jax.audio import write_atomic
from l2m_jax.checkpoint import WEIGHTS, RunInfo, load_model, write_run
from l2m_jax.config import UserError
from l2m_jax.lrc import read_reading
from l2m_jax.sharding import path_name

CARD = """---
license: {licence}
tags: [music, lyrics, jax, l2m_jax]
---

# {name}

A model of l2m_jax: lyrics and a genre go in, a song comes out. Sing with it:

    l2m generate {name} --lyrics "..." --genre {genre} -o song.wav

| | |
| --- | --- |
| parameters | {millions:.1f} M, stored in float16 ({megabytes:.1f} MB) |
| model | {layers} layers, {width} wide, {heads} heads{rotary}, norm {norm}, layout {layout}, {codebooks} codebooks |
| window | {frames} frames, {memory} rows of memory |
| trained | {step} steps of {batch} songs{begun}, learning rate up to {lr}, guide {guide} |
| genres | {genres} |
| codec | {codec} [{codec_fingerprint}] |
| text encoder | {text_encoder}, layer {text_layer} [{text_fingerprint}] |
| licence | {licence} |

Codec and text encoder are no part of this folder: their fingerprints are checked when the model is loaded.

## Evaluation

{evaluation}
"""


def export(run: Path, out: Path, step: int | None = None, licence: str = "unknown") -> int:
    """Writes the model of a run as a folder of its own; returns the bytes of its weights.

    `licence` goes into the card: weights are derived from songs, whose licences bind them.
    UserError where `out` holds anything already, the run is none, or a parameter is beyond float16.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: name another")
    model, info, step = load_model(run, step)
    tensors = {"step": np.asarray(step)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        with np.errstate(over="ignore"):
            tensors[path_name(path)] = np.asarray(leaf).astype(np.float16)
        if not np.isfinite(tensors[path_name(path)]).all():
            raise UserError(f"{run}: {path_name(path)} has values beyond float16 (65,504): it cannot be exported")
    content, kept = save(tensors, metadata={"format": "l2m_jax"}), read_reading(run)
    parameters = sum(x.size for x in tensors.values()) - 1
    card = _card(run, out.name, info, step, parameters, len(content), licence)
    write_run(out, info)
    if kept is not None and kept.step == step:
        shutil.copyfile(run / "alignment.json", out / "alignment.json")
    write_atomic(out / "README.md", card.encode())
    write_atomic(out / WEIGHTS, content)  # last: without it the folder is no model
    return len(content)


def _card(run: Path, name: str, info: RunInfo, step: int, parameters: int, size: int, licence: str) -> str:
    evaluated = run / "evaluation"
    try:
        of = json.loads((evaluated / "evaluation.json").read_text("utf-8"))["step"]
        evaluation = _inside((evaluated / "evaluation.md").read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        evaluation = "None: `l2m evaluate` makes one."
    else:
        evaluation = evaluation if of == step else f"None: the one in {run.name}/evaluation is of step {of}."
    model, train = info.config.model, info.config.train
    return CARD.format(
        name=name, genre=shlex.quote(info.genres[0] if info.genres else ""), genres=", ".join(info.genres) or "none",
        millions=parameters / 1e6, megabytes=size / 1e6, step=step, batch=train.batch, lr=train.lr_max,
        layers=model.layers, width=model.width, heads=model.heads, norm=model.norm, layout=model.layout,
        guide=train.guide, frames=model.frames, memory=model.memory, licence=licence, **info.made_with._asdict(),
        rotary=", rotary" if model.rotary else "", evaluation=evaluation,
        begun=f", begun with {Path(train.init).name}" if train.init else "",
    )  # fmt: skip


def _inside(text: str) -> str:
    """A page as part of another: headings one step down, without pictures, which do not come along."""
    lines = (line for line in text.splitlines() if not line.startswith("!["))
    return "\n".join("#" + line if line.startswith("#") else line for line in lines).strip()
