"""The torch originals as backends: the same codes, states and fingerprints where the weights are; other encoders."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import SUNG
from test_bert import report, tiny_folder

from l2m_jax.codec import encode
from l2m_jax.config import UserError
from l2m_jax.data import Dataset
from l2m_jax.encoders import Encoders
from l2m_jax.lyrics import encode_genre, encode_text, parse_lyrics, split_pieces
from l2m_jax.originals import load_torch_codec, load_torch_text_encoder
from l2m_jax.prepare import prepare
from l2m_jax.singer import load, make_prompt
from l2m_jax.train import train
from l2m_jax.weights import load_codec, load_text_encoder

pytestmark = pytest.mark.torch
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
SIZE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def xlm_roberta(folder):
    """A random XLM-R in the published layout; its 514 positions are 512 of text."""
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        "▁la",
        "▁lu",
        "na",
        "la",
        "月",
        "よ",
        "▁don",
        "'",
        "t",
        *"dorefasli",
    ]
    vocab = [(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))]
    transformers.XLMRobertaTokenizer(vocab=[*vocab, ("<mask>", 0.0)]).save_pretrained(folder)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(vocab) + 1, max_position_embeddings=26, type_vocab_size=1, **SIZE
    )
    torch.manual_seed(0)
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(folder)  # has no pooler, as the published one
    return str(folder)


def modern_bert(folder):
    """A random ModernBERT with a byte-level tokenizer, in the published layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*special, *letters, "la", "Ġla"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("l", "a"), ("Ġ", "la")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    kinds = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token", "mask_token"), special))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kinds).save_pretrained(folder)
    config = transformers.ModernBertConfig(
        vocab_size=len(vocab), max_position_embeddings=64, **SIZE | {"pad_token_id": 3, "cls_token_id": 1}
    )
    torch.manual_seed(0)
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def test_one_bert_is_one_encoder_in_both(tmp_path):
    folder = str(tiny_folder(tmp_path))
    lyrics = parse_lyrics("[verse]\nluna déjà 月 !\n[chorus]\n" + "la sol lunal " * 20)
    for layer in (0, 1, -1):
        ours, theirs = load_text_encoder(folder, layer), load_torch_text_encoder(folder, layer)
        assert ours.fingerprint == theirs.fingerprint
        assert (ours.width, ours.positions, ours.layer) == (theirs.width, theirs.positions, theirs.layer)
        for mine, other in zip(split_pieces(ours, lyrics), split_pieces(theirs, lyrics)):
            np.testing.assert_array_equal(mine, other)
        report(f"layer {layer}", encode_text(ours, lyrics).states, encode_text(theirs, lyrics).states, 1e-4)
        report("genre", encode_genre(ours, "sol la"), encode_genre(theirs, "sol la"), 1e-4)


def test_one_codec_is_one_in_both():
    rng = np.random.default_rng(0)
    sound = (np.sin(np.arange(30_000) * 0.07) * 0.3 + rng.normal(0, 0.02, 30_000)).astype(np.float32)
    for codebooks in (None, 1):
        ours, theirs = load_codec("solfege", codebooks), load_torch_codec("solfege", codebooks)
        assert ours.fingerprint == theirs.fingerprint
        assert (ours.rate, ours.codebooks, ours.entries) == (theirs.rate, theirs.codebooks, theirs.entries)
        equal = np.mean(encode(ours, sound) == theirs.encode(sound))
        print(f"{ours.codebooks} codebooks: {equal:.4%} of the codes are equal, needed 99.9 %")
        assert equal >= 0.999


def test_songs_of_the_originals_go_on_with_ours(tmp_path, songs, sung, encoders):
    out = tmp_path / "out"
    both = encoders._replace(codec_backend="torch", text_backend="torch")
    assert prepare(songs, out, both).new == 6
    theirs, ours = Dataset(out), Dataset(sung)
    assert not theirs.made_with.differences(ours.made_with) and theirs.made_with.text_backend == "torch"
    for i in range(6):
        assert np.mean(theirs[i].codes == ours[i].codes) >= 0.999
        np.testing.assert_allclose(theirs[i].lyric_states, ours[i].lyric_states, atol=4e-3)  # stored as float16
        assert theirs[i].source == ours[i].source
    assert prepare(songs, out, encoders).new == 0 and prepare(songs, out, both).new == 0


