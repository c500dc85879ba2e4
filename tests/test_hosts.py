"""More than one process: over loopback, each with its own (fake) devices, against the run of one process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import CONFIG
from jax.sharding import NamedSharding, PartitionSpec

from l2m_jax.checkpoint import load_model
from l2m_jax.config import MeshConfig, UserError
from l2m_jax.data import Dataset
from l2m_jax.hosts import Agreement, decide, join, lead, meet, place, rows_here, together
from l2m_jax.sharding import SONGS, make_mesh
from l2m_jax.train import train


class Ended(NamedTuple):
    status: int
    out: str
    err: str
    after: float  # s, since the first process ended


def launch(
    count: int, prepared: Path, run: Path, *arguments, devices: int = 1, hook: str = "", own=None, watch: str = ""
) -> list[Ended]:
    """`l2m train` of CONFIG in `count` processes; `hook` is called as `hook(process, step)`, `own[i]` are arguments of
    process i, and `watch` sets when one is missed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    preset = run.with_suffix(".py")
    preset.write_text(
        "import os, signal, time, jax\n"
        "from pathlib import Path\n"
        "from l2m_jax import hosts, train\n"
        f"{watch}\n"
        "from l2m_jax.config import *\n"
        f"config, run = {CONFIG!r}, Path({str(run)!r})\n"
        f"def hook(process, step):\n    {hook or 'pass'}\n"
        "batches = train.batches\n"
        "def hooked(dataset, model, seed, batch, steps, *rest):\n"
        "    for step, example in zip(steps, batches(dataset, model, seed, batch, steps, *rest)):\n"
        "        hook(jax.process_index(), step)\n"
        "        yield example\n"
        "train.batches = hooked\n"
    )
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    common = ["--config", preset, "--data", prepared, "--run", run, "--coordinator", f"127.0.0.1:{port}"]
    started = []
    for i in range(count):
        command = [sys.executable, "-m", "l2m_jax.cli", "train", *common, "--processes", count, "--process", i]
        command += [*arguments, *(own or {}).get(i, ())]
        streams = [(run.parent / f"{run.name}.{i}.{name}").open("w+") for name in ("out", "err")]
        process = subprocess.Popen([*map(str, command)], env=environment, stdout=streams[0], stderr=streams[1])
        started.append((process, streams))
    ends: dict[int, float] = {}
    deadline = time.monotonic() + 500
    while len(ends) < count and time.monotonic() < deadline:
        for i, (process, _) in enumerate(started):
            if i not in ends and process.poll() is not None:
                ends[i] = time.monotonic()
        time.sleep(0.05)
    found = []
    for i, (process, streams) in enumerate(started):
        process.kill()
        process.wait()
        said = []
        for stream in streams:
            stream.seek(0)
            said.append("".join(line for line in stream if not line.startswith("[Gloo]")))
            stream.close()
        found.append(Ended(process.returncode, *said, ends.get(i, np.inf) - min(ends.values())))
    return found


