"""The tables of rules and of the plan, and the train step on eight (fake) devices against the same step on one."""

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CONFIG, make_record
from flax import nnx
from jax.sharding import PartitionSpec

from l2m_jax import step
from l2m_jax.cli import PRESETS
from l2m_jax.collectives import Collective, collectives
from l2m_jax.config import Config, MeshConfig, ModelConfig, UserError
from l2m_jax.data import Example, make_example
from l2m_jax.model import SoundTransformer
from l2m_jax.optim import optimizer
from l2m_jax.sharding import (
    AXES,
    PLAN,
    RULES,
    check_divides,
    make_mesh,
    path_name,
    position_sharding,
    state_shardings,
)
from l2m_jax.step import TrainState
from l2m_jax.tokens import make_layout

LAYOUTS = {  # each axis, and every pair of two
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=4, context=2),
    "mixed": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}
# No two sizes are the same that a shape should tell apart: 3 layers, 32 wide, 2 key heads 6 wide, 64 positions.
MODEL = dataclasses.replace(
    CONFIG.model,
    frames=60,
    memory=10,
    width=32,
    heads=4,
    key_heads=2,
    attention_width=24,
    layers=3,
    rotary=True,
)
SPREAD = Config(MODEL, dataclasses.replace(CONFIG.train, batch=8, chunk=16))


def train_state(config: Config) -> TrainState:
    model = SoundTransformer(config.model, rngs=nnx.Rngs(0))
    return TrainState(model, optimizer(config.train).init(model))


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_matches_a_rule(name: str):
    """And exactly one, in the model and in Adam's moments, and never with more axes than dimensions."""
    config = importlib.import_module(f"l2m_jax.configs.{name}").config
    shapes = jax.eval_shape(lambda: train_state(config))
    shardings = state_shardings(shapes, make_mesh(MeshConfig()))
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings)):
        assert len(sharding.spec) <= len(leaf.shape)
        matches = [pattern for pattern, _ in RULES if re.search(pattern, path_name(path))]
        assert len(matches) == bool(leaf.shape), path_name(path)
        if matches and "layers" in path_name(path):
            assert sharding.spec[0] is None  # layers are never split


def test_names_and_rules():
    shapes = jax.eval_shape(lambda: train_state(CONFIG))
    specs = {
        path_name(path): s.spec
        for path, s in jax.tree_util.tree_leaves_with_path(state_shardings(shapes, make_mesh(MeshConfig())).model)
    }
    assert specs["layers/self_attention/query/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["layers/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["head/kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["token_embedding"] == PartitionSpec(None, "fsdp")


def test_an_unmatched_parameter_is_an_error():
    tree = {"head": {"kernel": jnp.ones((2, 2)), "slope": jnp.ones(3)}, "count": jnp.ones(())}
    with pytest.raises(ValueError, match=r"head/slope \(3,\).*RULES"):
        state_shardings(tree, make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=2), MeshConfig(fsdp=2), MeshConfig(fsdp=0), MeshConfig(data=1, tensor=-2), MeshConfig(fsdp=-1)],
)
def test_a_mesh_that_does_not_fit(config: MeshConfig):
    with pytest.raises(UserError, match="product must be the number of devices, 1"):
        make_mesh(config)


def test_what_must_divide():
    def check(sizes: tuple[int, ...], songs: int = 8, **model: int) -> None:
        mesh = jax.sharding.Mesh(np.full(sizes, jax.devices()[0]), AXES)
        check_divides(mesh, songs, dataclasses.replace(CONFIG.model, **model))

    check((2, 2, 2, 2))
    for sizes, change, names in (
        ((2, 2, 2, 2), {"songs": 6}, "train.batch.* is 6.*= 4"),
        ((2, 2, 2, 2), {"heads": 1}, "model.heads is 1.*mesh.tensor = 2"),
        ((2, 3, 1, 1), {"songs": 6}, "model.width is 16.*mesh.fsdp = 3"),
        ((1, 1, 3, 1), {"heads": 3, "width": 18}, "number of ids of the output is .*mesh.tensor = 3"),
        ((2, 2, 2, 3), {}, "positions of the window is 64.*mesh.context = 3"),
    ):
        with pytest.raises(UserError, match=names):
            check(sizes, **change)


def test_devices_that_cannot_be_laid_out_so(monkeypatch):
    def refused(*_, **__):
        raise NotImplementedError("no such torus")

    monkeypatch.setattr("jax.experimental.mesh_utils.create_device_mesh", refused)
    with pytest.raises(UserError, match=r"mesh.data 1, .* cannot be laid out so \(no such torus\)"):
        make_mesh(MeshConfig(data=1))


@pytest.fixture(scope="module")
def on_eight_devices() -> dict[str, dict]:
    """What `compare` measured, in a process of its own: JAX counts its devices once."""
    # The second flag: seven steps are compiled and each runs once.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_eight_devices_agree_with_one(on_eight_devices, name: str):
    measured = on_eight_devices[name]
    for what in ("loss", "gradient"):
        print(f"{name}: {what} relative error {measured[what]:.1e}, tolerance 1e-05")
        assert measured[what] <= 1e-5
    config = LAYOUTS[name]
    assert measured["share of a kernel"] == 1 / (config.fsdp * config.tensor)
    assert measured["share of the ids"] == config.tensor / 8


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_exchanged_that_the_plan_does_not_name(on_eight_devices, name: str):
    assert not on_eight_devices[name]["not in the plan"]
    assert on_eight_devices[name]["in the plan"]


