"""The command line: exit statuses, one line for a mistake, and the whole way from songs to a song."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import CONFIG, SUNG

from l2m_jax import cli
from l2m_jax.checkpoint import read_run
from l2m_jax.cli import PRESETS, load_preset, main, parse
from l2m_jax.commands.decode import Decode
from l2m_jax.config import Config, UserError
from l2m_jax.encoders import Encoders, signature
from l2m_jax.weights import load_codec

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
    for arguments in (
        ["--help"],
        *([command, "--help"] for command in ("prepare", "train", "generate", "evaluate", "inspect")),
    ):
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
        flags = "--model.width 128 --train.lr-max 0.5 --mesh.fsdp 2 --train.dropout 0.1 0.2 0.3 --train.remat layer"
        parsed = parse(["train", *config, "--data", "d", "--run", "r", *flags.split()])
        assert (parsed.model.width, parsed.train.lr_max, parsed.mesh.fsdp) == (128, 0.5, 2)
        assert parsed.train.dropout == (0.1, 0.2, 0.3) and parsed.train.remat == "layer"
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
        (
            "train --data DATA --run RUN --config nope",
            f"--config nope: no such preset ({', '.join(PRESETS)})",
        ),
        (
            "train --data DATA --run RUN --model.heads 7",
            "model.attention_width 256 must be a multiple of model.heads 7",
        ),
        ("train --data DATA --run RUN --train.seed -1", "train.seed is -1; allowed: 0 to 4294967295"),
        ("train --data DATA --run RUN", "DATA has entries 16, model.entries is 1024: set --model.entries 16"),
        ("train --data /nowhere --run RUN", "/nowhere is not a prepared dataset; make one with: l2m prepare"),
        ("generate RUN --lyrics la", "RUN is not a run folder (it has no config.json)"),
        ("generate RUN --lyrics la -o a.mp3", "a.mp3: the output must end in .wav"),
        ("generate RUN --lyrics la --prompt song.ecdc", "song.ecdc is the prompt, and would be overwritten"),
        (
            "generate RUN --lyrics la --prompt song_2.wav --count 2",
            "song_2.wav is the prompt, and would be overwritten",
        ),
        ("evaluate RUN --data DATA --seed -1", "seed is -1; allowed: 0 to 4294967295"),
        ("train --data DATA --run RUN --train.sample-seconds nan", "train.sample_seconds is nan; allowed: above 0"),
        ("codec a/song.wav --out a", "a/song.wav is a given file, and would be overwritten: name another --out"),
        ("codec a/x.wav b/a/x.wav --out c", "b/a/x.wav and a/x.wav would both become c/a_x.wav"),
        ("codec song.wav --out DATA/songs.jsonl", "--out DATA/songs.jsonl is a file: name a folder"),
        ("solfege DATA/songs.jsonl/new", "DATA/songs.jsonl/new/solfege.json: cannot be written (Not a directory)"),
        ("generate RUN --lyrics la -o - --count 2", "-o - sends one song to a pipe: not with --count"),
        ("generate RUN --lyrics la --count 0", "--count is 0; allowed: 1 and above"),
        ("generate RUN --lyrics la --count 2 --batch 0", "--batch is 0; allowed: 1 and above"),
        ("generate RUN --requests a.jsonl", "--requests puts its songs into a folder: --out FOLDER, not song.wav"),
        ("generate RUN --requests a.jsonl -o OUT --count 2", "--requests goes with neither --count nor --picture"),
        ("generate RUN", "--lyrics is needed: a text file, or the lyrics themselves; or --requests FILE"),
        ("generate RUN --lyrics la --from 3", "from 3 needs a prompt: the song whose first seconds are kept"),
        ("generate RUN --lyrics la --seconds nan", "seconds is nan; allowed: above 0"),
        ("generate RUN --lyrics la --lrc --count 2", "--lrc is for one song: not with --count or --requests"),
        ("generate RUN --lyrics la --lrc -o -", "not with --count, --requests, --picture or --lrc"),
        ("align RUN", "name a song to align, or choose heads with --choose"),
        ("align RUN song.wav --songs 0", "--songs is 0; allowed: 1 and above"),
        ("align RUN song.wav -o song.txt", "song.txt: the output must end in .lrc"),
        ("align RUN song.wav", "RUN is not a run folder (it has no config.json)"),
        ("export RUN OUT", "RUN is not a run folder (it has no config.json)"),
        ("generate RUN --lyrics lost.txt", "lost.txt: no such file"),
        ("generate RUN --lyrics la --top-p 2", "top-p is 2.0; allowed: above 0, up to 1"),
        ("decode song.npz", "song.npz: no such file"),
        ("prepare /nowhere OUT", "/nowhere: no such folder"),
        ("prepare DATA OUT --codec nowhere", "nowhere: no such model; possible are solfege"),
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


def test_the_names_of_what_ships_stand_for_it(tmp_path, monkeypatch):
    """Whatever folders there are: `l2m solfege solfege` makes one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "solfege").mkdir()
    (tmp_path / "minilm").mkdir()
    encoders = Encoders()
    made = signature(encoders, *encoders.load())
    assert (made.codec, made.text_encoder) == ("solfege", "minilm")
    with pytest.raises(UserError, match="solfege/config.json: cannot be read"):
        load_codec("./solfege")


