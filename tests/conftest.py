"""Every annotation of the package is checked, types and shapes; and the small songs and models that tests share."""

import dataclasses
import functools
import os
import tempfile
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype

# A step is compiled once for all tests and the processes that they start: a run of twelve steps takes 2 s, not 9.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have what is set here
    _COMPILED = tempfile.TemporaryDirectory(prefix="l2m_compiled_")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**34),  # with a limit JAX locks the folder: workers share it
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is one
modules = {path.stem for path in (Path(__file__).parents[1] / "l2m_jax").glob("*.py")}
modules.remove("cli")  # tyro.MISSING stands where a path will be
jaxtyping.install_import_hook([f"l2m_jax.{name}" for name in modules], "conftest.checked")

import jax  # noqa: E402 - after its environment

from l2m_jax.config import Config, ModelConfig, TrainConfig  # noqa: E402
from l2m_jax.data import VERSION, Dataset, Example, MadeWith, Record, make_example, pack, write_record  # noqa: E402
from l2m_jax.prepare import Encoders, prepare  # noqa: E402
from l2m_jax.solfege import make_solfege  # noqa: E402
from l2m_jax.tokens import make_layout  # noqa: E402
from l2m_jax.train import train  # noqa: E402
from l2m_jax.weights import load_codec  # noqa: E402

MADE_WITH = MadeWith(VERSION, "synthetic", "c0dec", "synthetic", -1, "7ext", codebooks=2, entries=16, text_width=12)
CONFIG = Config(
    model=ModelConfig(
        layout="delay", codebooks=2, entries=16, frames=40, memory=10, text_width=12, width=16, heads=2, layers=2
    ),
    train=TrainConfig(batch=4, steps=12, warmup=2, lr_max=1e-2, lr_min=1e-3, chunk=64, checkpoint_every=4, log_every=1),
)
SUNG = Config(
    model=ModelConfig(layout="flatten", frames=60, memory=12, text_width=16, width=16, heads=2, layers=1),
    train=TrainConfig(batch=2, steps=2, lr_max=1e-2, lr_min=1e-3, sample_every=1, sample_seconds=0.2),
)


def changed(config: Config = CONFIG, model: dict | None = None, **fields) -> Config:
    """The config with other fields of its training, and of its model."""
    train = dataclasses.replace(config.train, **fields)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **(model or {})), train=train)


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


def one_batch(dataset: Dataset, rows: int = 8) -> Example:
    """The first songs of a dataset that fits CONFIG, as a batch."""
    layout, memory = make_layout(CONFIG.model), CONFIG.model.memory
    return Example(*map(np.stack, zip(*(make_example(dataset[i], layout, memory) for i in range(rows)))))


def make_prepared(folder: Path, records: list[Record], made_with: MadeWith = MADE_WITH) -> Path:
    """A prepared folder of the records, as `prepare` would leave it."""
    (folder / "records").mkdir(parents=True)
    paths = [folder / "records" / f"{record.song}.npz" for record in records]
    for path, record in zip(paths, records):
        write_record(path, record, made_with)
    pack(folder, paths, made_with)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """Programs of one module are of no use to the next: kept, they grow to 6 GB."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Hop 8, two residual layers a stage, two LSTM layers, 4 codebooks of 32 entries; random."""
    from test_codec import save

    return load_codec(save(tmp_path_factory.mktemp("codecs") / "small"), 4)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """By name: a codec of a published configuration, random weights, from both originals. Only for reading."""
    import originals

    return functools.cache(lambda name: originals.make(name, tmp_path_factory.mktemp("originals")))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Eight synthetic songs that fit CONFIG, 20 to 48 frames long; its window is 40. Only for reading."""
    records = [make_record(i, frames=20 + 4 * i) for i in range(8)]
    return make_prepared(tmp_path_factory.mktemp("prepared") / "songs", records)


@pytest.fixture(scope="session")
def songs(tmp_path_factory) -> Path:
    """Six sung songs of 2 or 3 notes, about a second each. Only for reading."""
    folder = tmp_path_factory.mktemp("solfege") / "songs"
    make_solfege(folder, songs=6, notes=(2, 3))
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Encoders:
    """The codec of the package, and a random BERT 16 wide of 2 layers and 24 positions."""
    from test_bert import tiny_folder

    return Encoders("solfege", text_encoder=str(tiny_folder(tmp_path_factory.mktemp("encoders") / "bert")))


@pytest.fixture(scope="session")
def sung(tmp_path_factory, songs, encoders) -> Path:
    """`songs`, prepared with `encoders`. Only for reading."""
    folder = tmp_path_factory.mktemp("sung") / "prepared"
    prepare(songs, folder, encoders)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, prepared) -> Path:
    """A run of CONFIG on `prepared`, all steps at one go. Only for reading."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert not train(CONFIG, Dataset(prepared), run, None)
    return run


@pytest.fixture(scope="session")
def singer_run(tmp_path_factory, sung) -> Path:
    """A run of SUNG on `sung`: it has hardly learnt a thing, but can sing. Only for reading."""
    run = tmp_path_factory.mktemp("singer") / "run"
    assert not train(SUNG, Dataset(sung), run, load_codec())
    return run
