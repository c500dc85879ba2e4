"""The learning rate of every step, what decays, and the clip."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l2m_jax.config import ModelConfig, TrainConfig
from l2m_jax.model import SoundTransformer
from l2m_jax.optim import optimizer, schedule
from l2m_jax.sharding import path_name

TRAIN = TrainConfig(steps=100, warmup=10, lr_max=1e-3, lr_min=1e-4, weight_decay=0.1)


def test_schedule():
    rate = np.array([float(schedule(TRAIN)(step)) for step in range(100)])
    np.testing.assert_allclose(np.diff(rate[:11]), np.diff(rate[:11])[0], rtol=1e-4)  # a line,
    assert 0 < rate[0] < 2e-4  # that does not begin at 0
    assert math.isclose(rate[10], 1e-3, rel_tol=1e-5) and rate.argmax() == 10
    cosine = 1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * np.arange(90) / 89))
    np.testing.assert_allclose(rate[10:], cosine, rtol=1e-4)
    assert math.isclose(rate[99], 1e-4, rel_tol=1e-5)  # the last step's
    assert math.isclose(float(schedule(TRAIN)(1000)), 1e-4, rel_tol=1e-5)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 200), (2, 5), (3, 0), (3, 200), (50, 50), (50, 49)])
def test_schedule_of_short_runs(steps, warmup):
    rates = schedule(dataclasses.replace(TRAIN, steps=steps, warmup=warmup))
    values = [float(rates(step)) for step in range(steps)]
    assert all(0 < v <= 1e-3 * 1.0001 for v in values)
    assert steps == 1 or math.isclose(values[-1], 1e-4, rel_tol=1e-4)


def test_only_kernels_decay():
    """Without a gradient, AdamW moves what decays and nothing else."""
    config = ModelConfig(codebooks=2, entries=8, frames=12, memory=7, text_width=6, width=16, heads=2, layers=2)
    shapes = jax.eval_shape(lambda: SoundTransformer(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    rules = optimizer(TRAIN)
    updates = jax.jit(lambda model: rules.update(jax.tree.map(jnp.zeros_like, model), rules.init(model), model)[0])(
        model
    )
    rate, moved = float(schedule(TRAIN)(0)), set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = path_name(path)
        assert (np.asarray(update) != 0).all() == name.endswith("/kernel"), name
        if name.endswith("/kernel"):
            np.testing.assert_allclose(update, -0.1 * rate, rtol=1e-5)
            moved.add(name.split("/")[-2])
    assert moved == {"query", "key", "value", "out", "up", "down", "project", "head"}


def test_first_step_and_clip():
    """Adam's first step has the size of the learning rate; a clipped gradient keeps its direction."""
    rules, start = optimizer(dataclasses.replace(TRAIN, clip=1.0)), {"bias": jnp.zeros(2)}
    update, state = rules.update({"bias": jnp.array([300.0, -400.0])}, rules.init(start), start)
    rate = float(schedule(TRAIN)(0))
    np.testing.assert_allclose(update["bias"], [-rate, rate], rtol=1e-4)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["bias"], 0.1 * np.array([0.6, -0.8]), rtol=1e-4)
