"""Preparation: what it leaves, what it says of bad songs, and that a rerun does only what is missing."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from l2m_jax import prepare as module
from l2m_jax.audio import audio_seconds
from l2m_jax.codec import encode
from l2m_jax.config import UserError
from l2m_jax.data import Dataset, read_manifest, read_record
from l2m_jax.lyrics import encode_genre, encode_text, parse_lyrics
from l2m_jax.prepare import prepare
from l2m_jax.songs import read_song

NAMES = [f"song_{i:04d}" for i in range(1, 7)]


@pytest.fixture
def mine(tmp_path, songs, sung):
    """Songs and their preparation, to be changed."""
    shutil.copytree(songs, tmp_path / "songs")
    shutil.copytree(sung, tmp_path / "out")
    return tmp_path / "songs", tmp_path / "out"


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "records").glob("*.npz")}


def order(out: Path) -> list[str]:
    dataset = Dataset(out)
    listed = [line["song"] for line in read_manifest(out)]
    assert listed == [dataset[i].song for i in range(len(dataset))]
    return listed


def test_songs_become_records_that_hold_all_of_them(songs, sung, encoders):
    assert sorted(os.listdir(sung)) == ["dataset", "records", "report.json", "songs.jsonl"]
    report = {"songs": 6, "left_out": [], "warnings": [], "gone": []}
    assert json.loads((sung / "report.json").read_text()) == report
    assert order(sung) == NAMES
    codec, encoder = encoders.load()
    song, record = read_song(songs / "song_0003"), Dataset(sung)[2]
    samples = module.read_audio(song.audio, 24_000)
    np.testing.assert_array_equal(record.codes, encode(codec, samples))
    assert record.seconds == np.float32(len(samples) / 24_000) and len(record.codes) == -(-len(samples) // 320)
    text = encode_text(encoder, parse_lyrics(song.lyrics))
    np.testing.assert_allclose(record.lyric_states, text.states, atol=2e-3)  # stored as float16
    np.testing.assert_allclose(record.genre_states, encode_genre(encoder, song.genre), atol=2e-3)
    np.testing.assert_array_equal(record.word, text.word)
    np.testing.assert_array_equal(record.section, text.section)
    np.testing.assert_array_equal(record.word_times, song.word_times)
    assert (record.lyrics, record.genre) == (song.lyrics, song.genre)
    made = Dataset(sung).made_with
    assert (made.codec, made.codebooks, made.entries, made.text_width) == ("solfege", 2, 1024, 16)
    assert made.codec_fingerprint == codec.fingerprint and made.text_fingerprint == encoder.fingerprint


def test_a_rerun_does_nothing_new(mine, encoders):
    songs, out = mine
    before, packed = stamps(out), (out / "dataset").stat().st_mtime_ns
    done = prepare(songs, out, encoders)
    assert (done.songs, done.new, done.left_out) == (6, 0, [])
    assert stamps(out) == before and (out / "dataset").stat().st_mtime_ns == packed


def test_only_a_song_that_changed_is_prepared_again(mine, encoders):
    songs, out = mine
    before = stamps(out)
    (songs / "song_0002" / "lyrics.txt").write_text("sol la\n")
    (songs / "song_0002" / "words.csv").unlink()
    (songs / "song_0004" / "genre.txt").write_text("polka\n")
    done = prepare(songs, out, encoders)
    assert (done.songs, done.new) == (6, 2) and order(out) == NAMES
    assert Dataset(out)[1].lyrics == "sol la\n" and "polka" in Dataset(out).genres
    assert {name for name, stamp in stamps(out).items() if stamp != before[name]} == {"song_0002.npz", "song_0004.npz"}


def test_what_was_added_and_removed_shows(mine, encoders):
    songs, out = mine
    (songs / "song_0001").rename(songs / "song_0009")
    (songs / "song_0003").rename(songs.parent / "away")
    done = prepare(songs, out, encoders)
    assert (done.songs, done.new, done.gone) == (5, 1, ["song_0001", "song_0003"])
    assert json.loads((out / "report.json").read_text())["gone"] == done.gone
    assert order(out) == ["song_0002", "song_0004", "song_0005", "song_0006", "song_0009"]
    (songs / "song_0009").rename(songs.parent / "elsewhere")
    (songs.parent / "away").rename(songs / "song_0003")  # its record still stands, and the number of songs is the same
    assert prepare(songs, out, encoders).new == 0
    assert order(out) == NAMES[1:]


def test_bad_songs_are_named_and_the_others_go_on(mine, encoders):
    songs, out = mine
    (songs / "song_0001" / "lyrics.txt").unlink()
    (songs / "song_0002" / "audio.flac").unlink()
    shutil.copy(songs / "song_0003" / "audio.flac", songs / "song_0003" / "again.FLAC")
    (songs / "song_0004" / "audio.flac").write_bytes(b"this is no sound" * 99)
    (songs / "song_0005" / "lyrics.txt").write_bytes("corazón".encode("latin-1"))
    (songs / ("x" * 220)).mkdir()
    (songs / "song_0006" / "lyrics.txt").write_text("[laughs]\nla\n")
    (songs / "song_0006" / "words.csv").unlink()
    for _ in range(2):  # a song that stays bad is no new song
        done = prepare(songs, out, encoders)
        assert (done.songs, order(out)) == (1, ["song_0006"])
        report = json.loads((out / "report.json").read_text())
        reasons = {bad["id"]: bad["reason"] for bad in report["left_out"]}
        assert reasons == {bad.id: bad.reason for bad in done.left_out} and len(reasons) == 6
        for name, reason in (
            ("song_0001", "lyrics.txt is missing"),
            ("song_0002", "one audio file is needed"),
            ("song_0003", "found: again.FLAC, audio.flac"),
            ("song_0004", "audio.flac: cannot be read as mp3, flac, ogg or wav"),
            ("song_0005", "lyrics.txt: byte 5 is not UTF-8; save the file as UTF-8"),
            ("x" * 220, "longer than 200 bytes"),
        ):
            assert reason in reasons[name] and "\n" not in reasons[name]
        assert report["warnings"] == done.warnings
        assert "song_0006/lyrics.txt, line 1: section tag [laughs] is not known" in done.warnings[0]
    assert done.new == 0


def test_times_beyond_the_sound_leave_a_song_out(mine, encoders):
    songs, out = mine
    path = songs / NAMES[2] / "words.csv"
    header, *rows = path.read_text().splitlines()
    in_ms = [",".join(str(1000 * float(cell)) for cell in row.split(",")) for row in rows]
    path.write_text("\n".join([header, *in_ms]) + "\n")
    done = prepare(songs, out, encoders)
    ((name, reason),) = ((bad.id, bad.reason) for bad in done.left_out)
    assert name == NAMES[2] and "words.csv, line " in reason and "is after the sound's end at" in reason


def test_a_file_that_cannot_be_read_leaves_its_song_out(mine, encoders, monkeypatch):
    songs, out = mine
    read = Path.read_bytes

    def guarded(path):
        if path.parent.name == "song_0002" and path.name == "audio.flac":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    done = prepare(songs, out, encoders)
    assert done.songs == 5 and "song_0002/audio.flac cannot be read: Permission denied" in done.left_out[0].reason


def test_not_one_song_is_an_error(tmp_path, encoders):
    (tmp_path / "songs" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not one song could be prepared \(a: lyrics.txt is missing\)"):
        prepare(tmp_path / "songs", tmp_path / "out", encoders)
    assert not (tmp_path / "out" / "dataset").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["songs"] == 0
    with pytest.raises(UserError, match="no song folders"):
        prepare(tmp_path / "songs" / "a", tmp_path / "out", encoders)
    with pytest.raises(UserError, match="--workers is 0"):
        prepare(tmp_path / "songs", tmp_path / "out", encoders, workers=0)


@pytest.mark.parametrize("change", [{"text_layer": 1}, {"codebooks": 1}])
def test_another_origin_is_refused_and_changes_nothing(mine, encoders, change):
    songs, out = mine
    before = stamps(out)
    with pytest.raises(UserError, match=r"out was prepared with another origin \(.*\): name another folder") as caught:
        prepare(songs, out, encoders._replace(**change))
    assert str(caught.value).endswith("--text-layer 2") == ("text_layer" in change)
    assert stamps(out) == before and order(out) == NAMES


def test_a_damaged_record_or_dataset_is_made_again(mine, encoders):
    songs, out = mine
    record = out / "records" / "song_0002.npz"
    record.write_bytes(record.read_bytes()[:1000])
    (out / "dataset" / "dataset_info.json").unlink()
    assert prepare(songs, out, encoders).new == 1
    assert order(out) == NAMES and read_record(record)[0].song == "song_0002"


def test_killed_between_records_and_dataset(mine, encoders, monkeypatch):
    """A run that ended after its last record and before packing: the old dataset is not taken for the new one."""
    songs, out = mine
    (songs / "song_0002" / "genre.txt").write_text("polka\n")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "pack", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(songs, out, encoders)
    assert prepare(songs, out, encoders).new == 0
    assert Dataset(out)[1].genre == "polka"


def test_folder_that_cannot_be_written(tmp_path, songs, encoders):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"{out} cannot be written"):
            prepare(songs, out, encoders)


def test_full_disk_leaves_no_half_record(tmp_path, songs, encoders, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="song_0003.npz: cannot be written .No space left on device"):
            prepare(songs, tmp_path / "out", encoders)
    assert sorted(os.listdir(tmp_path / "out" / "records")) == ["song_0001.npz", "song_0002.npz"]
    assert not (tmp_path / "out" / "dataset").exists()
    assert prepare(songs, tmp_path / "out", encoders).new == 4 and order(tmp_path / "out") == NAMES


def test_no_room_to_pack_is_said_before(mine, encoders, monkeypatch):
    songs, out = mine
    (songs / "song_0006").rename(songs.parent / "away")
    usage = shutil.disk_usage(out)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="packing needs 0 MiB, the disk has 0 MiB free"):
        prepare(songs, out, encoders)
    assert order(out) == NAMES


def test_parts_of_several_machines_make_the_whole(tmp_path, songs, sung, encoders):
    shutil.copytree(songs, tmp_path / "songs")
    (tmp_path / "songs" / "song_0007").mkdir()
    out, made = tmp_path / "out", []
    for i in (2, 1, 3):
        (out / "records").mkdir(parents=True, exist_ok=True)
        part = out / "records" / ".song_0004.npz.123"  # another machine is writing it
        part.touch()
        done = prepare(tmp_path / "songs", out, encoders, shard=(i, 3))
        assert part.exists() and not (out / "dataset").exists()
        made.append((done.songs, done.new, [bad.id for bad in done.left_out]))
    assert made == [(2, 2, []), (2, 2, ["song_0007"]), (2, 2, [])]
    before = stamps(out)
    done = prepare(tmp_path / "songs", out, encoders)
    assert (done.songs, done.new, len(done.left_out)) == (6, 0, 1) and stamps(out) == before and not part.exists()
    assert order(out) == NAMES and read_manifest(out) == read_manifest(sung)
    assert prepare(tmp_path / "songs", tmp_path / "more", encoders, shard=(9, 9)).songs == 0  # more machines than songs
    for shard in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(UserError, match=r"--shard is \d/\d; allowed: 1/N to N/N"):
            prepare(tmp_path / "songs", out, encoders, shard=shard)


def test_songs_of_similar_length_are_a_batch_with_the_same_records(tmp_path, songs, sung, encoders, monkeypatch):
    def seconds(folder):
        return audio_seconds(folder / "audio.flac")

    folders = [songs / name for name in NAMES]
    batches = list(module.similar(folders, 4))
    assert [len(batch) for batch in batches] == [4, 2]
    assert max(map(seconds, batches[0])) <= min(map(seconds, batches[1]))
    assert list(module.similar([*folders, tmp_path / "none"], 1)) == [(f,) for f in [*folders, tmp_path / "none"]]

    shutil.copytree(songs, tmp_path / "songs")
    (tmp_path / "songs" / "song_0003" / "audio.flac").write_bytes(b"no sound" * 99)
    monkeypatch.setattr(module, "together", lambda codec: 4)
    done = prepare(tmp_path / "songs", tmp_path / "out", encoders)
    assert (done.songs, [bad.id for bad in done.left_out]) == (5, ["song_0003"])
    single, batched = Dataset(sung), Dataset(tmp_path / "out")
    for i, name in enumerate(order(tmp_path / "out")):
        alone = single[NAMES.index(name)]
        assert batched[i].source == alone.source and len(batched[i].codes) == len(alone.codes)
        assert np.mean(batched[i].codes == alone.codes) > 0.999  # sums are taken in another order
        np.testing.assert_array_equal(batched[i].lyric_states, alone.lyric_states)


def test_lyrics_that_the_text_encoder_cannot_read_are_told(mine, encoders, capsys):
    songs, out = mine
    (songs / "song_0002" / "lyrics.txt").write_text("la sol 夢 花 la sol\n")
    (songs / "song_0002" / "words.csv").unlink()
    done = prepare(songs, out, encoders)
    assert len(done.warnings) == 1
    assert "song_0002/lyrics.txt: 33% of the pieces are unknown to the text encoder bert" in done.warnings[0]
    assert "--text-encoder bert-base-multilingual-cased" in capsys.readouterr().out
    assert prepare(songs, out, encoders).warnings == done.warnings  # a rerun tells the same


def test_a_flood_of_warnings_is_counted(mine, encoders, capsys, monkeypatch):
    songs, out = mine
    monkeypatch.setattr(module, "WARNINGS", 2)
    for i in (1, 2, 3, 4):
        (songs / f"song_000{i}" / "lyrics.txt").write_text("[laughs]\nla\n")
        (songs / f"song_000{i}" / "words.csv").unlink()
    assert len(prepare(songs, out, encoders).warnings) == 4
    said = capsys.readouterr().out
    assert said.count("[laughs]") == 2 and "2 more warnings" in said


def test_a_killed_run_goes_on_where_it_was(tmp_path, songs, sung, encoders):
    """SIGKILL in the middle of two workers: they leave too, and what was finished is neither lost nor redone."""
    many, out = tmp_path / "songs", tmp_path / "out"
    for i in range(4):
        for name in NAMES:
            shutil.copytree(songs / name, many / f"{name}_{i}")
    command = [sys.executable, "-m", "l2m_jax.cli", "prepare", many, out, "--workers", "2"]
    command += ["--text-encoder", encoders.text_encoder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not stamps(out) and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        process.send_signal(signal.SIGKILL)
        said = process.communicate(timeout=60)[0]  # ends when the last process that can write to the pipe has
    before = stamps(out)
    assert process.returncode == -signal.SIGKILL and 0 < len(before) < 24, said
    assert not (out / "dataset").exists()

    done = prepare(many, out, encoders)
    assert (done.songs, done.new, done.left_out) == (24, 24 - len(before), [])
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    assert len(order(out)) == 24 and not list((out / "records").glob(".*"))
    single, dataset = Dataset(sung), Dataset(out)
    for i in range(24):  # whoever made it
        assert dataset[i].source == single[i // 4].source
        np.testing.assert_array_equal(dataset[i].codes, single[i // 4].codes)
