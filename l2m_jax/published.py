"""Published models: a name gives a place, tensors are read from it, renamed by a table and filled into a module.

After config and torchfile, before weights, which holds the tables. Every tensor of a checkpoint is used or listed as
known to be unused, and every parameter is filled.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from l2m_jax.config import UserError
from l2m_jax.torchfile import read_torch

SHIPPED = {"solfege": "solfege_codec"}
"""Names of models that come with the package, and their folders under assets/."""

Tensors = dict[str, np.ndarray]
T = TypeVar("T")


class Rule(NamedTuple):
    """One line of a table of names: a published tensor, our parameter, and what is done to the array on the way."""

    published: str
    """Regular expression of the whole published name."""
    ours: str
    """Dotted path of our parameter, with groups of the expression as in re.sub."""
    change: Callable[[np.ndarray], np.ndarray] = np.asarray
    """Published array -> our array."""


def resolve(name: str) -> tuple[str, Path]:
    """Finds a model: (short name, its folder, or its file).

    `name` is the name of a model in the package (`SHIPPED`; a folder of that name is ./solfege), a folder with
    config.json and *.safetensors, a checkpoint of Meta's (`encodec_24khz-d7cc33bc.th`, or a folder that holds nothing
    else), or a hub id such as `facebook/encodec_24khz`, which is downloaded once. UserError if there is no such model,
    or no network to get it with.
    """
    if name in SHIPPED:
        return name, Path(str(importlib.resources.files("l2m_jax"))) / "assets" / SHIPPED[name]
    path = Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")) and len(files := sorted(path.glob("*.th"))) == 1:
        path = files[0]
    if path.is_dir():
        return path.resolve().name, path
    if path.is_file() and path.suffix == ".th":
        return path.stem.split("-")[0], path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or path.suffix == ".th":
        raise UserError(
            f"{name}: no such model; possible are {', '.join(SHIPPED)} (in the package), a folder with config.json and"
            " *.safetensors, a checkpoint of Meta's (a file that ends in .th), a hub id such as facebook/encodec_24khz"
        )
    from huggingface_hub import snapshot_download  # here: the command line must answer without a network library

    try:
        wanted = ["config.json", "*.safetensors", "tokenizer*", "vocab*", "special_tokens_map.json"]
        return name.split("/")[1], Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client lets its own errors and those of its HTTP library through
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: is no folder, and cannot be downloaded ({reason}); with no network, give the path of a folder"
            " that holds its config.json and model.safetensors"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The model's published config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: is not a table of settings")
    return config


def read_tensors(place: Path) -> Tensors:
    """All tensors of a folder's *.safetensors, or of one of torch's files; floating ones as float32, however stored."""
    if place.is_file():
        return {key: _widened(array) for key, array in read_torch(place).items()}
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{place}: holds no *.safetensors, and pickles (pytorch_model.bin) are not opened; where torch and"
            " transformers are, AutoModel.from_pretrained(NAME).save_pretrained(FOLDER) converts it; then copy the"
            " tokenizer's files there"
        )
    tensors: Tensors = {}
    for file in files:
        try:
            tensors |= {key: _widened(array) for key, array in load_file(file).items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
    return tensors


def _widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 is not a NumPy kind: all but integers and bools are floats."""
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


def rename(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], unused: Sequence[str], source: str | Path
) -> Tensors:
    """Our names and arrays from published ones. The first rule that matches counts; `unused` are regular expressions.

    UserError names the tensors that neither a rule nor `unused` knows, or two that claim one parameter.
    """
    ours: Tensors = {}
    unknown: list[str] = []
    for key, array in tensors.items():
        rule = next((rule for rule in rules if re.fullmatch(rule.published, key)), None)
        if rule:
            path = re.sub(rule.published, rule.ours, key)
            if path in ours:
                raise UserError(f"{source}: two tensors claim parameter {path}; {key} is one of them")
            ours[path] = rule.change(array)
        elif not any(re.fullmatch(pattern, key) for pattern in unused):
            unknown.append(key)
    if unknown:
        raise UserError(f"{source}: tensors with no place in the model: {some(unknown)}")
    return ours


def fill(module: T, arrays: Mapping[str, np.ndarray], source: str | Path) -> T:
    """The module (concrete, or from `jax.eval_shape`) with every parameter taken from `arrays` as float32.

    Parameters are named by their dotted path, e.g. `encoder.layers.0.kernel`. UserError names those that are missing,
    of another shape, or without a parameter.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(module)
    params = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }
    if missing := [key for key in params if key not in arrays]:
        raise UserError(f"{source}: lacks the parameters {some(missing)}")
    if extra := [key for key in arrays if key not in params]:
        raise UserError(f"{source}: has parameters that the model lacks: {some(extra)}")
    for key, leaf in params.items():
        if arrays[key].shape != leaf.shape:
            raise UserError(f"{source}: {key} has shape {arrays[key].shape}; the config asks for {leaf.shape}")
    return jax.tree_util.tree_unflatten(tree, [jnp.asarray(arrays[key], jnp.float32) for key in params])


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """16 hex digits of the SHA-256 over names, shapes and float32 bytes; the same in any order and storage type."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key], "<f4")
        digest.update(f"{key} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def some(names: Sequence[str]) -> str:
    """The first four, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
