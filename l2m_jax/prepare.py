"""From a folder of songs to a prepared dataset. After `encoders`, before `attention`.

`prepare_songs` is all that is done to a song: read, encode, write one atomic record; it says what became of it. Here it
runs in this process or in several; `beam` runs it on a cluster. A rerun does only what is missing or has changed; then
the records are packed. Songs are read where they are encoded, and only their names and outcomes are kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from l2m_jax.audio import audio_seconds, read_audio, write_atomic
from l2m_jax.codec import Codec
from l2m_jax.config import UserError
from l2m_jax.data import Dataset, MadeWith, Record, pack, read_manifest, read_record, write_record
from l2m_jax.encoders import Encoders, encode_sounds, signature, together
from l2m_jax.lyrics import TextEncoder, encode_genre, encode_text, parse_lyrics, split_pieces, unknown_warning
from l2m_jax.originals import TorchCodec
from l2m_jax.progress import Bar, say
from l2m_jax.songs import AUDIO, BadSong, Song, check_times, read_song, song_folders, song_id

WARNINGS = 20
"""Warnings that are printed; report.json has all of them."""


class Outcome(NamedTuple):
    """What became of a song."""

    song: str
    source: str = ""
    """Hash of the files that its record was made of; empty where it was left out."""
    new: bool = False
    """Whether the record was made now."""
    reason: str = ""
    """Why the song was left out."""
    warnings: tuple[str, ...] = ()


class Prepared(NamedTuple):
    """What a preparation did."""

    songs: int
    new: int
    left_out: list[BadSong]
    warnings: list[str]
    gone: list[str]
    """Songs that have a record and no folder any more: not packed."""


class Workshop(NamedTuple):
    """All that a song needs to become a record."""

    records: Path
    codec: Codec | TorchCodec
    encoder: TextEncoder
    made_with: MadeWith


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


def make_record(song: Song, source: str, seconds: float, codes: Int[np.ndarray, "F K"], encoder: TextEncoder) -> Record:
    """The record of a song whose sound is encoded already."""
    text = encode_text(encoder, parse_lyrics(song.lyrics, "lyrics.txt"))
    return Record(
        song=song.id,
        lyrics=song.lyrics,
        genre=song.genre,
        source=source,
        seconds=np.asarray(seconds, np.float32),
        codes=codes,
        lyric_states=text.states,
        genre_states=encode_genre(encoder, song.genre),
        section=text.section,
        word=text.word,
        word_times=np.zeros((0, 3), np.float32) if song.word_times is None else song.word_times,
    )


def prepare_songs(folders: Sequence[Path], shop: Workshop) -> list[Outcome]:
    """Makes the records of songs that have none, or one of other files or encoders; their sounds are one batch.

    A song that cannot be used is an outcome with its reason. UserError where a record cannot be written.
    """
    outcomes: list[Outcome] = []
    songs: list[Song] = []
    sounds: list[Float[np.ndarray, "_ ..."]] = []
    for folder in folders:
        name, path = song_id(folder), shop.records / f"{folder.name}.npz"
        try:
            song = read_song(folder)
            source = source_hash(song)
            parsed = parse_lyrics(song.lyrics, f"{name}/lyrics.txt")
            unknown = unknown_warning(shop.encoder, split_pieces(shop.encoder, parsed), f"{name}/lyrics.txt")
            new = not _is_done(path, source, shop.made_with)
            if new:
                sound = read_audio(song.audio, shop.codec.rate, shop.codec.channels)
                check_times(song, len(sound) / shop.codec.rate)
                sounds.append(sound)
                songs.append(song)
            outcomes.append(Outcome(name, source, new, warnings=(*parsed.warnings, *unknown)))
        except UserError as error:
            outcomes.append(Outcome(name, reason=str(error)))
    made = (outcome for outcome in outcomes if outcome.new)
    for outcome, song, sound, codes in zip(made, songs, sounds, encode_sounds(shop.codec, sounds)):
        record = make_record(song, outcome.source, len(sound) / shop.codec.rate, codes, shop.encoder)
        write_record(shop.records / f"{song.id}.npz", record, shop.made_with)
    return outcomes


def open_shop(out: Path, encoders: Encoders) -> tuple[Workshop, Dataset | None]:
    """Encoders and the folder of records; and what was packed before, if it can be read.

    UserError where `out` cannot be written or was prepared with other encoders.
    """
    codec, encoder = encoders.load()
    shop = Workshop(out / "records", codec, encoder, signature(encoders, codec, encoder))
    try:
        shop.records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    try:
        packed = Dataset(out)
    except UserError:  # there is none, or one that must be packed again
        return shop, None
    if apart := packed.made_with.differences(shop.made_with):
        way = "name another folder"
        if packed.made_with.text_layer != encoders.text_layer:
            way += f", or prepare with the same --text-layer {packed.made_with.text_layer}"
        raise UserError(f"{out} was prepared with another origin ({'; '.join(apart)}): {way}")
    return shop, packed


def similar(folders: Sequence[Path], size: int) -> Iterator[tuple[Path, ...]]:
    """Batches of `size` songs; where that is more than one, of similar length: sorted by it, some batches at a time."""

    def seconds(folder: Path) -> float:
        try:
            return max(audio_seconds(path) for path in folder.iterdir() if path.suffix.lower() in AUDIO)
        except (UserError, OSError, ValueError):  # what is wrong with it is said when it is read
            return 0.0

    for start in range(0, len(folders), 32 * size):
        some = folders[start : start + 32 * size]
        some = sorted(some, key=seconds) if size > 1 else some
        yield from (tuple(some[i : i + size]) for i in range(0, len(some), size))


def prepare(
    folder: Path,
    out: Path,
    encoders: Encoders | None = None,
    workers: int = 1,
    console: Console | None = None,
    shard: tuple[int, int] | None = None,
) -> Prepared:
    """Prepares every song of `folder` into `out`; songs that cannot be are named in the result and in report.json.

    With `shard` (i, n), only the records of the i-th of n parts are made, counted from 1: one machine's share. Without
    it, what is missing is made and everything is packed. UserError where there are no songs at all, `out` cannot be
    written or was prepared with other encoders.
    """
    console, encoders = console or Console(), encoders or Encoders()
    if workers < 1:
        raise UserError(f"--workers is {workers}; allowed: 1 and above")
    folders = song_folders(folder)
    if shard:
        if not 1 <= shard[0] <= shard[1]:
            raise UserError(f"--shard is {shard[0]}/{shard[1]}; allowed: 1/N to N/N")
        folders = folders[shard[0] - 1 :: shard[1]]
    shop, packed = open_shop(out, encoders)
    if not shard:  # another machine may be writing these
        for stale in shop.records.glob(".*.npz.*"):  # of a run that was killed
            stale.unlink(missing_ok=True)

    batches = similar(folders, together(shop.codec))
    if workers == 1 or len(folders) < 2:
        results = (prepare_songs(batch, shop) for batch in batches)
    else:
        results = _in_processes(batches, out, encoders, min(workers, len(folders)))
    outcomes, warned = [], 0
    with Bar(console, "preparing songs", len(folders), "songs") as bar:
        for outcome in itertools.chain.from_iterable(results):
            outcomes.append(outcome)
            for warning in outcome.warnings[: max(WARNINGS - warned, 0)]:
                say(console, f"warning: {warning}")
            warned += len(outcome.warnings)
            bar.update(len(outcomes))
    if warned > WARNINGS:
        say(console, f"{warned - WARNINGS} more warnings: report.json in {out} lists them once the songs are packed")
    place = {song_id(path): i for i, path in enumerate(folders)}
    outcomes.sort(key=lambda outcome: place[outcome.song])  # as workers finish, so they come
    if shard:
        return summary(outcomes, [])
    done = report(folder, out, outcomes)
    kept = [outcome for outcome in outcomes if not outcome.reason]
    if packed is None or [(x["song"], x["source"]) for x in read_manifest(out)] != [(o.song, o.source) for o in kept]:
        paths = [shop.records / f"{outcome.song}.npz" for outcome in kept]
        _check_room(out, paths)
        pack(out, paths, shop.made_with)
    return done


def summary(outcomes: Iterable[Outcome], gone: list[str]) -> Prepared:
    """Outcomes, counted and gathered."""
    outcomes = list(outcomes)
    left_out = [BadSong(o.song, o.reason) for o in outcomes if o.reason]
    warnings = [warning for outcome in outcomes for warning in outcome.warnings]
    return Prepared(len(outcomes) - len(left_out), sum(o.new for o in outcomes), left_out, warnings, gone)


def report(folder: Path, out: Path, outcomes: Sequence[Outcome]) -> Prepared:
    """Writes report.json of a whole folder. UserError where not one song is left."""
    there = {outcome.song for outcome in outcomes}
    gone = sorted(path.stem for path in (out / "records").glob("*.npz") if path.stem not in there)
    done = summary(outcomes, gone)
    content = done._asdict() | {"left_out": [bad.__dict__ for bad in done.left_out]}
    del content["new"]
    write_atomic(out / "report.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    if not done.songs:
        reasons = "; ".join(f"{b.id}: {b.reason}" for b in done.left_out[:5])
        raise UserError(f"{folder}: not one song could be prepared ({reasons})")
    return done


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


_shop: Workshop | None = None  # of a worker process


def _start_worker(out: Path, encoders: Encoders, parent: int) -> None:
    global _shop

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # a parent that was killed must not leave workers behind

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _shop = open_shop(out, encoders)[0]


def _work(folders: tuple[Path, ...]) -> list[Outcome]:
    assert _shop is not None  # _start_worker has run
    return prepare_songs(folders, _shop)


def _in_processes(
    batches: Iterator[tuple[Path, ...]], out: Path, encoders: Encoders, workers: int
) -> Iterator[list[Outcome]]:
    context = multiprocessing.get_context("spawn")  # JAX has threads: a fork would deadlock
    pool = ProcessPoolExecutor(workers, context, _start_worker, (out, encoders, os.getpid()))
    waiting: set[Future[list[Outcome]]] = set()
    try:
        for batch in batches:
            waiting.add(pool.submit(_work, batch))
            if len(waiting) == 4 * workers:  # a million songs must not stand in line
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(waiting))
    except BrokenProcessPool:
        raise UserError(
            "a worker died (out of memory?); finished songs are kept: run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