def test_what_may_not_be_written_is_one_line(l2m, monkeypatch):
    """A folder of somebody else, a quota that is used up; what nobody can mend is a traceback."""

    def refused(self):
        raise error

    monkeypatch.setattr(Decode, "run", refused)
    for number in (errno.EACCES, errno.EDQUOT, errno.EROFS):
        error = OSError(number, os.strerror(number), "x")
        status, _, complained = l2m("decode", "x.npz")
        assert status == 2 and complained.startswith("l2m: ") and complained.count("\n") == 1
    error = OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        l2m("decode", "x.npz")


def test_samples_through_another_codec_are_refused(l2m, sung, tmp_path, monkeypatch):
    codec = dataclasses.replace(load_codec(), fingerprint="0123")
    monkeypatch.setattr("l2m_jax.weights.load_codec", lambda *names: codec)
    command = ("train", "--config", preset(tmp_path, SUNG), "--data", sung, "--run", tmp_path / "run")
    status, _, complained = l2m(*command, "--train.sample-every", 1)
    assert status == 2 and f"{sung} was prepared with solfege [" in complained and "[0123] is now" in complained
    assert not (tmp_path / "run").exists()


def test_interrupt_is_130(l2m, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Solfege, "run", interrupted)
    assert l2m("solfege", "out")[0] == 130


def test_the_whole_way(l2m, tmp_path, encoders, monkeypatch):
    """solfege, prepare, train, generate, decode, as a user types them."""
    monkeypatch.chdir(tmp_path)
    assert l2m("solfege", "songs", "--songs", 3, "--notes", 2, 3)[:2] == (0, "3 songs in songs\n")
    flags = "--songs 1 --notes 4 4 --sections 1 --exclude songs songs"
    assert l2m("solfege", "more", *flags.split())[:2] == (0, "1 songs in more\n")
    assert (tmp_path / "more" / "song_0001" / "lyrics.txt").read_text().count("[chorus]") == 2
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
        "generate", "run", "--lyrics", "words.txt", "--seconds", 0.4, "--top-k", 50, "-o", "new/a.wav", "--lrc"
    )
    assert "warning: no heads were chosen for run" in said and (tmp_path / "new" / "a.lrc").exists()
    assert status == 0 and "new/a.wav: 0." in said
    about = json.loads((tmp_path / "new" / "a.json").read_text())
    assert about["request"]["lyrics"] == "la sol\n" and about["request"]["top_k"] == 50
    status, said, _ = l2m("align", "run", "new/a.npz", "-o", "b.lrc", "--picture")
    assert status == 0 and "b.lrc: 2 words" in said and (tmp_path / "b.png").exists()
    assert (tmp_path / "b.lrc").read_text() == (tmp_path / "new" / "a.lrc").read_text()
    status, said, _ = l2m("export", "run", "small")
    assert status == 0 and "sing with: l2m generate small --lyrics TEXT" in said
    for suffix in ("npz", "ecdc"):
        assert l2m("decode", f"new/a.{suffix}", "-o", f"{suffix}.wav")[0] == 0
        assert (tmp_path / f"{suffix}.wav").read_bytes() == (tmp_path / "new" / "a.wav").read_bytes()


def test_codec_measures_files_and_names_the_bad_one(l2m, songs, tmp_path):
    audio = next(songs.glob("*/audio.flac"))
    status, out, _ = l2m("codec", audio, tmp_path / "none.wav", "--out", tmp_path / "heard")
    assert status == 1 and "audio.flac" in out and f"left out: {tmp_path / 'none.wav'}: no such audio file" in out
    assert sorted(path.name for path in (tmp_path / "heard").iterdir()) == ["audio.png", "audio.wav"]
    both = sorted(songs.glob("*/audio.flac"))[:2]
    status, out, _ = l2m("codec", *both, "--out", tmp_path / "both")
    names = {f"{path.parent.name}_audio{suffix}" for path in both for suffix in (".wav", ".png")}
    assert status == 0 and {path.name for path in (tmp_path / "both").iterdir()} == names
    assert all(path.parent.name in out for path in both)
    status, out, _ = l2m("codec", "--json", audio)
    (row,) = map(json.loads, out.splitlines())
    assert status == 0 and row["file"] == str(audio) and 0.5 < row["pitch_within_50_cents"] <= 1
    names = {"si_sdr_db", "mel_distance", "pitch_cents_median", "entries_used", "entropy_bits", "level_db", "rtf"}
    assert names < row.keys() and row["bits_per_s"] == 1500
    assert l2m("codec")[0] == 2
