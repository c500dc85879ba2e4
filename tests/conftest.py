"""Every annotation of the package is checked, types and shapes; and the small songs and models that tests share."""

from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is one
jaxtyping.install_import_hook("l2m_jax", "conftest.checked")

from l2m_jax.config import Config, ModelConfig, TrainConfig  # noqa: E402
from l2m_jax.data import VERSION, MadeWith, Record, pack, write_record  # noqa: E402

MADE_WITH = MadeWith(VERSION, "synthetic", "c0dec", "synthetic", -1, "7ext", codebooks=2, entries=16, text_width=12)
CONFIG = Config(
    model=ModelConfig(
        layout="delay", codebooks=2, entries=16, frames=40, memory=10, text_width=12, width=16, heads=2, layers=2
    ),
    train=TrainConfig(batch=4, steps=12, warmup=2, lr_max=1e-2, lr_min=1e-3, chunk=64, checkpoint_every=4, log_every=1),
)


def make_record(i: int, frames: int = 30, pieces: int = 6, genre_pieces: int = 2) -> Record:
    """A song of random codes and states that fits MADE_WITH; song i is always the same."""
    rng = np.random.default_rng(i)
    return Record(
        song=f"song_{i:03d}",
        lyrics=" ".join(["la"] * pieces),
        genre=("march", "waltz")[i % 2],
        source=f"{i:016x}",
        seconds=np.array(frames / 75, np.float32),
        codes=rng.integers(0, MADE_WITH.entries, (frames, MADE_WITH.codebooks)),
        lyric_states=rng.normal(size=(pieces, MADE_WITH.text_width)),
        genre_states=rng.normal(size=(genre_pieces, MADE_WITH.text_width)),
        section=rng.integers(0, 8, pieces),
        word=np.arange(pieces),
        word_times=np.zeros((0, 3)),
    )


def make_prepared(folder: Path, records: list[Record], made_with: MadeWith = MADE_WITH) -> Path:
    """A prepared folder of the records, as `prepare` would leave it."""
    (folder / "records").mkdir(parents=True)
    paths = [folder / "records" / f"{record.song}.npz" for record in records]
    for path, record in zip(paths, records):
        write_record(path, record, made_with)
    pack(folder, paths, made_with)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Eight synthetic songs that fit CONFIG, 20 to 48 frames long; its window is 40. Only for reading."""
    records = [make_record(i, frames=20 + 4 * i) for i in range(8)]
    return make_prepared(tmp_path_factory.mktemp("prepared") / "songs", records)
