"""Fine-tuning: what a training takes over from a trained model, and what it does not."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from conftest import MADE_WITH, changed
from rich.console import Console

from l2m_jax.checkpoint import RunInfo, load_model
from l2m_jax.config import UserError
from l2m_jax.data import Dataset
from l2m_jax.finetune import SHIPPED, read_beginning, take_over
from l2m_jax.sharding import make_mesh, path_name
from l2m_jax.shipped import export
from l2m_jax.step import make_program
from l2m_jax.train import train


def by_name(model):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(model)}


def begun(config, made_with=MADE_WITH):
    """Parameters by name: as a training with `config.train.init` begins, and without; and what is told."""
    program = make_program(config, mesh := make_mesh(config.mesh))
    with jax.set_mesh(mesh):
        random = program.init().model
        beginning = read_beginning(RunInfo(config, made_with, []))
        taken = take_over(beginning, random)
        for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(random), strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        return by_name(taken), by_name(random), beginning.told


def test_all_of_the_same_model(trained, tmp_path):
    """A run in float32, an exported model in float16; another number of steps done is another model."""
    theirs = by_name(load_model(trained)[0])
    ours, random, told = begun(changed(init=str(trained)))
    assert told == f"begins with the weights of {trained}, step 12"
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
        assert "bias" in name or "scale" in name or (random[name] != value).any()
    export(trained, tmp_path / "passed-on")
    halves, _, _ = begun(changed(init=str(tmp_path / "passed-on")))
    for name, value in theirs.items():
        np.testing.assert_array_equal(halves[name], value.astype(np.float16))


@pytest.mark.parametrize("frames", [24, 64])
def test_another_window_keeps_the_rows_of_both(trained, frames):
    ours, random, told = begun(changed(init=str(trained), model={"frames": frames, "memory": 14}))
    theirs = by_name(load_model(trained)[0])
    both = min(frames, 40) + 2
    found = ours.pop("position_embedding")
    np.testing.assert_array_equal(found[:both], theirs["position_embedding"][:both])
    np.testing.assert_array_equal(found[both:], random["position_embedding"][both:])
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert ("from frame 40 on" in told) == (frames > 40)


@pytest.mark.parametrize(
    ("other", "anew", "says"),
    [
        ({"codec_fingerprint": "f00d"}, ("token_embedding", "codebook_embedding", "head/"), "codes anew"),
        ({"text_fingerprint": "f00d"}, ("project/",), "to read anew"),
    ],
)
def test_other_encoders_begin_anew(trained, other, anew, says):
    ours, random, told = begun(changed(init=str(trained)), MADE_WITH._replace(**other))
    theirs = by_name(load_model(trained)[0])
    assert sum(name.startswith(anew) for name in ours) >= len(anew)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, (random if name.startswith(anew) else theirs)[name])
    assert says in told and told.count(";") == 1


def test_a_codec_of_another_size(trained):
    """Other entries, codebooks and text width are other shapes; what is left of the model is taken over."""
    model = {"entries": 32, "codebooks": 3, "text_width": 20}
    other = MADE_WITH._replace(codec_fingerprint="f00d", text_fingerprint="f00d", **model)
    ours, random, _ = begun(changed(init=str(trained), model=model), other)
    theirs = by_name(load_model(trained)[0])
    assert {name: value.shape for name, value in ours.items()} == {name: x.shape for name, x in random.items()}
    assert (ours["layers/up/kernel"] == theirs["layers/up/kernel"]).all()
    np.testing.assert_array_equal(ours["position_embedding"][:42], theirs["position_embedding"])


def test_a_training_begins_there_and_goes_on_without_it(trained, prepared, tmp_path):
    source, run, says = tmp_path / "passed-on", tmp_path / "run", io.StringIO()
    export(trained, source)
    config = changed(init=str(source), lr_max=1e-5, lr_min=1e-5, steps=4)
    assert not train(config, Dataset(prepared), run, None, console=Console(file=says, width=300))
    assert f"begins with the weights of {source}, step 12" in says.getvalue()

    def losses(folder):
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert losses(run)[0] < losses(trained)[8] < losses(trained)[0]
    export(run, tmp_path / "tuned")
    assert "4 steps of 4 songs, begun with passed-on, learning" in (tmp_path / "tuned" / "README.md").read_text()
    source.rename(tmp_path / "gone")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    assert not train(longer, Dataset(prepared), run, None, console=Console(file=says, width=300))
    assert len(losses(run)) == 6


def test_mistakes_leave_no_run(trained, prepared, tmp_path, monkeypatch):
    run, songs = tmp_path / "run", Dataset(prepared)
    for config, says in (
        (changed(init=str(tmp_path / "none")), "none: no run and no exported model; give the folder"),
        (changed(init=str(trained), model={"width": 32}), r"of another shape \(model.width 16 -> 32\): give the same"),
        (changed(init=SHIPPED), "solfege is a model of another shape .*model.layers"),
    ):
        with pytest.raises(UserError, match=says):
            train(config, songs, run, None)
        assert not run.exists()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=f"several processes need an exported model: l2m export {trained} FOLDER"):
        read_beginning(RunInfo(changed(init=str(trained)), MADE_WITH, []))