def test_what_the_plan_does_not_name_is_found():
    """A stack of layers gathered at once, an activation summed over fsdp, logits gathered."""
    mesh = {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    everyone = (tuple(range(8)),)
    for kind, shape in (("all-gather", (3, 32, 128)), ("all-reduce", (8, 64, 32)), ("all-gather", (8, 64, 2, 128))):
        found = Collective(kind, "f32", shape, 4, everyone, 1, "somewhere")
        assert outside_plan([found], SPREAD, mesh) == [f"{kind} of {shape} along fsdp in somewhere"]
    assert not outside_plan([Collective("all-gather", "f32", (1, 32, 128), 4, everyone, 1, "")], SPREAD, mesh)


def outside_plan(found: list[Collective], config: Config, mesh: dict[str, int]) -> list[str]:
    """Collectives that PLAN does not name; arrays are known by their sizes, in any order."""
    model, layout = config.model, make_layout(config.model)
    songs = config.train.batch // config.train.accumulate // (mesh["data"] * mesh["fsdp"])
    here, memory = layout.positions // mesh["context"], model.memory + 2
    chunk = math.gcd(config.train.chunk, here)
    kinds = {"parameters": set(), "activations": set(), "keys": set(), "queries": set()}
    shapes = jax.eval_shape(lambda: SoundTransformer(model, rngs=nnx.Rngs(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = path_name(path)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        whole = leaf.shape[-len(spec) :]
        for axes in (("tensor",), ("tensor", "fsdp")):
            part = (n // mesh[a] if a in axes else n for n, a in zip(whole, spec))
            kinds["parameters"].add(sizes(tuple(part)))
    kinds["parameters"].add(sizes((here, model.width)))  # gradients of the embeddings of places
    for length in (here, memory, chunk):
        kinds["activations"].add(sizes((songs, length, model.width)))
        kinds["activations"].add(sizes((songs, length)))
    for heads in {model.heads, model.key_heads or model.heads}:
        for length in (layout.positions, memory):
            local = max(heads // mesh["tensor"], 1)
            kinds["keys"].add(sizes((songs, local, length, model.head_width)))
    kinds["keys"].add(sizes((songs, memory, model.width)))
    if config.train.guide:
        kinds["queries"] |= {sizes((songs, length, model.head_width)) for length in (here, memory)}
    wrong = []
    for c in found:
        axes = c.axes(mesh)
        planned = [any(sizes(c.shape) in kinds[k] for k in PLAN[axis].get(c.kind, ())) for axis in axes]
        small = len(sizes(c.shape)) <= (c.kind == "all-reduce")
        if not small and not all(planned):
            wrong.append(f"{c.kind} of {c.shape} along {' and '.join(axes)} in {c.source}")
    return wrong


def sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


# What runs on eight devices.


@functools.cache
def make_model(config: ModelConfig) -> SoundTransformer:
    return jax.jit(lambda: SoundTransformer(config, rngs=nnx.Rngs(0)))()


def gradient_step(config: Config, mesh_config: MeshConfig, devices: list) -> dict:
    """The step of `make_program`, compiled, read and run once; the optimizer's state is the gradient."""
    keep_gradient = optax.GradientTransformation(
        init=lambda model: jax.tree.map(jnp.zeros_like, model),
        update=lambda gradient, state, model: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )
    step.optimizer = lambda _: keep_gradient
    mesh = make_mesh(mesh_config, devices)
    program = step.make_program(config, mesh)
    times = np.arange(18, dtype=np.float32).reshape(6, 3) / 75
    records = [make_record(i, frames=20 + 3 * i)._replace(word_times=times) for i in range(config.train.batch)]
    examples = [make_example(record, make_layout(config.model), config.model.memory) for record in records]
    batch = jax.device_put(Example(*map(np.stack, zip(*examples))), program.batch)
    with jax.set_mesh(mesh):
        model = make_model(config.model)
        state = TrainState(jax.tree.map(np.array, model), keep_gradient.init(model))  # the step's to use up
        state = jax.device_put(state, program.shardings)
        compiled = program.step.lower(state, np.int32(0), batch).compile()
        found = collectives(compiled.as_text())
        kernel = state.model.layers.up.kernel[...]
        share = kernel.addressable_shards[0].data.size / kernel.size
        new, metrics = compiled(state, np.int32(0), batch)
    return {
        "loss": float(metrics["loss"]),
        "gradient": [np.asarray(x) for x in jax.tree.leaves(new.optimizer)],
        "share of a kernel": share,
        "share of the ids": np.prod(position_sharding(mesh).shard_shape(batch.ids.shape)) / batch.ids.size,
        "not in the plan": outside_plan(found, config, dict(mesh.shape)),
        "in the plan": len(found),
    }


def compare() -> dict[str, dict]:
    """Relative errors of loss and gradient of every layout against one device; `mixed` is guided and accumulates."""

    def alone(config: Config) -> dict:
        return gradient_step(config, MeshConfig(data=1), jax.devices()[:1])

    guided = dataclasses.replace(SPREAD, train=dataclasses.replace(SPREAD.train, guide=1.0))
    twice = dataclasses.replace(guided, train=dataclasses.replace(guided.train, accumulate=2))
    measured, plain = {}, alone(SPREAD)
    for name, mesh_config in LAYOUTS.items():
        mixed = name == "mixed"
        one = alone(guided) if mixed else plain
        largest = max(np.abs(x).max() for x in one["gradient"])
        many = gradient_step(twice if mixed else SPREAD, mesh_config, jax.devices())
        errors = [
            np.abs(a - b).max() / max(np.abs(a).max(), 1e-2 * largest)  # key biases have no gradient but rounding
            for a, b in zip(one["gradient"], many.pop("gradient"))
        ]
        error = np.max(errors)  # max() would pass over a NaN
        measured[name] = many | {"loss": abs(many["loss"] / one["loss"] - 1), "gradient": float(error)}
    return measured


if __name__ == "__main__":
    print(json.dumps(compare()))
