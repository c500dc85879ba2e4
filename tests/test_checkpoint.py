"""The run folder: what it says of itself, and checkpoints that are whole or refused."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import CONFIG, MADE_WITH, changed
from flax import nnx
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from l2m_jax.checkpoint import RunInfo, differences, load_model, prepare_run, read_run, restore, write_run
from l2m_jax.config import MeshConfig, UserError
from l2m_jax.model import SoundTransformer
from l2m_jax.optim import optimizer
from l2m_jax.sharding import make_mesh, state_shardings

INFO = RunInfo(CONFIG, MADE_WITH, ["march", "waltz"])


@pytest.fixture
def mine(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_run_comes_back_as_it_was(tmp_path):
    write_run(tmp_path / "a" / "run", INFO)
    assert read_run(tmp_path / "a" / "run") == INFO
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run/config.json: cannot be written"):
        write_run(tmp_path / "file" / "run", INFO)


def test_what_is_not_a_run_is_said(tmp_path):
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{run} is not a run folder .*l2m train --run {run}"):
            load_model(run)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c["config"]["model"].update(widht=3), "config.json: model: unknown key 'widht'"),
        (lambda c: c["config"]["train"].update(batch="8"), "config.json: train: batch is '8'; needed: int"),
        (lambda c: c["config"].update(modle={}), "unknown key 'modle'"),
        (lambda c: c["made_with"].update(colour="red"), "config.json is not the config of a run"),
        (lambda c: c.pop("genres"), "config.json is not the config of a run .*genres"),
    ],
)
def test_config_that_does_not_belong_is_named(tmp_path, change, says):
    write_run(tmp_path, INFO)
    content = json.loads((tmp_path / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_config_that_is_no_json_is_said(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="config.json is not the config of a run"):
        read_run(tmp_path)


def test_missing_steps_are_said(tmp_path, mine):
    write_run(tmp_path / "new", INFO)
    with pytest.raises(UserError, match="new has no checkpoint yet; train it first: l2m train --run"):
        load_model(tmp_path / "new")
    (mine / "checkpoints" / "16.orbax-checkpoint-tmp").mkdir()  # being written, or left by a run that was killed
    with pytest.raises(UserError, match="run has no checkpoint of step 5; it has 4, 8, 12"):
        load_model(mine, 5)
    assert load_model(mine)[2] == 12 and load_model(mine, 4)[2] == 4
    assert (mine / "checkpoints" / "16.orbax-checkpoint-tmp").exists()  # reading takes nothing from who writes


@pytest.mark.parametrize("pattern", ["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
@pytest.mark.parametrize("how", ["lost", "cut"])
def test_damaged_checkpoint_is_said(mine, pattern, how, capfd):
    (file,) = (mine / "checkpoints" / "12" / "model").glob(pattern)
    file.unlink() if how == "lost" else file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="checkpoints/12 cannot be restored .*; if it is damaged") as caught:
        load_model(mine)
    assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err
    assert load_model(mine, 8)[2] == 8


def test_model_of_another_shape_is_refused(mine):
    content = json.loads((mine / "config.json").read_text())
    content["config"]["model"]["width"] = 32
    (mine / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="model has arrays of other shapes.; if it is damaged or of another model"):
        load_model(mine)


def test_why_a_checkpoint_is_not_restored_is_said(mine, monkeypatch):
    """Where memory is short, nobody shall delete what is whole."""

    def short(*args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand pages more")

    monkeypatch.setattr(ocp, "load_checkpointables", short)
    with pytest.raises(UserError, match="cannot be restored .RESOURCE_EXHAUSTED: Out of memory.; if it is damaged"):
        load_model(mine)


def test_the_model_alone_is_the_model_of_the_training(mine):
    """`load_model` gives what training would go on from, without a look at the optimizer."""
    model, info, step = load_model(mine)
    assert step == 12 and info == read_run(mine) and info.config == CONFIG
    shapes = jax.eval_shape(lambda: SoundTransformer(CONFIG.model, rngs=nnx.Rngs(0)))
    parts = {"model": shapes, "optimizer": jax.eval_shape(optimizer(CONFIG.train).init, shapes)}
    both = restore(mine, 12, parts, state_shardings(parts, make_mesh(MeshConfig())))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(both["model"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    shutil.rmtree(mine / "checkpoints" / "12" / "optimizer")
    load_model(mine)
    old = load_model(mine, 4)[0]
    assert (np.asarray(old.token_embedding) != np.asarray(model.token_embedding)).any()  # it has moved


def test_differences_name_the_fields():
    other = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, batch=8, seed=1), mesh=MeshConfig(fsdp=2)
    )
    assert differences(CONFIG, other) == ["train.seed 0 -> 1", "train.batch 4 -> 8", "mesh.fsdp 1 -> 2"]
    assert differences(CONFIG, CONFIG) == []


@pytest.fixture
def begun(tmp_path):
    prepare_run(tmp_path / "run", INFO, Console(quiet=True))
    return tmp_path / "run", INFO


def test_another_config_is_refused_by_name(begun):
    run, info = begun
    other = changed(model={"width": 32}, lr_max=1.0, log_every=5)
    with pytest.raises(UserError) as caught:
        prepare_run(run, info._replace(config=other), Console(quiet=True))
    assert str(caught.value) == (
        f"{run} was begun with another config (model.width 16 -> 32; train.lr_max 0.01 -> 1.0): give the same, or name"
        " another --run"
    )
    assert read_run(run).config == CONFIG


def test_what_does_not_change_the_training_may_change(begun):
    run, info = begun
    config = changed(log_every=5, checkpoint_every=7, keep=1, valid_every=9, sample_every=3, sample_seconds=1.0)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=-1))
    says = io.StringIO()
    prepare_run(run, info._replace(config=config), Console(file=says, width=400))
    assert "train.keep 3 -> 1" in says.getvalue() and "mesh.fsdp 1 -> -1" in says.getvalue()
    assert read_run(run).config == config


def test_steps_may_change_but_not_below_those_done(mine):
    says = io.StringIO()
    info = read_run(mine)
    for steps in (20, 12):
        asked = info._replace(config=changed(steps=steps))
        prepare_run(mine, asked, Console(file=says, width=400))
        assert read_run(mine) == asked
    told = "the learning rate follows the cosine of these steps from here on"
    assert says.getvalue() == f"{mine}: train.steps 12 -> 20; {told}\n{mine}: train.steps 20 -> 12; {told}\n"
    with pytest.raises(UserError, match="run has 12 steps done: train.steps 11 must be no fewer"):
        prepare_run(mine, info._replace(config=changed(steps=11)), Console(quiet=True))
    assert read_run(mine) == asked


def test_songs_of_another_origin_are_refused(begun):
    run, info = begun
    other = info._replace(made_with=MADE_WITH._replace(text_fingerprint="other"))
    with pytest.raises(UserError, match="prepared differently .text encoder: 7ext and other."):
        prepare_run(run, other, Console(quiet=True))


def test_other_songs_are_told(begun):
    run, info = begun
    for songs, told in (("first", False), ("second", True)):  # of a run begun before songs were kept nothing is told
        says = io.StringIO()
        prepare_run(run, info._replace(songs=songs), Console(file=says, width=400))
        assert ("other songs than before" in says.getvalue()) == told
        write_run(run, info._replace(songs=songs))
    assert read_run(run).songs == "second"