@pytest.mark.parametrize("make", [xlm_roberta, modern_bert])
def test_other_encoders(tmp_path, make):
    folder = make(tmp_path)
    encoder = load_torch_text_encoder(folder, 2)
    assert encoder.fingerprint == load_torch_text_encoder(folder, 2).fingerprint
    assert encoder.fingerprint != load_torch_text_encoder(folder, 1).fingerprint
    text = "la luna\n月よ don't lala"
    lyrics = parse_lyrics(text)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(" ".join(text.split()))["input_ids"]
    pieces = split_pieces(encoder, lyrics)
    assert pieces.ids.tolist() == ids[1:-1]
    # What the pieces of each word spell is the word.
    spelled = ["".join(encoder.tokenizer.id_to_token(i) for i in pieces.ids[pieces.word == w]) for w in range(5)]
    if make is xlm_roberta:
        assert spelled == [f"▁{word}" for word in lyrics.words]
    else:
        assert [spelled[i] for i in (0, 1, 3, 4)] == ["la", "Ġluna", "Ġdon't", "Ġlala"] and len(spelled[2]) == 7
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, 1:-1].numpy()
    report(make.__name__, encode_text(encoder, lyrics).states, states, 1e-6)
    longer = encode_text(encoder, parse_lyrics("la luna " * 40))  # beyond its positions
    assert longer.word.tolist()[-1] == 79 and np.abs(longer.states).sum(1).min() > 0


def test_a_run_finds_its_text_encoder_again(tmp_path, songs):
    encoders = Encoders(text_encoder=xlm_roberta(tmp_path / "xlm"), text_layer=2, text_backend="torch")
    prepare(songs, tmp_path / "data", encoders)
    config = dataclasses.replace(SUNG, model=dataclasses.replace(SUNG.model, text_width=32, memory=20))
    assert not train(config, Dataset(tmp_path / "data"), tmp_path / "run", load_codec())
    singer = load(tmp_path / "run")
    prompt, warnings = make_prompt(singer, "la sol", "techno")
    assert prompt.states.shape == (1, 20, 32) and not warnings
    (warning,) = make_prompt(singer, "夢夢夢", "techno")[1]
    assert "of the pieces are unknown to the text encoder xlm" in warning


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    def refused(message, load, *arguments):
        with pytest.raises(UserError, match=message) as caught:
            load(*arguments)
        assert "\n" not in str(caught.value)

    t5 = transformers.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5Model(t5).save_pretrained(tmp_path / "t5")
    tiny = tiny_folder(tmp_path / "bert")
    transformers.BertTokenizer(str(tiny / "vocab.txt")).save_pretrained(tmp_path / "t5")
    refused("t5 is no plain text encoder", load_torch_text_encoder, str(tmp_path / "t5"), 1)
    refused(r"layer is 3; bert has 2 layers: allowed are -3 to 2", load_torch_text_encoder, str(tiny), 3)
    refused("codebooks is 33; codec solfege has 1 to", load_torch_codec, "solfege", 33)
    stereo = transformers.EncodecConfig(audio_channels=2, num_filters=4, hidden_size=8, codebook_size=32)
    transformers.EncodecModel(stereo).save_pretrained(tmp_path / "stereo")
    refused("has 2 channels; .* mono", load_torch_codec, str(tmp_path / "stereo"))
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused("lacks the tensors", load_torch_text_encoder, str(tiny), 1)
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    refused("transformers cannot load it", load_torch_text_encoder, str(tiny), 1)
    refused(r"holds no \*.safetensors, and pickles .* are not opened; .* converts it", load_text_encoder, str(tiny), 1)