def assert_same_curve(run: Path, other: Path):
    """Loss, gradient norm and held-out loss of every step; each step told once."""
    ours, theirs = ([json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key in ("loss", "loss_0", "loss_1", "grad_norm", "lr"):
        error = np.max([abs(a[key] / b[key] - 1) for a, b in zip(ours, theirs)])  # max() would pass over a NaN
        print(f"{key}: relative error {error:.1e}, tolerance 1e-05")
        assert error <= 1e-5


def test_two_processes_stop_together_and_four_go_on(tmp_path, prepared, trained):
    """SIGTERM to one of two, `fsdp`; the rest of the run in four, `fsdp` and `tensor`: the curve of one process."""
    run = tmp_path / "run"
    hook = "process == 1 and step == 5 and os.kill(os.getpid(), signal.SIGTERM)"
    two = launch(2, prepared, run, "--mesh.data", 1, "--mesh.fsdp", 2, hook=hook)
    assert [end.status for end in two] == [143, 143], two
    assert "2 device(s) of 2 processes" in two[0].out and not two[1].out
    assert "stopped by SIGTERM after step 7; the same command goes on from there" in two[0].out
    assert load_model(run)[2] == 7
    four = launch(4, prepared, run, "--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2, "--valid", prepared)
    assert [end.status for end in four] == [0, 0, 0, 0], four
    assert "going on from step 7 of 12" in four[0].out and not "".join(end.out for end in four[1:])
    assert_same_curve(run, trained)
    assert not (run / ".seen").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_noticed_and_the_run_goes_on_alone(tmp_path, prepared, trained, victim):
    """SIGKILL after the checkpoint of step 4: the other says so within 40 s; one process goes on, on another mesh."""
    run = tmp_path / "run"
    hook = f"""if process == {victim} and step == 7:
        while not (run / 'checkpoints' / '4').exists(): time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)"""
    watch = "hosts.BEAT, hosts.SILENCE, hosts.JAX_SILENCE = 1.0, 12.0, 32"
    ended = launch(2, prepared, run, devices=2, hook=hook, watch=watch)
    other = ended[1 - victim]
    print(f"noticed after {other.after:.0f} s, allowed: 40 s")
    assert ended[victim].status == -signal.SIGKILL
    assert other.status == 2 and other.after < 40
    last = other.err.splitlines()[-1]
    assert last.startswith("l2m: process") and last.endswith("it goes on from the last checkpoint"), other.err
    # Where 1 is gone, the watch says so first; a broken exchange may have its say after it.
    assert "process 0" in last if victim == 0 else "process 1 has not been heard of for 12 s" in other.err, other.err
    assert not train(CONFIG, Dataset(prepared), run, None)
    assert_same_curve(run, trained)


@pytest.mark.parametrize(
    "mistake, says",
    [
        (["--data", "nowhere"], "process 1: nowhere is not a prepared dataset"),
        (["--train.lr-max", 0.5], "process 1: this process was asked for another training .*train.lr_max 0.01 -> 0.5"),
        (
            ["--run", "elsewhere"],
            "process 1: elsewhere is not the folder that process 0 writes: --run must lie on stor",
        ),
    ],
)
def test_a_mistake_in_one_process_ends_both(tmp_path, prepared, mistake, says):
    ended = launch(2, prepared, tmp_path / "run", own={1: mistake})
    for end in ended:
        assert end.status == 2
        (line,) = (line for line in end.err.splitlines() if line.startswith("l2m: "))
        assert re.match(f"l2m: {says}", line), end.err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("here", 2, 0), "--coordinator here: needed: HOST:PORT"),
        (("here:1", 0, 0), "go together: give all three, or none"),
        (("", 2, 0), "go together: give all three, or none"),
        (("here:1", 2, 2), "--process is 2; allowed: 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(arguments, says):
    with pytest.raises(UserError, match=says):
        join(*arguments)


@pytest.mark.parametrize(
    "tasks, error, says",
    [
        ("1", None, ""),
        ("4", ValueError("coordinator_address"), ""),
        ("4", RuntimeError("DEADLINE"), "did not meet within 300 s.*DEADLINE"),
    ],
)
def test_the_environment_is_asked_where_it_speaks_of_others(monkeypatch, tasks, error, says):
    """One task asks nobody; a Slurm allocation outside of srun is found to be none; those that do not meet say so."""
    asked = []

    def initialize(**given):
        asked.append(given)
        raise error

    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        join("", 0, -1)
    assert len(asked) == (tasks == "4")
    assert not any("coordinator_address" in given for given in asked)


def test_alone_nothing_is_exchanged():
    assert lead() and decide("a", lambda: "b") == "b"
    meet("nobody")
    agreement = Agreement(make_mesh(MeshConfig()))
    assert [agreement.say(n) for n in (0, 15, 0)] == [0, 15, 0]
    with pytest.raises(ZeroDivisionError), together():
        raise ZeroDivisionError


def test_rows_and_places():
    sharding = NamedSharding(make_mesh(MeshConfig()), PartitionSpec(SONGS))
    rows = rows_here(sharding, 3)
    assert rows == [0, 1, 2]
    tree = {"a": np.arange(6).reshape(3, 2), "b": np.arange(3)}
    placed = place(sharding, 3, rows, tree)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert placed["a"].sharding == sharding
