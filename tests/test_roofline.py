"""FLOPs by formula against XLA's count, and what bounds a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax.chips import CHIPS, Topology, parse_topology
from l2m_jax.cli import load_preset
from l2m_jax.config import Config, ModelConfig, TrainConfig
from l2m_jax.data import Example
from l2m_jax.plan import model_shapes
from l2m_jax.roofline import Roofline, Work, attention, products, rate, roofline, step_work
from l2m_jax.sharding import AXES
from l2m_jax.step import losses
from l2m_jax.tokens import make_layout

ONE = dict.fromkeys(AXES, 1)
CONFIG = Config(
    model=ModelConfig(
        entries=64, frames=60, memory=30, text_width=96, width=256, heads=4, key_heads=2, attention_width=192, layers=1
    ),
    train=TrainConfig(batch=3),
)


def shapes(config: Config) -> Example:
    layout, songs, memory = make_layout(config.model), config.train.batch, config.model.memory
    ids = jax.ShapeDtypeStruct((songs, layout.positions, layout.streams), np.int32)
    rows = jax.ShapeDtypeStruct((songs, memory), np.int32)
    return Example(ids, ids, jax.ShapeDtypeStruct((songs, memory, 96), np.float32), rows, rows, rows)


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_that_xla_counts(backward: bool):
    """Of one layer, whose loop runs once; short sequences take plain attention, which computes the whole square."""
    layout = make_layout(CONFIG.model)
    keep = jnp.ones((CONFIG.train.batch, 2), bool)

    def loss(model, batch):
        return losses(model, batch, keep, layout, layout.positions, "none").nats.sum()

    function = jax.jit(jax.value_and_grad(loss) if backward else loss)
    model = model_shapes(CONFIG)
    counted = function.lower(model, shapes(CONFIG)).cost_analysis()["flops"]
    own, cross = attention(CONFIG.model)
    whole = CONFIG.train.batch * 2 * (2 * own + cross)
    head = CONFIG.train.batch * sum(p.flops for p in products(model, CONFIG.model) if p.head)
    forward = CONFIG.train.batch * sum(p.flops for p in products(model, CONFIG.model))
    expected = 3 * (forward + whole) + head if backward else forward + whole
    print(f"FLOPs by formula {expected:.4e}, by XLA {counted:.4e}, which counts all that is no product too")
    assert 1 <= counted / expected < 1.05


def test_flops_of_a_song_are_6_n_t_and_attention():
    """As the presets' docstrings have them."""
    config = dataclasses.replace(load_preset("base"), train=TrainConfig(batch=1))
    model = config.model
    parameters, positions = sum(x.size for x in jax.tree.leaves(model_shapes(config))), 18_432
    stated = 6 * parameters * positions + 12 * model.layers * model.width * positions**2 / 2
    work = step_work(model_shapes(config), config, ONE)
    assert abs(work.model / stated - 1) < 0.1
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="none"))
    assert 1.05 < work.executed / step_work(model_shapes(plain), plain, ONE).executed < 1.34  # attention is kept


def test_narrow_heads_are_padded_to_whole_lanes():
    """A TPU multiplies as much as with heads of 128; what it has to multiply, and the weights, are less."""
    wide = load_preset("base")
    narrow = dataclasses.replace(wide, model=dataclasses.replace(wide.model, attention_width=512))
    assert (wide.model.head_width, narrow.model.head_width) == (128, 64)
    works = [step_work(model_shapes(config), config, ONE) for config in (wide, narrow)]
    passes = [sum(p.flops * 4 for p in products(model_shapes(config), config.model)) for config in (wide, narrow)]
    lost = wide.train.batch * (passes[0] - passes[1])
    assert works[0].executed - works[1].executed == pytest.approx(lost, rel=1e-6)
    assert works[0].model - works[1].model > wide.train.batch * 3 * attention(narrow.model)[0]


def test_a_mesh_divides_the_work_and_sends():
    model = model_shapes(CONFIG)
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch=8))
    one = step_work(model, config, ONE)
    assert one.sent == 0
    for axis in AXES:
        many = step_work(model, config, ONE | {axis: 2})
        assert many.model == one.model and many.sent > 0 and many.traffic < one.traffic
        assert many.executed == pytest.approx(one.executed / 2, rel=0.2 if axis == "context" else 1e-9)


def test_the_largest_bounds():
    chip = CHIPS["v5e"]
    bounds = roofline(Work(0.0, chip.flops, 2 * chip.bandwidth, 3 * chip.link), chip)
    assert bounds == Roofline(1.0, 2.0, 3.0) and (bounds.seconds, bounds.bound) == (3.0, "interconnect")
    assert roofline(Work(0.0, chip.flops, 0.0, 3 * chip.link), chip, 0.5).bound == "compute"


@pytest.mark.parametrize(
    "name, group, links",
    [
        ("v5e:4x4", [(0, 0), (0, 1), (0, 2), (0, 3)], 1),  # a line
        ("v5e:4x4", [(x, y) for x in range(4) for y in range(4)], 2),  # two lines
        ("v5e:2x16", [(0, y) for y in range(16)], 2),  # a ring
        ("v5e:2x16", [(0, y) for y in range(8)], 1),  # half of it
        ("v5e:2x16", [(1, y) for y in range(0, 16, 2)], 1),  # every second chip of it: two groups share its links
        ("v5p:4x4x4", [(0, 0, z) for z in range(4)], 2),
    ],
)
def test_links_of_a_group(name: str, group: list, links: float):
    topology = Topology(name, *parse_topology(name), devices=[])
    assert topology.chip is not None
    assert rate(group, topology) == pytest.approx(links * topology.chip.link)
