"""Real signals to real processes: what was done by then is kept, and the same command goes on."""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
from flax import nnx
from test_cli import L2M, preset

from l2m_jax.audio import read_audio
from l2m_jax.checkpoint import load_model, open_checkpoints, read_run, write_run
from l2m_jax.model import SoundTransformer


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, prepared):
    """A real signal to a real process: exit status 143, not a step is lost, no traceback."""
    run, step = tmp_path / "run", 0
    command = [*L2M, "train", "--config", preset(tmp_path), "--data", prepared, "--run", run]
    for _ in range(2):
        with subprocess.Popen(
            [*command, "--train.steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            before = []
            for line in process.stdout:
                before.append(line)
                if f": {step + 4} of 100000 steps" in line:
                    break
            process.send_signal(signal.SIGTERM)
            after, complained = process.communicate(timeout=60)
        assert process.returncode == 143 and "Traceback" not in complained
        assert (f"{run}: going on from step {step} of 100000\n" in before) == (step > 0)
        step = load_model(run)[2]
        assert f"{run}: stopped by SIGTERM after step {step}; the same command goes on from there\n" in after
        told = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert told == list(range(step)) and 4 <= step < 100_000


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, singer_run):
    """A run that can sing for two minutes; it has learnt nothing."""
    info, run = read_run(singer_run), tmp_path_factory.mktemp("long") / "run"
    model = dataclasses.replace(info.config.model, frames=9000)
    write_run(run, info._replace(config=dataclasses.replace(info.config, model=model)))
    with contextlib.closing(open_checkpoints(run, 1)) as checkpoints:
        checkpoints.save_checkpointables(1, {"model": SoundTransformer(model, rngs=nnx.Rngs(0))})
    return run


@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_song_that_is_stopped_is_a_whole_file_of_what_was_sung(long_run, tmp_path, stop, status):
    command = [*L2M, "generate", long_run, "--lyrics", "la", "--min-seconds", "120", "-o", tmp_path / "a.wav"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and "singing: 1" in process.stdout.readline()
        process.send_signal(stop)
        said, complained = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in complained
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["cut"].startswith(f"stopped by {stop.name} after ") and about["cut"] in said
    seconds = len(read_audio(tmp_path / "a.wav", 24_000)) / 24_000
    assert 12 <= seconds < 120 and about["seconds"] == round(seconds, 3)
    assert sorted(os.listdir(tmp_path)) == ["a.ecdc", "a.json", "a.npz", "a.wav"]


def test_a_pipe_that_is_stopped_or_closed_holds_a_whole_wav(long_run, tmp_path):
    command = [*L2M, "generate", long_run, "--lyrics", "la", "--min-seconds", "120", "-o", "-"]
    for stop, status in ((signal.SIGTERM, 143), (None, 1)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            sent = process.stdout.read(48_000)
            if stop is None:
                process.stdout.close()
            else:
                process.send_signal(stop)
                sent += process.stdout.read()
            complained = process.stderr.read()
        assert process.returncode == status and b"Traceback" not in complained and b"Exception" not in complained
        (tmp_path / "a.wav").write_bytes(sent)
        assert len(sent) % 2 == 0 and len(read_audio(tmp_path / "a.wav", 24_000)) == (len(sent) - 44) // 2
        assert (len(sent) > 48_000) == (stop is not None)


def test_requests_killed_leave_no_half_song(long_run, tmp_path):
    lines = [{"id": f"{i}", "lyrics": "la", "seconds": 3, "min_seconds": 3, "seed": i} for i in range(40)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    command = [*L2M, "generate", long_run, "--requests", tmp_path / "r.jsonl", "-o", out, "--batch", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (out / "2.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    there = [path.stem for path in out.glob("*.json")]
    assert 3 <= len(there) < 40
    for name in there:
        about = json.loads((out / f"{name}.json").read_text())
        assert len(read_audio(out / f"{name}.wav", 24_000)) == 72_000 and about["seconds"] == 3
        with np.load(out / f"{name}.npz") as arrays:
            assert hashlib.sha256(arrays["codes"].astype("<i4").tobytes()).hexdigest() == about["codes_sha256"]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines[: len(there) + 1])))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(there) + 1} songs of {len(there) + 1}" in done.stdout
    assert "(1 new, 0 failed)" in done.stdout


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*L2M, "solfege", tmp_path / "songs", "--songs", "1"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr
