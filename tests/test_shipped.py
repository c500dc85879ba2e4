"""A model to pass on: the same model, in float16, as good as a run for all but training."""

import shutil

import jax
import numpy as np
import pytest
from conftest import CONFIG, changed
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file, save_file

import l2m_jax
from l2m_jax import checkpoint
from l2m_jax.checkpoint import default_run, load_model, prepare_run, read_run
from l2m_jax.config import UserError
from l2m_jax.lrc import read_reading
from l2m_jax.model import SoundTransformer
from l2m_jax.shipped import export
from l2m_jax.sung import listen

KEPT = '{"step": 8, "heads": [[0, 1]], "blank": 0.3}'


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trained, run)
    (run / "alignment.json").write_text(KEPT)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text('{"step": 8}')
    (run / "evaluation" / "evaluation.md").write_text("# run\n\n12 of 13 notes\n\n![a](a.png)\n")
    out = run.parent / "passed-on"
    return out, export(run, out, 8, "apache-2.0")


def test_the_same_model_in_float16(trained, exported):
    out, size = exported
    ours, info, step = load_model(out)
    theirs = load_model(trained, 8)[0]
    assert step == 8 and info == read_run(trained)
    assert size == (out / "model.safetensors").stat().st_size
    parameters = sum(x.size for x in jax.tree.leaves(theirs))
    assert 2 * parameters < size < 2 * parameters + 6000
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, np.asarray(b).astype(np.float16))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "\n## run\n" in card and "a.png" not in card
    assert "8 steps of 4 songs" in card and "12 of 13 notes" in card and info.made_with.codec_fingerprint in card
    assert (out / "alignment.json").read_text() == KEPT


def test_mistakes(trained, exported, tmp_path, monkeypatch):
    out, _ = exported
    with pytest.raises(UserError, match="is not an empty folder: name another"):
        export(trained, out)
    with pytest.raises(UserError, match="has no checkpoint of step 9; it has 4, 8, 12"):
        export(trained, tmp_path / "new", 9)
    with pytest.raises(UserError, match="no checkpoint of step 9; it is an exported model of step 8"):
        load_model(out, 9)
    before = (out / "config.json").read_bytes()
    with pytest.raises(UserError, match="is an exported model and cannot be trained"):
        prepare_run(out, read_run(out)._replace(genres=["other"]), Console(quiet=True))
    assert (out / "config.json").read_bytes() == before
    other = shutil.copytree(out, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "layers/up/kernel"}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"is of another model: no layers/up/kernel of shape \(2, 16, 64\)"):
        load_model(other)
    (other / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read"):
        load_model(other)
    model = jax.tree.map(lambda x: x + 7e4, SoundTransformer(CONFIG.model, rngs=nnx.Rngs(0)))
    monkeypatch.setattr("l2m_jax.shipped.load_model", lambda run, step: (model, read_run(trained), 8))
    with pytest.raises(UserError, match=r"beyond float16 \(65,504\)"):
        export(trained, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_card_is_of_its_step_and_its_command_can_be_copied(exported, tmp_path, monkeypatch):
    run = exported[0].parent / "run"
    kept = read_run(run)
    assert "rotary" not in (exported[0] / "README.md").read_text()
    turned = kept._replace(config=changed(model={"rotary": True}), genres=["hip hop"])
    monkeypatch.setattr("l2m_jax.checkpoint.read_run", lambda folder: turned)
    export(run, tmp_path / "later", 12)
    card = (tmp_path / "later" / "README.md").read_text()
    assert "2 layers, 16 wide, 2 heads, rotary, norm post" in card
    assert "12 of 13 notes" not in card and "None: the one in run/evaluation is of step 8." in card
    assert "--genre 'hip hop' -o song.wav" in card and not (tmp_path / "later" / "alignment.json").exists()


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_an_evaluation_that_cannot_be_read_is_none(exported, tmp_path, damage):
    run = shutil.copytree(exported[0].parent / "run", tmp_path / "run")
    if damage == "lost":
        (run / "evaluation" / "evaluation.md").unlink()
    else:
        (run / "evaluation" / "evaluation.json").write_text('{"step"')
    export(run, tmp_path / "out", 8)
    assert "None: `l2m evaluate` makes one." in (tmp_path / "out" / "README.md").read_text()


def test_a_damaged_alignment_leaves_the_folder_free(exported, tmp_path):
    run = shutil.copytree(exported[0].parent / "run", tmp_path / "run")
    (run / "alignment.json").write_text("{")
    with pytest.raises(UserError, match="alignment.json"):
        export(run, tmp_path / "out", 8)
    (run / "alignment.json").write_text(KEPT)
    assert export(run, tmp_path / "out", 8) > 0


def test_the_model_of_the_package(exported, monkeypatch, tmp_path):
    """None ships as long as its folder is absent."""
    monkeypatch.setattr(checkpoint, "DEFAULT", exported[0])
    assert default_run() == exported[0]
    monkeypatch.setattr(checkpoint, "DEFAULT", tmp_path)
    with pytest.raises(UserError, match="no trained model comes with this version: name the run folder of one"):
        default_run()


def test_what_ships_is_small_and_sings():
    assert (checkpoint.DEFAULT / "model.safetensors").stat().st_size <= 25e6
    assert "license: apache-2.0" in (checkpoint.DEFAULT / "README.md").read_text()
    singer = l2m_jax.load()
    assert singer.info.made_with.codec == "solfege" and singer.info.genres == ["ballad", "march", "techno", "waltz"]
    kept = read_reading(singer.run)
    assert kept is not None and kept.step == singer.step
    lyrics = "do mi sol mi\nfa la sol fa"
    song = singer.generate(lyrics, "waltz")
    heard = listen(song.samples, singer.codec.rate, lyrics)
    print(f"asked {heard.asked}, sung {heard.names}")
    assert song.ended and heard.accuracy > 0.9
