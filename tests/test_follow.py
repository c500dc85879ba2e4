"""The figure that training tells: that of the best head of all, in the log and as a picture."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, make_prepared, make_record
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from l2m_jax.align import attention_maps, teacher
from l2m_jax.checkpoint import load_model
from l2m_jax.config import MeshConfig
from l2m_jax.data import Dataset, Example, make_example
from l2m_jax.follow import astray, diagonality, make_follow
from l2m_jax.model import SoundTransformer
from l2m_jax.sharding import make_mesh
from l2m_jax.step import losses
from l2m_jax.tokens import make_layout
from l2m_jax.train import train

LAYOUT = make_layout(CONFIG.model)


def test_the_best_head_of_all(trained, tmp_path):
    """The first song with lyrics, longer than the window, against the maps that alignment makes of its beginning."""
    without = make_record(0)._replace(
        lyrics="", lyric_states=np.zeros((0, 12)), section=np.zeros(0), word=np.zeros(0, np.int32)
    )
    folder = make_prepared(tmp_path / "songs", [without, make_record(1, frames=50)])
    mesh = make_mesh(MeshConfig())
    model = load_model(trained)[0]
    with jax.set_mesh(mesh):
        watch = make_follow(Dataset(folder), LAYOUT, CONFIG.model.memory, mesh)
        figure, looks = watch(model)
    song = teacher(make_record(1, frames=50), CONFIG.model.memory, 50, 75.0)
    maps = attention_maps(model, LAYOUT, song.codes[: LAYOUT.frames], song.prompt)[..., song.words >= 0]
    each = np.asarray(diagonality(maps))
    assert figure == pytest.approx(each.max(), abs=1e-3)
    np.testing.assert_allclose(looks, maps[each.argmax()], atol=1e-3)  # records hold states in float16


def test_training_tells_it(trained):
    """At the last step in metrics.jsonl and TensorBoard, with a picture."""
    told = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if "diagonality" in line] == [11]
    assert -1 <= told[-1]["diagonality"] <= 1
    tags = set()
    for path in (trained / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            tags |= {v.tag for v in Event.FromString(content[12 : 12 + size]).summary.value}
            content = content[12 + size + 4 :]
    assert {"attention", "diagonality"} <= tags


def timed(i):
    """Song i with its six words sung for five frames each, one after the other; the last is never sung to its end."""
    ends = np.arange(1, 7) * 5 / 75
    return make_record(i)._replace(word_times=np.stack([ends - 5 / 75, ends, np.full(6, np.nan)], 1))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["flatten", "delay"])
def test_astray_is_the_weight_that_is_not_on_the_sung_word(name, cut):
    """Of two songs: a word of two pieces may be looked at in either, a section tag never; the other has no times."""
    layout = make_layout(dataclasses.replace(CONFIG.model, layout=name, frames=20 if cut else 40))
    record = timed(0)._replace(word=np.array([-1, 0, 0, 1, 2, 3]))
    records = (record._replace(word_times=record.word_times[:4]), make_record(1))
    examples = [make_example(each, layout, CONFIG.model.memory) for each in records]
    each, count = {"flatten": 2, "delay": 1}[name], 20
    positions = layout.positions
    rng = np.random.default_rng(0)
    queries, keys = (rng.normal(size=(2, n, 4)).astype(np.float32) for n in (positions, 12))
    seen = np.ones((2, 12), bool)
    seen[:, 1] = False
    scores = np.where(seen[:, None], np.einsum("bth,bmh->btm", queries, keys) / 2, -np.inf)
    weights = np.asarray(jax.nn.softmax(scores))[0, : count * each]
    found = astray(
        *map(jnp.asarray, (keys, seen, np.stack([example.sung for example in examples]), queries)),
        (jnp.arange(positions) // each + 0.5)[None],
        jnp.asarray(np.stack([(example.targets != layout.pad).any(-1) for example in examples])),
    )
    first = 2 + 2  # rows: null ones, the genre's, then the lyrics'
    on = [[first + 1, first + 2], [first + 3], [first + 4], [first + 5]]  # of the words, which last five frames each
    there = [weights[t, on[t // each // 5]].sum() for t in range(count * each)]
    assert found.positions == count * each
    np.testing.assert_allclose(found.nats, -np.log(there).sum(), rtol=1e-5)


def test_a_guided_head_learns_where_the_song_is(tmp_path):
    dataset = Dataset(make_prepared(tmp_path / "songs", [timed(i) for i in range(8)]))
    guided = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, guide=1.0, steps=60))
    train(guided, dataset, tmp_path / "run", None)
    told = [json.loads(line)["astray"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(told[-5:]) < 0.5 * told[0]


def test_guiding_is_the_same_however_much_is_computed_anew(monkeypatch):
    """By strips, as a window of thousands of positions is, as well; and it changes nothing of the codes' loss."""
    monkeypatch.setattr("l2m_jax.model.STRIP", 16)
    model = SoundTransformer(CONFIG.model, rngs=nnx.Rngs(0))
    batch = Example(*map(np.stack, zip(*(make_example(timed(i), LAYOUT, CONFIG.model.memory) for i in range(2)))))
    keep = jnp.array([[True, True], [True, False]])

    def loss(model, remat, guided):
        totals = losses(model, batch, keep, LAYOUT, 64, remat, guided)
        return totals.nats.sum() + totals.astray.nats, totals

    (plain, whole), gradient = jax.value_and_grad(loss, has_aux=True)(model, "none", True)
    (again, strips), other = jax.value_and_grad(loss, has_aux=True)(model, "layer", True)
    np.testing.assert_allclose(plain, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert whole.astray.positions == strips.astray.positions == 30  # of the first song: the second's lyrics are dropped
    unguided = loss(model, "none", False)[1]
    np.testing.assert_allclose(unguided.nats, whole.nats, rtol=1e-6)
    assert unguided.astray.nats == 0 < whole.astray.nats
