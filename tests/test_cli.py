"""The command line: exit statuses, one line for a mistake, and the whole way from songs to a song."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import CONFIG, SUNG

from l2m_jax import cli
from l2m_jax.checkpoint import load_model, read_run
from l2m_jax.cli import PRESETS, load_preset, main, parse
from l2m_jax.commands.arguments import read_text
from l2m_jax.config import Config, UserError

L2M = [sys.executable, "-m", "l2m_jax.cli"]


def preset(folder: Path, config: Config = CONFIG) -> str:
    path = folder / "preset.py"
    path.write_text(f"from l2m_jax.config import *\nconfig = {config!r}\n")
    return str(path)


@pytest.fixture
def l2m(capsys):
    """Runs a command in this process: (exit status, what it said, what it complained)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        return caught.value.code, *capsys.readouterr()

    return run


def test_help_is_quick_because_it_imports_no_jax():
    code = (
        "import sys\nfrom l2m_jax.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "slow = {'jax', 'flax', 'torch', 'tensorflow_datasets', 'transformers', 'soundfile'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)"
    )
    for arguments in (["--help"], ["prepare", "--help"], ["train", "--help"], ["inspect", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage: l2m" in done.stdout and not done.stderr
    assert "--model.width" in subprocess.run([*L2M, "train", "--help"], capture_output=True, text=True).stdout


def test_presets_are_installed_and_fields_override_them(tmp_path):
    assert {path.stem for path in (Path(cli.__file__).parents[1] / "configs").glob("[a-z]*.py")} == set(PRESETS)
    for name in PRESETS:
        parsed = parse(["train", "--config", name, "--data", "d", "--run", "r"])
        assert Config(parsed.model, parsed.train, parsed.mesh) == load_preset(name)
        assert parsed.config == name
    for config in (["--config", "tiny"], ["--config=tiny"]):
        flags = "--model.width 128 --train.lr-max 0.5 --mesh.fsdp 2 --train.dropout 0.1 0.2 0.3 --train.no-remat"
        parsed = parse(["train", *config, "--data", "d", "--run", "r", *flags.split()])
        assert (parsed.model.width, parsed.train.lr_max, parsed.mesh.fsdp) == (128, 0.5, 2)
        assert parsed.train.dropout == (0.1, 0.2, 0.3) and not parsed.train.remat
        assert parsed.model.frames == load_preset("tiny").model.frames
    assert parse(["train", "--data", "d", "--run", "r"]).model == load_preset("small").model
    parsed = parse(["train", "--config", preset(tmp_path), "--data", "d", "--run", "r", "--train.steps", "3"])
    assert parsed.model == CONFIG.model and parsed.train.steps == 3 and parsed.train.batch == CONFIG.train.batch


def test_presets_travel_with_the_package():
    project = tomllib.loads((Path(cli.__file__).parents[1] / "pyproject.toml").read_text())
    assert "l2m_jax.configs" in project["tool"]["setuptools"]["packages"]
    assert project["project"]["scripts"]["l2m"] == "l2m_jax.cli:main"


@pytest.mark.parametrize(
    "content, says",
    [
        ("config = Config(model=ModelConfig(widht=3))", "TypeError.*widht"),
        ("config = Config(model=ModelConfig(width=100, heads=3))", "model.width 100 must be a multiple of"),
        ("config = {'width': 3}", "the file must define `config`, a l2m_jax.config.Config"),
        ("config = ", "SyntaxError: invalid syntax"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_preset_file_with_a_mistake(tmp_path, content, says):
    (tmp_path / "mine.py").write_text("from l2m_jax.config import *\n" + content)
    with pytest.raises(UserError, match=says):
        load_preset(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    "command, says",
    [
        ("train --data DATA --run RUN --config nope", "--config nope: no such preset (tiny, small, base, large, demo)"),
        ("train --data DATA --run RUN --model.heads 7", "model.width 512 must be a multiple of model.heads 7"),
        ("train --data DATA --run RUN --train.seed -1", "train.seed is -1; allowed: 0 to 4294967295"),
        ("train --data DATA --run RUN", "DATA has entries 16, model.entries is 1024: set --model.entries 16"),
        ("train --data /nowhere --run RUN", "/nowhere is not a prepared dataset; make one with: l2m prepare"),
        ("generate RUN --lyrics la", "RUN is not a run folder (it has no config.json)"),
        ("generate RUN --lyrics la -o a.mp3", "a.mp3: the output must end in .wav"),
        ("generate RUN --lyrics lost.txt", "lost.txt: no such file"),
        ("generate RUN --lyrics la --top-p 2", "top-p is 2.0; allowed: above 0, up to 1"),
        ("decode song.npz", "song.npz: no such file"),
        ("prepare /nowhere OUT", "/nowhere: no such folder"),
        ("prepare DATA OUT --codec nowhere", "nowhere: no such folder"),
        ("prepare DATA OUT --shard 3", "--shard is '3'; needed: i/N, such as 1/4"),
        ("prepare DATA OUT --shard 3/2", "--shard is 3/2; allowed: 1/N to N/N"),
        (
            "prepare DATA OUT --workers 2 --beam DirectRunner",
            "--beam does the work itself: leave --shard and --workers",
        ),
        ("inspect /nowhere", "/nowhere is not a prepared dataset; make one with: l2m prepare"),
        ("inspect DATA song_0", "DATA has no song 'song_0'; nearest: song_00"),
        ("inspect DATA --out OUT", "--out is for the sound and picture of one song: name the song"),
    ],
)
def test_a_mistake_is_one_line(l2m, prepared, tmp_path, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    names = {"DATA": prepared, "RUN": tmp_path / "run", "OUT": tmp_path / "out"}
    for name, path in names.items():
        command, says = command.replace(name, str(path)), says.replace(name, str(path))
    status, _, complained = l2m(*command.split())
    assert status == 2 and complained.startswith("l2m: ") and says in complained
    assert complained.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command, says",
    [
        ("train --data a --run b --model.widht 3", "--model.widht"),
        ("train --data a --run b --model.width wide", "--model.width"),
        ("train --data a --run b --model.layout spiral", "--model.layout"),
        ("train --data a", "--run"),
        ("sing", "sing"),
        ("", "prepare"),
    ],
)
def test_a_flag_that_does_not_exist_or_fit_is_named(l2m, command, says):
    status, said, complained = l2m(*command.split())
    assert status == 2 and says in said + complained and "Traceback" not in complained


def test_lyrics_are_a_file_or_the_text_itself(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffla luna 🌙\r\n".encode())
    assert read_text(str(tmp_path / "a.txt")) == "la luna 🌙\r\n"
    for text in ("la luna", "la\nluna.txt", "", "x" * 5000, "a\0b", "/"):
        assert read_text(text) == text
    (tmp_path / "b.txt").write_bytes("corazón".encode("latin-1"))
    with pytest.raises(UserError, match="b.txt: byte 5 is not UTF-8; save the file as UTF-8"):
        read_text(str(tmp_path / "b.txt"))


def test_interrupt_is_130(l2m, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Solfege, "run", interrupted)
    assert l2m("solfege", "out")[0] == 130


def test_the_whole_way(l2m, tmp_path, encoders, monkeypatch):
    """solfege, prepare, train, generate, decode, as a user types them."""
    monkeypatch.chdir(tmp_path)
    assert l2m("solfege", "songs", "--songs", 3, "--notes", 2, 3)[:2] == (0, "3 songs in songs\n")
    (tmp_path / "songs" / "song_0002" / "lyrics.txt").unlink()
    status, said, _ = l2m("prepare", "songs", "data", "--text-encoder", encoders.text_encoder)
    assert status == 1  # done, but something was left out
    assert "left out: song_0002: lyrics.txt is missing" in said
    assert "2 songs in data (2 new or changed, 1 left out)" in said
    status, said, _ = l2m(
        "train", "--config", preset(tmp_path, SUNG), "--data", "data", "--run", "run", "--valid", "data"
    )
    assert status == 0 and "trained: run; sing with: l2m generate run" in said
    assert (tmp_path / "run" / "samples" / "0000002.wav").exists() and read_run(tmp_path / "run").config == SUNG
    (tmp_path / "words.txt").write_text("la sol\n")
    status, said, _ = l2m(
        "generate", "run", "--lyrics", "words.txt", "--seconds", 0.4, "--top-k", 50, "-o", "new/a.wav"
    )
    assert status == 0 and "new/a.wav: 0." in said
    about = json.loads((tmp_path / "new" / "a.json").read_text())
    assert about["lyrics"] == "la sol\n" and about["sampling"]["top_k"] == 50
    for suffix in ("npz", "ecdc"):
        assert l2m("decode", f"new/a.{suffix}", "-o", f"{suffix}.wav")[0] == 0
        assert (tmp_path / f"{suffix}.wav").read_bytes() == (tmp_path / "new" / "a.wav").read_bytes()


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


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*L2M, "solfege", tmp_path / "songs", "--songs", "1"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr
