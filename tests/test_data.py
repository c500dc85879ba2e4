"""Records on disk, the packed dataset, and the batch of a step as a pure function of (seed, n, row)."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIG, MADE_WITH, make_prepared, make_record

from l2m_jax import data
from l2m_jax.config import ModelConfig, UserError
from l2m_jax.data import Dataset, Example, batches, make_example, read_manifest, read_record, write_record
from l2m_jax.tokens import make_layout, windows

MODEL = CONFIG.model


def assert_same(record, other):
    for name, ours, theirs in zip(record._fields, record, other):
        np.testing.assert_array_equal(np.asarray(ours, data.DTYPES.get(name)), theirs, err_msg=name)


def take(dataset, steps, seed=3, batch=4, rows=None):
    stream = batches(dataset, MODEL, seed, batch, steps, rows)
    taken = list(stream)
    stream.close()
    return taken


def assert_equal(batch, other):
    for name, ours, theirs in zip(Example._fields, batch, other):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_record_comes_back_as_it_was(tmp_path):
    record = make_record(0)._replace(
        song="Ünï 曲 🌙", lyrics="[verse]\nла́ луна\n\u2028 x", genre="", word_times=np.ones((6, 3))
    )
    write_record(tmp_path / "a.npz", record, MADE_WITH)
    read, made_with = read_record(tmp_path / "a.npz")
    assert_same(record, read)
    assert made_with == MADE_WITH and type(read.song) is str
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("module, failing", [(Path, "write_bytes"), (os, "replace")])
def test_record_is_whole_or_not_there(tmp_path, monkeypatch, module, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, failing, full)
    with pytest.raises(UserError, match=r"a\.npz: cannot be written .No space left on device"):
        write_record(tmp_path / "a.npz", make_record(0), MADE_WITH)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_record_cut_short_is_said(tmp_path, keep):
    path = tmp_path / "a.npz"
    write_record(path, make_record(0), MADE_WITH)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(UserError, match=r"a\.npz is not a whole record"):
        read_record(path)


def test_record_with_a_flipped_byte_or_of_something_else_is_said(tmp_path):
    path = tmp_path / "a.npz"
    write_record(path, make_record(0, frames=500), MADE_WITH)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a whole record"):
        read_record(path)
    np.savez(path, codes=np.zeros(3))
    with pytest.raises(UserError, match="not a whole record"):
        read_record(path)


def test_packed_songs_come_back_in_order_with_any_name(tmp_path):
    records = [make_record(i)._replace(song=name) for i, name in enumerate(("b", "Ünï 曲 🌙", "a\u2028b", "x" * 200))]
    records[3] = records[3]._replace(lyrics="", genre="  Bossa NOVA ", word_times=np.array([[0, 1, np.nan]]))
    dataset = Dataset(make_prepared(tmp_path / "songs", records))
    assert len(dataset) == 4
    for i, record in enumerate(records):
        assert_same(record, dataset[i])
    assert dataset.made_with == MADE_WITH and dataset.genres == ["bossa nova", "march", "waltz"]
    assert [line["song"] for line in read_manifest(tmp_path / "songs")] == [record.song for record in records]
    assert dataset.frames().tolist() == [30] * 4
    assert sorted(os.listdir(tmp_path / "songs")) == ["dataset", "records", "songs.jsonl"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_packing_again_replaces_and_a_failed_one_leaves_the_old(tmp_path, monkeypatch, error):
    folder = make_prepared(tmp_path / "songs", [make_record(0), make_record(1)])
    paths = [folder / "records" / "song_001.npz"]
    (folder / ".packing").mkdir()  # of a run that was killed

    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(data._Packing, "download_and_prepare", full)
        with pytest.raises(UserError, match="songs cannot be written.*No space left"):
            data.pack(folder, paths, MADE_WITH)
    assert len(Dataset(folder)) == 2 and not (folder / ".packing").exists()
    data.pack(folder, paths, MADE_WITH)
    dataset = Dataset(folder)
    assert len(dataset) == len(dataset.frames()) == 1 and dataset[0].song == "song_001"
    assert not (folder / ".old").exists()


def test_what_is_not_a_dataset_is_said(tmp_path, prepared):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder} is not a prepared dataset; make one with: l2m prepare SONGS"):
            Dataset(folder)
    folder = make_prepared(tmp_path / "songs", [make_record(0)])
    info = folder / "dataset" / "dataset_info.json"
    info.write_text(info.read_text()[:50])
    with pytest.raises(UserError, match="the dataset cannot be read"):
        Dataset(folder)


def test_damage_of_the_packed_songs_is_said(tmp_path):
    folder = make_prepared(tmp_path / "songs", [make_record(i) for i in range(3)])
    (packed,) = folder.glob("dataset/*.array_record*")
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with pytest.raises(UserError, match="songs/dataset is damaged .*; delete it and run l2m prepare again"):
        Dataset(folder)[0]


def test_dataset_of_another_version_is_refused(tmp_path):
    folder = make_prepared(tmp_path / "songs", [make_record(0)], MADE_WITH._replace(version="0.9.0"))
    with pytest.raises(UserError, match=r"was prepared in version 0\.9\.0, this is 1\.0\.0: prepare it again"):
        Dataset(folder)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"codebooks": 3}, "has codebooks 2, model.codebooks is 3: set --model.codebooks 2"),
        ({"entries": 64}, "has entries 16, model.entries is 64"),
        ({"text_width": 24}, "has text_width 12, model.text_width is 24"),
        ({"memory": 7}, "song_000: 6 lyric pieces and 2 genre pieces are 1 more than the 7 .*raise model.memory to 8"),
    ],
)
def test_model_that_does_not_fit_is_refused(prepared, change, says):
    Dataset(prepared).check(MODEL)
    with pytest.raises(UserError, match=says):
        Dataset(prepared).check(ModelConfig(**{**MODEL.__dict__, **change}))


def test_the_memory_cap_names_the_longest_song(tmp_path):
    sizes = ((6, 2), (9, 1), (4, 5))
    records = [make_record(i, pieces=p, genre_pieces=g) for i, (p, g) in enumerate(sizes)]
    dataset = Dataset(make_prepared(tmp_path / "songs", records))
    dataset.check(MODEL)
    with pytest.raises(UserError, match="song_001: 9 lyric pieces and 1 genre pieces are 2 more than the 8"):
        dataset.check(ModelConfig(**{**MODEL.__dict__, "memory": 8}))


def test_codes_of_another_origin_differ_and_names_do_not():
    assert not MADE_WITH.differences(MADE_WITH._replace(codec="elsewhere", text_encoder="elsewhere", text_layer=3))
    for change in ({"codec_fingerprint": "x"}, {"text_fingerprint": "x"}, {"codebooks": 4}, {"version": "2"}):
        (difference,) = MADE_WITH.differences(MADE_WITH._replace(**change))
        assert str(*change.values()) in difference


def test_example_has_genre_then_lyrics_then_padding():
    record = make_record(2, frames=20, pieces=5, genre_pieces=2)
    example = make_example(record, make_layout(MODEL), memory=10)
    assert example.kind.tolist() == [0, 0, 1, 1, 1, 1, 1, -1, -1, -1]
    assert example.position.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 0, 0]
    assert example.section.tolist() == [0, 0, *record.section, 0, 0, 0]
    np.testing.assert_array_equal(example.states[2:7], record.lyric_states.astype(np.float32))
    np.testing.assert_array_equal(example.states[:2], record.genre_states.astype(np.float32))
    assert not example.states[7:].any()
    ids, targets = make_layout(MODEL).encode(record.codes)
    np.testing.assert_array_equal(example.ids, ids)
    np.testing.assert_array_equal(example.targets, targets)


def test_example_without_genre_or_words():
    example = make_example(make_record(0, pieces=0, genre_pieces=0), make_layout(MODEL), memory=4)
    assert example.kind.tolist() == [-1] * 4 and example.states.shape == (4, MADE_WITH.text_width)


def test_starting_at_a_step_is_skipping_to_it(prepared):
    dataset = Dataset(prepared)
    whole = take(dataset, range(0, 7))
    for ours, theirs in zip(take(dataset, range(4, 7)), whole[4:], strict=True):
        assert_equal(ours, theirs)
    assert not take(dataset, range(7, 7))
    other = take(dataset, range(0, 7), seed=4)
    assert any((ours.ids != theirs.ids).any() for ours, theirs in zip(whole, other))


def test_rows_of_processes_make_the_whole_batch(prepared):
    dataset = Dataset(prepared)
    parts = [take(dataset, range(2, 4), rows=rows) for rows in ([0], [1, 2, 3])]
    for whole, *pieces in zip(take(dataset, range(2, 4)), *parts, strict=True):
        assert_equal(whole, [np.concatenate(columns) for columns in zip(*pieces)])


def test_every_epoch_has_every_song_once_in_another_order(prepared):
    dataset = Dataset(prepared)
    songs = {dataset[i].lyric_states.tobytes(): i for i in range(8)}
    seen = [
        songs[row[2:8].astype(np.float16).tobytes()] for b in take(dataset, range(0, 6)) for row in b.states
    ]  # 6 steps of 4 are 3 epochs
    epochs = [seen[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_may_span_epochs(prepared):
    (batch,) = take(Dataset(prepared), range(1, 2), batch=6)
    assert batch.ids.shape == (6, make_layout(MODEL).positions, 2)


def test_lines_of_the_manifest(prepared):
    lines = [json.loads(line) for line in (prepared / "songs.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "song": "song_001", "source": f"{1:016x}", "genre": "waltz", "seconds": 0.32, "frames": 24, "pieces": 6,
        "words_timed": 0,
    }  # fmt: skip


def test_songs_of_like_length_stand_together(prepared, tmp_path):
    """Eight songs of 20 to 48 frames in batches of two, the window (40) in four parts."""
    dataset, steps = Dataset(prepared), 2 * data.ALIKE
    stream = batches(dataset, MODEL, 3, 2, range(steps), None, 4)
    taken = list(stream)
    stream.close()
    layouts, lengths, said = windows(make_layout(MODEL), 4), [], []
    assert [layout.frames for layout in layouts] == [10, 20, 30, 40]
    for batch in taken:
        frames = [int((targets[:, 0] < layouts[0].bos).sum()) for targets in batch.targets]
        smallest = next(layout for layout in layouts if max(frames) <= layout.frames)
        assert batch.ids.shape == (2, smallest.positions, 2) == batch.targets.shape
        lengths.append(frames)
        said += [tuple(targets[:5, 0]) for targets in batch.targets]
    for half in (slice(0, data.ALIKE), slice(data.ALIKE, None)):  # each stretch by itself
        inside = sorted(lengths[half])
        assert all(max(a) <= min(b) for a, b in itertools.pairwise(inside)) and lengths[half] != inside
    whole = [tuple(targets[:5, 0]) for batch in take(dataset, range(steps), batch=2) for targets in batch.targets]
    half = len(said) // 2
    assert sorted(said[:half]) == sorted(whole[:half]) and sorted(said[half:]) == sorted(whole[half:])
    part = batches(dataset, MODEL, 3, 2, range(5, 7), [1], 4)
    for ours, theirs in zip(part, taken[5:7]):  # any process, from any step
        assert_equal(ours, Example(*(x[1:] for x in theirs)))
    part.close()
