"""From a folder of songs to a prepared dataset. After `data`, before `attention`.

Workers write one atomic record a song; a rerun does only what is missing or has changed; then the records are packed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from l2m_jax.audio import read_audio, write_atomic
from l2m_jax.codec import Codec, encode
from l2m_jax.config import UserError
from l2m_jax.data import VERSION, Dataset, MadeWith, Record, pack, read_manifest, read_record, write_record
from l2m_jax.lyrics import TextEncoder, encode_genre, encode_text, parse_lyrics
from l2m_jax.progress import Bar, say
from l2m_jax.songs import BadSong, Song, scan_songs
from l2m_jax.weights import load_codec, load_text_encoder


class Encoders(NamedTuple):
    """Names of what turns sound and text into records, as `weights` takes them."""

    codec: str = "solfege"
    codebooks: int | None = None
    text_encoder: str = "minilm"
    text_layer: int = -1

    def load(self) -> tuple[Codec, TextEncoder]:
        """Both, loaded."""
        return load_codec(self.codec, self.codebooks), load_text_encoder(self.text_encoder, self.text_layer)


class Prepared(NamedTuple):
    """What a preparation did."""

    songs: int
    new: int
    left_out: list[BadSong]
    warnings: list[str]


def signature(encoders: Encoders, codec: Codec, encoder: TextEncoder) -> MadeWith:
    """What records made by these carry."""

    def place(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).is_dir() else name

    return MadeWith(
        version=VERSION,
        codec=place(encoders.codec),
        codec_fingerprint=codec.fingerprint,
        text_encoder=place(encoders.text_encoder),
        text_layer=encoders.text_layer,
        text_fingerprint=encoder.fingerprint,
        codebooks=codec.codebooks,
        entries=codec.entries,
        text_width=encoder.width,
    )


def source_hash(song: Song) -> str:
    """Of every file that the record depends on. UserError where one cannot be read."""
    digest = hashlib.sha256()
    for path in (song.folder / "lyrics.txt", song.folder / "genre.txt", song.folder / "words.csv", song.audio):
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def make_record(song: Song, codec: Codec, encoder: TextEncoder) -> Record:
    """Sound and text of one song, encoded. UserError where its audio or lyrics cannot be read."""
    samples = read_audio(song.audio, codec.rate)
    text = encode_text(encoder, parse_lyrics(song.lyrics, "lyrics.txt"))
    times = song.word_times
    return Record(
        song=song.id,
        lyrics=song.lyrics,
        genre=song.genre,
        source=source_hash(song),
        seconds=np.asarray(len(samples) / codec.rate, np.float32),
        codes=encode(codec, samples),
        lyric_states=text.states,
        genre_states=encode_genre(encoder, song.genre),
        section=text.section,
        word=text.word,
        word_times=np.zeros((0, 3), np.float32) if times is None else times,
    )


def prepare(
    folder: Path, out: Path, encoders: Encoders | None = None, workers: int = 1, console: Console | None = None
) -> Prepared:
    """Prepares every song of `folder` into `out`; songs that cannot be are named in the result and in report.json.

    UserError where there are no songs at all, `out` cannot be written or was prepared with other encoders.
    """
    console, encoders = console or Console(), encoders or Encoders()
    if workers < 1:
        raise UserError(f"--workers is {workers}; allowed: 1 and above")
    songs, left_out = scan_songs(folder)
    warnings = [f"{s.id}/{w}" for s in songs for w in parse_lyrics(s.lyrics, "lyrics.txt").warnings]
    for line in warnings:
        say(console, f"warning: {line}")
    codec, encoder = encoders.load()
    made_with = signature(encoders, codec, encoder)
    records = out / "records"
    try:
        records.mkdir(parents=True, exist_ok=True)
        for stale in records.glob(".*.npz.*"):  # of a run that was killed
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    packed = _open_packed(out)
    if packed is not None and (apart := packed.made_with.differences(made_with)):
        raise UserError(f"{out} was prepared with another origin ({'; '.join(apart)}): name another folder")

    sources: dict[str, str] = {}
    for song in songs:
        try:
            sources[song.id] = source_hash(song)
        except UserError as error:
            left_out.append(BadSong(song.id, str(error)))
    songs = [song for song in songs if song.id in sources]
    paths = {song.id: records / f"{song.id}.npz" for song in songs}
    missing = [song for song in songs if not _is_done(paths[song.id], sources[song.id], made_with)]
    if len(missing) < len(songs):
        say(console, f"{len(songs) - len(missing)} of {len(songs)} songs are prepared already")
    with Bar(console, "preparing songs", len(missing), "songs") as bar:
        if workers == 1 or len(missing) < 2:
            results = (_work(s, paths[s.id], codec, encoder, made_with) for s in missing)
        else:
            results = _work_in_processes(missing, paths, encoders, made_with, workers)
        for done, bad in enumerate(results, 1):
            bar.update(done)
            if bad is not None:
                left_out.append(bad)

    bad_ids = {bad.id for bad in left_out}
    kept = [song.id for song in songs if song.id not in bad_ids]
    report = {
        "songs": len(kept),
        "left_out": [b.__dict__ for b in left_out],
        "warnings": warnings,
    }
    write_atomic(out / "report.json", (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    if not kept:
        reasons = "; ".join(f"{b.id}: {b.reason}" for b in left_out[:5])
        raise UserError(f"{folder}: not one song could be prepared ({reasons})")
    if packed is None or [(x["song"], x["source"]) for x in read_manifest(out)] != [(i, sources[i]) for i in kept]:
        _check_room(out, [paths[i] for i in kept])
        pack(out, [paths[i] for i in kept], made_with)
    return Prepared(len(kept), sum(song.id not in bad_ids for song in missing), left_out, warnings)


def _open_packed(out: Path) -> Dataset | None:
    """The dataset of a preparation before; None where there is none, or one that must be packed again."""
    try:
        return Dataset(out)
    except UserError:
        return None


def _check_room(out: Path, records: list[Path]) -> None:
    """Packing a full disk fails half-way in another library's words; said here in ours."""
    needed, free = sum(p.stat().st_size for p in records), shutil.disk_usage(out).free
    if free < needed:
        raise UserError(f"{out}: packing needs {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free")


