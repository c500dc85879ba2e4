"""The figure that training tells: that of the best head of all, in the log and as a picture."""

import json

import jax
import numpy as np
import pytest
from conftest import CONFIG, make_prepared, make_record
from tensorboardX.proto.event_pb2 import Event

from l2m_jax.align import attention_maps, teacher
from l2m_jax.checkpoint import load_model
from l2m_jax.config import MeshConfig
from l2m_jax.data import Dataset
from l2m_jax.follow import diagonality, make_follow
from l2m_jax.sharding import make_mesh
from l2m_jax.tokens import make_layout

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
