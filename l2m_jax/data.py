"""Prepared songs: the record, the dataset of all records, and the batch of a step. After `tokens`, before `attention`.

A prepared folder holds

    records/SONG.npz     one atomic record a song, so that an interrupted preparation goes on where it was
    dataset/             the same records packed into a TFDS dataset in ArrayRecord, for random access in training
    songs.jsonl          one line a song, in the order of the dataset
    report.json          what was left out and why

Reading needs neither torch nor TensorFlow. The batch of step n is a pure function of (seed, n, row).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int

from l2m_jax.audio import write_atomic
from l2m_jax.config import ModelConfig, UserError
from l2m_jax.lyrics import check_memory, normalise_genre
from l2m_jax.tokens import AnyArray, Layout, make_layout, windows

VERSION = "1.0.0"  # of the record; a dataset of another version is refused
SHARD = 64  # songs of a file of the dataset; as many are in memory while it is written
MOST_SHARDS = 1024  # files
ALIKE = 16  # batches whose songs are sorted by length together


class Record(NamedTuple):
    """One song, prepared: everything that training, sampling and evaluation need of it."""

    song: str
    lyrics: str
    genre: str
    source: str  # hash of the song's files: a changed song is prepared again
    seconds: Float[np.ndarray, ""]
    codes: Int[np.ndarray, "F K"]  # of the whole song
    lyric_states: Float[np.ndarray, "P E"]
    genre_states: Float[np.ndarray, "G E"]
    section: Int[np.ndarray, " P"]  # of each lyric piece, index into lyrics.SECTIONS
    word: Int[np.ndarray, " P"]  # of each lyric piece; -1 for the row of a section without words
    word_times: Float[np.ndarray, "words 3"]  # start, end, end of line in s; no rows where the times are not known


class MadeWith(NamedTuple):
    """What records were made with; codes and states of other origins do not mix."""

    version: str
    codec: str  # as `weights.load_codec` takes it
    codec_fingerprint: str
    text_encoder: str  # as `weights.load_text_encoder` takes it
    text_layer: int
    text_fingerprint: str
    codebooks: int
    entries: int
    text_width: int
    text_backend: str = "jax"  # what can run the text encoder; no part of the origin: its fingerprint is

    def differences(self, other: MadeWith) -> list[str]:
        """What keeps records of the two apart; the same weights under another name or path do not."""
        return [
            f"{what}: {mine} and {theirs}"
            for what, mine, theirs in (
                ("version", self.version, other.version),
                ("codec", self.codec_fingerprint, other.codec_fingerprint),
                ("codebooks", self.codebooks, other.codebooks),
                ("text encoder", self.text_fingerprint, other.text_fingerprint),
            )
            if mine != theirs
        ]


DTYPES = {
    "seconds": np.float32,
    "codes": np.int16,
    "lyric_states": np.float16,
    "genre_states": np.float16,
    "section": np.int8,
    "word": np.int32,
    "word_times": np.float32,
}


def write_record(path: Path, record: Record, made_with: MadeWith) -> None:
    """Writes the record, whole or not at all."""
    arrays = {k: np.asarray(v, DTYPES[k]) if k in DTYPES else np.asarray(v) for k, v in record._asdict().items()}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, made_with=np.asarray(json.dumps(made_with)), **arrays)
    write_atomic(path, content.getvalue())


def read_record(path: Path) -> tuple[Record, MadeWith]:
    """The record and what it was made with. UserError where the file is not a whole record."""
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            values: dict[str, Any] = {k: arrays[k] if k in DTYPES else str(arrays[k]) for k in Record._fields}
            return Record(**values), MadeWith(*json.loads(str(arrays["made_with"])))
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a whole record ({error}); delete it and prepare again") from None


def songs_info(builder: Any, made_with: MadeWith) -> tfds.core.DatasetInfo:
    """What a TFDS builder of records tells of them."""
    widths = {
        "codes": (None, made_with.codebooks),
        "lyric_states": (None, made_with.text_width),
        "genre_states": (None, made_with.text_width),
        "section": (None,),
        "word": (None,),
        "word_times": (None, 3),
        "seconds": (),
    }
    features: dict[str, Any] = {k: tfds.features.Text() for k in Record._fields if k not in DTYPES}
    for k, dtype in DTYPES.items():
        features[k] = tfds.features.Tensor(shape=widths[k], dtype=dtype, encoding="bytes" if widths[k] else "none")
    return tfds.core.DatasetInfo(
        builder=builder,
        description="Songs as EnCodec codes with the text states of their lyrics and genre.",
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict(made_with=made_with._asdict()),
        disable_shuffling=True,
    )


class _Packing(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Packs record files in the given order. TFDS's other builder would hold all of them in memory to sort them."""

    name = "songs"
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, paths: Sequence[Path], made_with: MadeWith, **kwargs: Any):
        self._paths, self._made_with = paths, made_with
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return songs_info(self, self._made_with)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, Any]:
        size = max(SHARD, -(-len(self._paths) // MOST_SHARDS))
        starts = range(0, len(self._paths), size)
        return {"train": [functools.partial(_examples, self._paths[i : i + size]) for i in starts]}


def _examples(paths: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, path in enumerate(paths):
        yield i, read_record(path)[0]._asdict()


def pack(folder: Path, paths: Sequence[Path], made_with: MadeWith) -> None:
    """Packs the records into `folder`/dataset; the old one stands until the new one is whole."""
    build(folder, functools.partial(_Packing, paths, made_with))


def build(folder: Path, make_builder: Callable[..., Any], settings: Any = None) -> None:
    """Runs a TFDS builder, with `settings` for its preparation, and puts what it built, summed up, in its place."""
    work, final, old = folder / ".packing", folder / "dataset", folder / ".old"
    shutil.rmtree(work, ignore_errors=True)
    try:
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download that is none
            builder = make_builder(data_dir=str(work), file_format="array_record")
            builder.download_and_prepare(download_config=settings)
        _sum_up(builder, work / "songs.jsonl")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        Path(builder.data_path).rename(final)
        (work / "songs.jsonl").replace(folder / "songs.jsonl")  # last: it vouches for the dataset
    except (OSError, RuntimeError) as error:  # ArrayRecord's errors are RuntimeErrors
        raise UserError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sum_up(builder: Any, manifest: Path) -> None:
    """Writes a line a song, and what training asks of all songs at once into the dataset's metadata."""
    genres, longest = set(), {"pieces": 0, "genre_pieces": 0, "song": ""}
    with manifest.open("w", encoding="utf-8") as lines:
        for row in builder.as_data_source(split="train"):
            r = _record(row)
            pieces, genre_pieces = len(r.lyric_states), len(r.genre_states)
            if pieces + genre_pieces > longest["pieces"] + longest["genre_pieces"]:
                longest = {"pieces": pieces, "genre_pieces": genre_pieces, "song": r.song}
            genres.add(normalise_genre(r.genre))
            line = {"song": r.song, "source": r.source, "genre": r.genre, "seconds": round(float(r.seconds), 3)}
            line |= {"frames": len(r.codes), "pieces": pieces, "words_timed": len(r.word_times)}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    builder.info.metadata.update(longest=longest, genres=sorted(genres - {""}))
    builder.info.write_to_directory(builder.data_path)


def _record(row: dict[str, Any]) -> Record:
    return Record(**{k: row[k].decode() if isinstance(row[k], bytes) else row[k] for k in Record._fields})


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of songs.jsonl: song, source, genre, seconds, frames, pieces, words_timed of each packed song."""
    return [json.loads(line) for line in (folder / "songs.jsonl").read_text(encoding="utf-8").split("\n") if line]


class Dataset:
    """Random access to the records of a prepared folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not all((self.folder / name).exists() for name in ("songs.jsonl", "dataset/dataset_info.json")):
            raise UserError(f"{folder} is not a prepared dataset; make one with: l2m prepare SONGS {folder}")
        try:
            builder: Any = tfds.builder_from_directory(str(self.folder / "dataset"))
            self._source = builder.as_data_source(split="train")
            metadata: dict[str, Any] = dict(builder.info.metadata or {})
            version = metadata["made_with"]["version"]
        except Exception as error:  # whatever TFDS says of a damaged folder
            raise UserError(f"{folder}: the dataset cannot be read ({error}); run l2m prepare again") from None
        if version != VERSION:
            raise UserError(f"{folder} was prepared in version {version}, this is {VERSION}: prepare it again")
        self.made_with = MadeWith(**metadata["made_with"])
        self.longest: dict[str, Any] = metadata["longest"]
        self.genres: list[str] = metadata["genres"]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        try:
            row: dict[str, Any] = self._source[int(index)]
        except (RuntimeError, ValueError, OSError) as error:  # whatever ArrayRecord and TFDS say
            damaged = self.folder / "dataset"
            raise UserError(f"{damaged} is damaged ({error}); delete it and run l2m prepare again") from None
        return _record(row)

    @property
    def fingerprint(self) -> str:
        """Of which songs these are: the hash of songs.jsonl, which has one of each song's files."""
        return hashlib.sha256((self.folder / "songs.jsonl").read_bytes()).hexdigest()[:16]

    def frames(self) -> Int[np.ndarray, " songs"]:
        """Frames of each song."""
        return np.array([line["frames"] for line in read_manifest(self.folder)])

    def words_timed(self) -> Int[np.ndarray, " songs"]:
        """Words of each song whose times are known."""
        return np.array([line["words_timed"] for line in read_manifest(self.folder)])

    def check(self, model: ModelConfig) -> None:
        """UserError where the model cannot take these songs."""
        for name, ours in (
            ("codebooks", model.codebooks),
            ("entries", model.entries),
            ("text_width", model.text_width),
        ):
            theirs = getattr(self.made_with, name)
            if theirs != ours:
                raise UserError(
                    f"{self.folder} has {name} {theirs}, model.{name} is {ours}: set --model.{name} {theirs}"
                )
        longest = self.longest
        where = f"{self.folder}: {longest['song']}"
        check_memory(longest["pieces"], longest["genre_pieces"], model.memory, where)


class Example(NamedTuple):
    """One song as the train step takes it; a batch has B of each in front. See `Tokens` and `model.Prompt`."""

    ids: Int[AnyArray, "T J"]
    targets: Int[AnyArray, "T J"]
    states: Float[AnyArray, "S E"]
    kind: Int[AnyArray, " S"]
    section: Int[AnyArray, " S"]
    position: Int[AnyArray, " S"]
    sung: Float[AnyArray, "S 2"] | None = None  # frames from and to which a row's word is sung; NaN where not known


def prompt_rows(
    lyric_states: np.ndarray, section: np.ndarray, genre_states: np.ndarray, memory: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """States, kind, section and position of the rows of a prompt: genre first, then lyrics, padded to `memory` rows.

    Kind is 0 for genre, 1 for lyrics, -1 for padding; positions count from 0 in each kind.
    """
    genre, lyrics = len(genre_states), len(lyric_states)
    padding = memory - genre - lyrics
    if padding < 0:
        raise ValueError(f"{genre} genre and {lyrics} lyric rows are more than {memory}; check_memory comes first")
    states = np.vstack([genre_states, lyric_states, np.zeros((padding, lyric_states.shape[1]))]).astype(np.float32)
    kind = np.repeat([0, 1, -1], [genre, lyrics, padding]).astype(np.int32)
    sections = np.concatenate([np.zeros(genre), section, np.zeros(padding)]).astype(np.int32)
    position = np.concatenate([np.arange(genre), np.arange(lyrics), np.zeros(padding)]).astype(np.int32)
    return states, kind, sections, position


def make_example(record: Record, layout: Layout, memory: int) -> Example:
    """The record in the window of the layout and the memory of the model."""
    rows = prompt_rows(record.lyric_states, record.section, record.genre_states, memory)
    sung = np.full((memory, 2), np.nan, np.float32)
    if len(record.word_times):
        of_words = record.word >= 0
        rows_of_words = len(record.genre_states) + np.flatnonzero(of_words)
        frames = record.word_times[record.word[of_words], :2] * (len(record.codes) / record.seconds)
        sung[rows_of_words] = np.minimum(frames, len(record.codes))  # a word may be said to end after the sound
    return Example(*layout.encode(record.codes), *rows, sung)


def batches(
    dataset: Dataset,
    model: ModelConfig,
    seed: int,
    batch: int,
    steps: range,
    rows: Sequence[int] | None = None,
    sizes: int = 1,
) -> Iterator[Example]:
    """The batch of every step of `steps`, read ahead by a thread: row r of step n is song n * batch + r of an endless
    sequence of shuffled epochs. `rows` are this process's part of each batch. Close the iterator when done.

    With `sizes` of windows, more than one, songs of like length stand together: of `ALIKE` batches at a time, in a
    shuffled order. A batch has the smallest window that holds its longest song.
    """
    layouts, frames = windows(make_layout(model), sizes), np.minimum(dataset.frames(), model.frames)
    order: Any = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()

    def songs_of(step: int) -> list[int]:
        if sizes == 1:
            return [int(order[step * batch + row]) for row in range(batch)]
        stretch, at = divmod(step, ALIKE)
        songs = np.array([order[stretch * ALIKE * batch + i] for i in range(ALIKE * batch)])
        alike = songs[np.argsort(frames[songs], kind="stable")].reshape(ALIKE, batch)
        return alike[np.random.default_rng((seed, stretch)).permutation(ALIKE)[at]].tolist()

    def batch_of(step: Any) -> Example:
        songs = songs_of(int(step))
        layout = next(window for window in layouts if frames[songs].max() <= window.frames)
        chosen = range(batch) if rows is None else rows
        examples = [make_example(dataset[songs[row]], layout, model.memory) for row in chosen]
        return Example(*(np.stack(column) for column in zip(*examples)))

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(steps.start, steps.stop).map(batch_of).to_iter_dataset(ahead))