def _is_done(path: Path, source: str, made_with: MadeWith) -> bool:
    try:
        record, theirs = read_record(path)
    except UserError:
        return False
    return not theirs.differences(made_with) and record.source == source


def _work(song: Song, path: Path, codec: Codec, encoder: TextEncoder, made_with: MadeWith) -> BadSong | None:
    try:
        record = make_record(song, codec, encoder)
    except UserError as error:
        path.unlink(missing_ok=True)
        return BadSong(song.id, str(error))
    write_record(path, record, made_with)
    return None


_loaded: tuple[Codec, TextEncoder] | None = None  # of a worker process


def _start_worker(encoders: Encoders, parent: int) -> None:
    global _loaded

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a parent that was killed must not leave workers behind

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _loaded = encoders.load()


def _work_in_worker(song: Song, path: Path, made_with: MadeWith) -> BadSong | None:
    assert _loaded is not None  # _start_worker has run
    return _work(song, path, *_loaded, made_with)


def _work_in_processes(
    songs: list[Song], paths: dict[str, Path], encoders: Encoders, made_with: MadeWith, workers: int
) -> Iterator[BadSong | None]:
    context = multiprocessing.get_context("spawn")  # JAX has threads: a fork would deadlock
    pool = ProcessPoolExecutor(min(workers, len(songs)), context, _start_worker, (encoders, os.getpid()))
    try:
        futures = [pool.submit(_work_in_worker, s, paths[s.id], made_with) for s in songs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker died (out of memory?); finished songs are kept: run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
