"""Words that a recogniser hears: how they are compared, and a tiny random recogniser of transformers."""

import json

import numpy as np
import pytest

from l2m_jax.config import UserError
from l2m_jax.heard import _revision, error_rates, load_recogniser, normalise, transcribe


def test_only_what_is_said_is_compared():
    assert normalise("  Don’t STOP,\nthe — Música! 月 ") == "don't stop the música 月"
    assert normalise("Straße") == normalise("STRASSE") and normalise("...") == ""


def test_the_revision_is_the_commit_that_the_hub_sent(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--asr"
    for path, text in (("refs/main", "0123abcd"), ("snapshots/0123abcd/config.json", "{}")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    assert _revision("some/asr") == "0123abcd"
    assert _revision("some/other") == "" == _revision(str(tmp_path))


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    pytest.importorskip("jiwer")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("asr")
    vocab = {"<pad>": 0, "<unk>": 1, "|": 2} | {letter: i for i, letter in enumerate("adelmorsti", 3)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    return load_recogniser(str(folder))


@pytest.mark.torch
def test_a_recogniser_hears_any_sound(recogniser):
    rng = np.random.default_rng(0)
    for seconds in (0.1, 2, 35):
        heard = transcribe(recogniser, rng.standard_normal(int(24_000 * seconds)).astype(np.float32), 24_000)
        assert isinstance(heard, str)
    assert heard and set(heard) <= set("adelmorsti <unk>") and not recogniser.phonemes


@pytest.mark.torch
def test_errors_are_counted_over_all_words(recogniser):
    found = error_rates(recogniser, ["[verse]\nDo, re\nmi", "la la", "[intro]"], ["do mi", "la LA!", "re"])
    assert found["word_error_rate"] == pytest.approx(1 / 5) and found["words"] == 5 and found["songs"] == 2
    assert found["protocol"]["model"] == recogniser.name and "case folded" in found["protocol"]["normalisation"]
    assert error_rates(recogniser, ["[intro]"], ["la"])["word_error_rate"] is None


@pytest.mark.torch
def test_phonemes_are_those_of_the_tokenizer(recogniser):
    class Phonemes:
        def phonemize(self, text):
            return " ".join(text.replace(" ", ""))

    class Pipeline:
        tokenizer = Phonemes()

    found = error_rates(recogniser._replace(phonemes=True, pipeline=Pipeline), ["do re"], ["d o r i"])
    assert found["phoneme_error_rate"] == 1 / 4 and found["phonemes"] == 4 and "word_error_rate" not in found


@pytest.mark.torch
def test_a_folder_that_holds_no_recogniser_is_named(tmp_path):
    pytest.importorskip("jiwer")
    with pytest.raises(UserError, match=r"--asr .*: no speech recogniser can be loaded"):
        load_recogniser(str(tmp_path))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(UserError, match=r"--asr needs the extras torch and eval: pip install"):
        load_recogniser("any")
