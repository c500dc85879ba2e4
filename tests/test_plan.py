"""Programs compiled for eight devices in the place of one CPU, and for TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import CONFIG
from test_cli import l2m, preset  # noqa: F401 - a fixture

from l2m_jax import plan as module
from l2m_jax import suggest as suggest_module
from l2m_jax.chips import CHIPS, Topology, open_topology
from l2m_jax.commands.plan import parse_mesh
from l2m_jax.config import Config, MeshConfig, SampleConfig, UserError
from l2m_jax.plan import decode_plan, describe, schedule, train_plan
from l2m_jax.roofline import Roofline
from l2m_jax.sample import cache_size
from l2m_jax.suggest import candidates, suggest
from l2m_jax.tokens import make_layout


def plan_apart(folder: Path, *arguments: str, config: Config = CONFIG) -> dict:
    """`l2m plan --json` in a process of its own: JAX counts its devices once."""
    command = [sys.executable, "-m", "l2m_jax.cli", "plan", "--config", preset(folder, config), "--json", *arguments]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_eight_devices(tmp_path):
    told = plan_apart(tmp_path, "--topology", "cpu:8", "--mesh", "data=2,fsdp=4", "--batch", "8")
    assert (told["chips"], told["mesh"]) == (8, {"data": 2, "fsdp": 4, "tensor": 1, "context": 1})
    whole = 4 * told["parameters"]
    assert whole / 4 < told["memory"]["parameters"] < whole / 3  # norms and small tables are on every device
    assert 2 * told["memory"]["parameters"] <= told["memory"]["optimizer"] < 2.01 * told["memory"]["parameters"] + 99
    assert told["memory"]["peak"] >= sum(told["memory"][name] for name in ("parameters", "optimizer", "temporaries"))
    assert ["fsdp"] in [t["axes"] for t in told["traffic"] if t["kind"] == "all-gather"]
    assert all(t["sent"] > 0 for t in told["traffic"])
    assert told["roofline"] is told["schedule"] is told["share_of_peak"] is told["limit"] is None


def test_one_device_sends_nothing_and_keeps_its_state_once():
    """The state is donated: what comes out takes no room of its own."""
    one = train_plan(CONFIG, open_topology("cpu:1"))
    assert one.memory is not None and not one.traffic and one.problem == ""
    state = one.memory.parameters + one.memory.optimizer
    assert one.memory.peak - one.memory.temporaries - one.memory.inputs - one.memory.program == state
    assert one.memory.parameters == 4 * one.parameters and (one.songs, one.remat) == (4, "attention")
    assert "4 songs of 64 positions" in "\n".join(describe(one))


def test_the_decode_loop_has_its_cache():
    songs, layout = 2, make_layout(CONFIG.model)
    one = decode_plan(CONFIG, open_topology("cpu:1"), songs, SampleConfig())
    assert one.memory is not None and one.program == "generate"
    rows = songs * 2  # guidance computes two variants
    numbers = rows * cache_size(layout.positions, layout) * CONFIG.model.key_width * 2 * CONFIG.model.layers
    assert one.memory.optimizer == 4 * numbers and one.memory.parameters == 4 * one.parameters
    assert one.memory.inputs > 0  # what the step does not use is counted too
    assert "cache" in describe(one)[2] and "remat" not in describe(one)[0]


def test_a_program_that_does_not_fit_says_what_the_compiler_says():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 21G of\n 15.75G hbm.\n\nLargest ...")

    assert module._compile(Lowered()) == (None, "Used 21G of 15.75G hbm.")


def test_hours_and_share_of_peak():
    one = train_plan(CONFIG, open_topology("cpu:1"))
    slow = one._replace(chips=8, roofline=Roofline(2.0, 1.0, 4.0), work=one.work._replace(model=8.0, executed=2.0))
    assert slow.share_of_peak == 1 / 4  # a FLOP of the mathematics a chip, in four seconds at one a second
    job = schedule(slow, songs=10, epochs=3)
    assert job is not None and (job.steps, job.hours, job.chip_hours) == (8, 8 * 4 / 3600, 64 * 4 / 3600)
    assert "8 steps" in describe(slow, job)[-1] and "bound by interconnect, 25.0 % of peak" in describe(slow, job)[-2]


def test_candidates_divide_and_are_ranked():
    topology = Topology("v5e:1x1", CHIPS["v5e"], (1, 1), jax.devices()[:1])
    found = candidates(CONFIG, topology, batch=None)
    assert {(c.config.train.batch, c.config.train.remat) for c in found} == {
        (batch, remat) for batch in (1, 2, 4, 8) for remat in ("none", "attention", "layer")
    }
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    assert {c.config.model.dtype for c in found} == {"bfloat16"}
    assert {c.config.train.batch for c in candidates(CONFIG, topology, batch=3)} == {3}


def test_suggestions_are_the_quickest_that_fit(monkeypatch):
    topology, tried = Topology("v5e:1x1", CHIPS["v5e"], (1, 1), jax.devices()[:1]), []
    some = train_plan(CONFIG, open_topology("cpu:1"))

    def planned(config, _):
        tried.append(config)
        return some._replace(songs=config.train.batch, roofline=None if len(tried) == 2 else Roofline(1.0, 1.0, 1.0))

    monkeypatch.setattr(suggest_module, "train_plan", planned)
    found = suggest(CONFIG, topology, None)
    assert len(found) == 3 and len(tried) == 4  # the second did not fit
    assert [plan.songs for plan in found] == sorted((plan.songs for plan in found), reverse=True)
    small = Topology("v5e:1x1", CHIPS["v5e"]._replace(memory=1.0), (1, 1), jax.devices()[:1])
    with pytest.raises(UserError, match="nothing that was tried fits the chips of v5e:1x1"):
        suggest(CONFIG, small, None)


@pytest.mark.parametrize("text, names", [("fsdp", "'fsdp' is not"), ("a=1", "'a=1'"), ("data=x", "data=x"), ("", "''")])
def test_a_mesh_that_is_none(text: str, names: str):
    with pytest.raises(UserError, match=f"{names}.*axes: data, fsdp, tensor, context"):
        parse_mesh(text)


def test_meshes():
    assert parse_mesh("data=4, fsdp=16") == MeshConfig(data=4, fsdp=16)
    assert parse_mesh("fsdp=-1,data=1") == MeshConfig(data=1, fsdp=-1)
    with pytest.raises(UserError, match="each axis once"):
        parse_mesh("data=4,data=4")


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--topology", "v9:8"], "kinds: v5e, v5p, v6e, cpu"),
        (["--topology", "cpu:1", "--mesh", "data=2"], "product must be the number of devices, 1"),
        (["--topology", "cpu:1", "--config", "huge"], "no such preset"),
        (["--topology", "cpu:1", "--suggest"], "none are known of cpu:1"),
        (["--topology", "cpu:1", "--suggest", "--mesh", "data=1"], "leave --mesh out"),
        (["--topology", "cpu:1", "--generate", "--mesh", "data=1"], "takes neither --mesh nor --suggest"),
        (["--topology", "cpu:1", "--batch", "0"], "--batch is 0; allowed: above 0"),
        (["--topology", "cpu:1", "--epochs", "nan"], "--epochs is nan; allowed: above 0"),
    ],
)
def test_mistakes_are_one_line(l2m, arguments, names):  # noqa: F811
    status, _, said = l2m("plan", *(["--config", "tiny"] if "--config" not in arguments else []), *arguments)
    assert status == 2 and names in said and len(said.splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra `tpu`")
def test_a_tpu_runs_splash_attention(tmp_path):
    """Heads of 128 and positions in multiples of it are what its kernel takes."""
    model = dataclasses.replace(CONFIG.model, layout="flatten", frames=63, width=128, heads=1, layers=2)
    train = dataclasses.replace(CONFIG.train, batch=4, remat="layer")
    told = plan_apart(tmp_path, "--topology", "v5e:2x2", "--mesh", "fsdp=4", config=Config(model, train))
    assert told["kernels"] > 0 and told["limit"] == 16 * 2**30
    assert max(t["times"] for t in told["traffic"] if t["kind"] == "all-gather") >= 2 * model.layers
    assert told["roofline"]["seconds"] > 0 and 0 < told["share_of_peak"] < 1 and told["schedule"]["chip_hours"] > 0
