"""The table of rules, and one train step on eight (fake) devices against the same step on one."""

import dataclasses
import functools
import importlib
import json
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
from jax.sharding import NamedSharding, PartitionSpec

from l2m_jax import train
from l2m_jax.cli import PRESETS
from l2m_jax.config import Config, MeshConfig, ModelConfig, UserError
from l2m_jax.data import Example, make_example
from l2m_jax.model import SoundTransformer
from l2m_jax.optim import optimizer
from l2m_jax.sharding import (
    AXES,
    RULES,
    batch_sharding,
    check_divides,
    make_mesh,
    path_name,
    position_sharding,
    state_shardings,
)
from l2m_jax.tokens import make_layout

LAYOUTS = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=4, context=2),
    "mixed": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}


def train_state(config: Config) -> train.TrainState:
    model = SoundTransformer(config.model, rngs=nnx.Rngs(0))
    return train.TrainState(model, optimizer(config.train).init(model))


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
    mesh = jax.sharding.Mesh(np.full((2, 2, 2, 2), jax.devices()[0]), AXES)
    check_divides(mesh, songs=8, heads=2, width=16, positions=64)
    for change, names in (
        ({"songs": 6}, "train.batch.* is 6.*= 4"),
        ({"heads": 3}, "model.heads is 3.*mesh.tensor = 2"),
        ({"width": 15}, "model.width is 15.*mesh.fsdp = 2"),
        ({"positions": 63}, "positions of the window is 63.*mesh.context = 2"),
    ):
        with pytest.raises(UserError, match=names):
            check_divides(mesh, **{"songs": 8, "heads": 2, "width": 16, "positions": 64} | change)


@pytest.fixture(scope="module")
def on_eight_devices() -> dict[str, dict[str, float]]:
    """What `compare` measured, in a process of its own: JAX counts its devices once."""
    # The second flag: six steps are compiled and each runs once.
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
    assert measured["share of a kernel"] == 1 / (max(config.fsdp, 1) * config.tensor)
    assert measured["share of the ids"] == 1 / (8 // config.tensor)


# What runs on eight devices.


@functools.cache
def make_model(config: ModelConfig) -> SoundTransformer:
    return jax.jit(lambda: SoundTransformer(config, rngs=nnx.Rngs(0)))()


def gradient_step(config: Config, mesh_config: MeshConfig, devices: list) -> dict:
    """One step of `train.make_step`, laid out as `train.train` lays it out; the optimizer's state is the gradient."""
    keep_gradient = optax.GradientTransformation(
        init=lambda model: jax.tree.map(jnp.zeros_like, model),
        update=lambda gradient, state, model: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )
    train.optimizer = lambda _: keep_gradient
    layout, mesh = make_layout(config.model), make_mesh(mesh_config, devices)
    micro = config.train.batch // config.train.accumulate
    check_divides(mesh, micro, config.model.heads, config.model.width, layout.positions)

    model = make_model(config.model)
    state = train.TrainState(model, keep_gradient.init(model))
    with jax.set_mesh(mesh):
        shardings = state_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        positions, everywhere = position_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        seen = []

        def shard_positions(x: jax.Array) -> jax.Array:
            x = jax.lax.with_sharding_constraint(x, positions)
            jax.debug.inspect_array_sharding(x, callback=seen.append)
            return x

        step = jax.jit(
            train.make_step(config, layout, shard_positions),
            in_shardings=(shardings, everywhere, batch_sharding(mesh)),
            out_shardings=(shardings, everywhere),
        )
        records = [make_record(i, frames=20 + 3 * i) for i in range(config.train.batch)]
        examples = [make_example(record, layout, config.model.memory) for record in records]
        batch = Example(*map(np.stack, zip(*examples)))
        new, metrics = step(state, jnp.array(0), jax.device_put(batch, batch_sharding(mesh)))
    kernel = state.model.layers.up.kernel[...]
    return {
        "loss": float(metrics["loss"]),
        "gradient": [np.asarray(x) for x in jax.tree.leaves(new.optimizer)],
        "share of a kernel": kernel.addressable_shards[0].data.size / kernel.size,
        "share of the ids": np.prod(seen[0].shard_shape(batch.ids.shape)) / batch.ids.size,
    }


def compare() -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradient of every layout against one device; `mixed` also accumulates."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch=8))
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2))
    one = gradient_step(config, MeshConfig(data=1), jax.devices()[:1])
    largest = max(np.abs(x).max() for x in one["gradient"])
    measured = {}
    for name, mesh_config in LAYOUTS.items():
        many = gradient_step(twice if name == "mixed" else config, mesh_config, jax.devices())
        error = max(
            np.abs(a - b).max() / max(np.abs(a).max(), 1e-2 * largest)  # key biases have no gradient but rounding
            for a, b in zip(one["gradient"], many["gradient"])
        )
        many |= {"loss": abs(many["loss"] / one["loss"] - 1), "gradient": float(error)}
        measured[name] = {key: float(value) for key, value in many.items()}
    return measured


if __name__ == "__main__":
    print(json.dumps(compare()))
