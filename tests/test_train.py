"""Training: exact resume, and what stops a run."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from conftest import CONFIG, MADE_WITH, changed, make_prepared, make_record, one_batch
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from l2m_jax import train as module
from l2m_jax.checkpoint import load_model
from l2m_jax.config import MeshConfig, UserError
from l2m_jax.data import Dataset, batches
from l2m_jax.log import Silence
from l2m_jax.optim import schedule
from l2m_jax.sharding import make_mesh
from l2m_jax.step import losses, make_program
from l2m_jax.tokens import make_layout
from l2m_jax.train import make_evaluate, train

LAYOUT = make_layout(CONFIG.model)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loss_texts(run):
    """As they are written: a bit of difference would show."""
    return [(line["step"], json.dumps([line["loss"], line["grad_norm"], line["lr"]])) for line in lines(run)]


def assert_same_model(run, other, step):
    for ours, theirs in zip(*(jax.tree.leaves(load_model(r, step)[0]) for r in (run, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def spy(monkeypatch, do):
    """Calls `do(step)` before the batch of each step is handed out."""

    def watched(dataset, model, seed, batch, steps, *rest):
        for step, example in zip(steps, batches(dataset, model, seed, batch, steps, *rest)):
            do(step)
            yield example

    monkeypatch.setattr(module, "batches", watched)


def test_every_step_is_told_once(trained):
    told = lines(trained)
    assert [line["step"] for line in told] == list(range(12))
    assert set(told[0]) == {"step", "loss", "loss_0", "loss_1", "grad_norm", "lr", "codes_per_s"}
    assert sorted(os.listdir(trained / "checkpoints")) == ["12", "4", "8"]
    assert told[-1]["loss"] < told[0]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_gone_on_is_as_if_never_stopped(tmp_path, prepared, trained, monkeypatch, number):
    run, says = tmp_path / "run", io.StringIO()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        spy(patch, lambda step: os.kill(os.getpid(), number) if step == 5 else None)
        console = Console(file=says, width=300)
        assert train(CONFIG, Dataset(prepared), run, None, console=console) == 128 + number
    assert f"stopped by {number.name} after step 6; the same command goes on from there" in says.getvalue()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert load_model(run)[2] == 6 and len(lines(run)) == 6
    if number == signal.SIGINT:
        return
    assert not train(CONFIG, Dataset(prepared), run, None, console=console)
    assert "going on from step 6 of 12" in says.getvalue()
    assert loss_texts(run) == loss_texts(trained)
    assert_same_model(run, trained, 12)


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path, prepared, trained):
    """SIGKILL after step 7, the checkpoint of step 4 being whole: steps 4 to 7 are trained again and told once."""
    run, preset = tmp_path / "run", tmp_path / "preset.py"
    preset.write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "from l2m_jax import train\n"
        "from l2m_jax.config import *\n"
        f"config = {CONFIG!r}\n"
        "batches = train.batches\n"
        "def killed(dataset, model, seed, batch, steps, *rest):\n"
        "    for step, example in zip(steps, batches(dataset, model, seed, batch, steps, *rest)):\n"
        "        while step == 7:\n"
        f"            if Path({str(run)!r}, 'checkpoints', '4').exists():\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield example\n"
        "train.batches = killed\n"
    )
    command = [sys.executable, "-m", "l2m_jax.cli", "train", "--config", preset, "--data", prepared, "--run", run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_model(run)[2] == 4 and len(lines(run)) >= 4
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # what a kill in the middle of a line leaves
    assert not train(CONFIG, Dataset(prepared), run, None)
    assert loss_texts(run) == loss_texts(trained)
    assert_same_model(run, trained, 12)


def test_a_run_at_its_end_has_nothing_to_do(tmp_path, prepared, trained):
    before = (trained / "metrics.jsonl").read_text()
    assert not train(CONFIG, Dataset(prepared), trained, None)
    assert (trained / "metrics.jsonl").read_text() == before


def test_a_run_at_its_end_can_be_made_longer(tmp_path, prepared, trained):
    """What was trained stays; the learning rate goes up to where the longer cosine has it."""
    run, config = tmp_path / "run", changed(steps=20)
    shutil.copytree(trained, run)
    assert not train(config, Dataset(prepared), run, None, enough=lambda model, step: step == 16)
    assert not train(config, Dataset(prepared), run, None)  # stopped and gone on in what was added
    told = loss_texts(run)
    assert told[:12] == loss_texts(trained) and load_model(run)[2] == 20
    rates = [float(schedule(config.train)(step)) for step in range(12, 20)]
    np.testing.assert_allclose([line["lr"] for line in lines(run)[12:]], rates, rtol=1e-6)
    assert rates[0] > 4 * lines(trained)[-1]["lr"]


def test_a_training_in_windows_goes_on_as_if_never_stopped(tmp_path, prepared):
    config, seen = changed(model={"frames": 72}, windows=2, steps=8), set()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert not train(config, Dataset(prepared), whole, None)
    assert not train(config, Dataset(prepared), parts, None, enough=lambda *_: True)
    assert not train(config, Dataset(prepared), parts, None)
    assert [line["loss"] for line in lines(parts)] == [line["loss"] for line in lines(whole)]
    assert_same_model(whole, parts, 8)
    for step in range(8):
        (batch,) = batches(Dataset(prepared), config.model, 0, 4, range(step, step + 1), None, 2)
        seen.add(batch.ids.shape[1])
    assert seen == {64, 128}
    with pytest.raises(UserError, match="windows is 0; allowed: 1 and above"):
        changed(windows=0)


def test_a_training_ends_when_it_is_enough(tmp_path, prepared, trained):
    run, asked = tmp_path / "run", []

    def enough(model, step):
        asked.append(step)
        return step == 8

    assert not train(CONFIG, Dataset(prepared), run, None, enough=enough)
    assert asked == [4, 8] and [line["step"] for line in lines(run)] == list(range(8))
    assert not train(CONFIG, Dataset(prepared), run, None)  # and may go on
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(trained)]


def test_accumulation_gives_the_same_steps(tmp_path, prepared, trained):
    config = changed(accumulate=2)
    assert not train(config, Dataset(prepared), tmp_path / "run", None)
    ours, theirs = (np.array([[x["loss"], x["grad_norm"]] for x in lines(run)]) for run in (tmp_path / "run", trained))
    error = np.abs(ours / theirs - 1).max()
    print(f"loss and gradient norm over 12 steps: error {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


def test_one_batch_is_learnt_by_heart(tmp_path):
    dataset = Dataset(make_prepared(tmp_path / "songs", [make_record(i, frames=12) for i in range(4)]))
    config = changed(
        model={"frames": 16, "width": 32},
        steps=150,
        checkpoint_every=150,
        log_every=150,
        remat="none",
        dropout=(0.0, 0.0, 0.0),
    )
    assert not train(config, dataset, tmp_path / "run", None)
    told = lines(tmp_path / "run")
    print(f"loss {told[0]['loss']:.2f} -> {told[-1]['loss']:.4f} nats per code")
    assert told[0]["loss"] > 2.5 and told[-1]["loss"] < 0.1


@pytest.mark.parametrize("songs", [8, 7, 3])
def test_valid_loss_is_that_of_its_songs_and_of_nothing_that_fills(prepared, trained, songs):
    dataset, program = Dataset(prepared), make_program(CONFIG, make_mesh(MeshConfig()))
    model = load_model(trained)[0]
    total = jax.jit(lambda m, b, k: losses(m, b, k, LAYOUT, 64, "none"))(
        model, one_batch(dataset, songs), jnp.ones((songs, 2), bool)
    )
    found = make_evaluate(CONFIG, LAYOUT, dataset, program, songs)(model)
    np.testing.assert_allclose(found, float(total.nats.sum()) / int(total.codes.sum()), rtol=1e-6)


def test_valid_songs_are_told_of(tmp_path, prepared, trained):
    config, says = changed(valid_every=5), io.StringIO()
    assert not train(
        config, Dataset(prepared), tmp_path / "run", None, Dataset(prepared), Console(file=says, width=300)
    )
    told = lines(tmp_path / "run")
    assert [line["step"] for line in told if "valid_loss" in line] == [4, 9, 11]
    assert "valid_loss" in says.getvalue()
    other = make_prepared(tmp_path / "songs", [make_record(0)], MADE_WITH._replace(codec_fingerprint="other"))
    with pytest.raises(UserError, match="were prepared differently .*codec: other and c0dec"):
        train(config, Dataset(prepared), tmp_path / "run", None, Dataset(other))


def test_sample_songs_are_written(singer_run):
    assert sorted(os.listdir(singer_run / "samples")) == ["0000001.wav", "0000002.wav"]
    samples, rate = soundfile.read(singer_run / "samples" / "0000002.wav")
    assert rate == 24_000 and 0 < len(samples) <= 0.2 * rate


def test_what_the_window_cuts_is_said(tmp_path, prepared):
    says = io.StringIO()
    module.report_songs(Dataset(prepared), CONFIG, Console(file=says, width=300))
    assert "2 of 8 songs are longer than the window of 40 frames; 4.4 % of all frames" in says.getvalue()
    module.report_songs(Dataset(prepared), changed(model={"frames": 48}), Console(file=says, width=300))
    assert len(says.getvalue().splitlines()) == 1


def test_how_many_songs_can_guide_is_said(tmp_path, prepared):
    songs = [make_record(0), make_record(1)._replace(word_times=np.zeros((6, 3)))]
    for folder, note in ((prepared, "0 of 8"), (make_prepared(tmp_path / "songs", songs), "1 of 2")):
        says = io.StringIO()
        module.report_songs(Dataset(folder), changed(model={"frames": 48}, guide=1.0), Console(file=says, width=300))
        assert says.getvalue().startswith(f"note: {note} songs have word times (words.csv); train.guide does nothing")


def test_what_no_word_of_a_batch_says_is_not_told():
    told = {}

    class Kept(Silence):
        def metrics(self, step, values):
            told[step] = values

    for step, astray in enumerate((0.5, np.nan)):
        module._report(Kept(), step, dict(loss=1.0, grad_norm=1.0, codes=8, astray=astray), 1e-3, 0.0)
    assert told[0]["astray"] == 0.5 and "astray" not in told[1]


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_kept(tmp_path, prepared):
    config = changed(lr_max=1e30, warmup=0, checkpoint_every=1, keep=12, remat="none")
    with pytest.raises(UserError, match="of step [12] is (nan|inf); lower train.lr_max or lengthen train.warmup"):
        train(config, Dataset(prepared), tmp_path / "run", None)
    told = lines(tmp_path / "run")
    assert not np.isfinite([told[-1]["loss"], told[-1]["grad_norm"]]).all()
    assert load_model(tmp_path / "run")[2] == told[-1]["step"]  # steps before it


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path, prepared, monkeypatch):
    """A full disk shows when the checkpoint before has been saved in the background."""

    def full(checkpoints, step, *args):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand pages more")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", full)
        with pytest.raises(UserError) as caught:
            train(CONFIG, Dataset(prepared), tmp_path / "run", None)
    assert str(caught.value) == (
        f"{tmp_path}/run/checkpoints: cannot be written (RESOURCE_EXHAUSTED: No space left on device); "
        "the checkpoint before stands"
    )
    assert len(lines(tmp_path / "run")) == 4


def test_memory_does_not_grow_from_step_to_step(tmp_path, prepared, monkeypatch):
    held = {}

    def look(step):
        arrays = jax.live_arrays()
        held[step] = (len(arrays), sum(x.nbytes for x in arrays))

    spy(monkeypatch, look)
    train(changed(checkpoint_every=100), Dataset(prepared), tmp_path / "run", None)
    assert held[3] == held[10]


def test_a_folder_of_something_else_is_not_touched(tmp_path, prepared):
    (tmp_path / "thesis.txt").write_text("my thesis")
    with pytest.raises(UserError, match="is not empty and not a run folder"):
        train(CONFIG, Dataset(prepared), tmp_path, None)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_mesh_that_does_not_fit_leaves_no_run(tmp_path, prepared):
    config = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, data=3))
    with pytest.raises(UserError, match="product must be the number of devices"):
        train(config, Dataset(prepared), tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


def test_a_damaged_dataset_is_said_in_the_middle_of_training(tmp_path):
    folder = make_prepared(tmp_path / "songs", [make_record(i) for i in range(4)])
    (packed,) = folder.glob("dataset/*.array_record*")
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged"):
        train(CONFIG, Dataset(folder), tmp_path / "run", None)
