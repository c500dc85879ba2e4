"""What `l2m generate` and `l2m decode` do: a song, its stream, variations, a file of requests. After `singer`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from l2m_jax.audio import pcm16, to_mono, wav_header, write_wav
from l2m_jax.codec import decode
from l2m_jax.compiled import compiling
from l2m_jax.config import UserError
from l2m_jax.ecdc import read_ecdc
from l2m_jax.lrc import labels, read_reading, time_words, write_lrc
from l2m_jax.picture import draw_file, draw_spectrograms
from l2m_jax.progress import Bar, say
from l2m_jax.request import Line, Request, pack, read_requests
from l2m_jax.singer import Singer, Stream, Task, decode_song, make_task, sing
from l2m_jax.song import Song, check_output, read_npz, write_json
from l2m_jax.stop import StopSignal
from l2m_jax.weights import load_codec


def sing_one(
    singer: Singer, request: Request, out: Path | None, picture: bool, stop: StopSignal, lrc: bool = False
) -> None:
    """Sings into OUT.wav and the files beside it; without `out`, into standard output.

    If asked for, OUT.lrc tells when each word is sung, and a picture shows it, with the words where that is known.

    `stop` ends the song where it is: the files, or the sound in the pipe, are then of what was sung.
    """
    console = Console(stderr=out is None)
    stream, rate, seconds = Stream(singer, request, lambda: stop.by), singer.codec.rate, 0.0
    if out is None:
        sys.stdout.buffer.write(wav_header(rate, singer.codec.channels))
    with Bar(console, "singing", round(stream.limit, 1), "s at most") as bar:
        for _, samples in stream:
            if out is None:
                sys.stdout.buffer.write(pcm16(samples))
                sys.stdout.buffer.flush()
            seconds += len(samples) / rate
            bar.update(round(seconds, 1))
    song = stream.song()
    warnings, words = song.about["warnings"], []
    if out is not None:
        song.save(out)
        if lrc or (picture and read_reading(singer.run)):
            times, warnings = time_words(singer, song.codes, request.lyrics, request.genre)
            words = labels(request.lyrics, times)
            if lrc:
                write_lrc(out.with_suffix(".lrc"), request.lyrics, times)
            if not song.ended:
                warnings.append("the song was cut: words that were not sung any more stand at its end")
        if picture and len(song.codes):
            draw_file(out, request.lyrics, words)
    for warning in warnings:
        say(console, f"warning: {warning}")
    took = song.about["timings_s"]
    say(
        console,
        f"{out or 'standard output'}: {song.seconds:.1f} s, {song.about['cut'] or 'ended by itself'}; "
        f"{_speed([song], took)}, first sound after {took['first_sound']:.1f} s",
    )


def sing_variations(singer: Singer, request: Request, count: int, batch: int, out: Path, stop: StopSignal) -> None:
    """Sings `count` songs of one request and its seed, seed + 1, ..., and ranks them by the model's own likelihood.

    OUT_1.wav, with its other files, is the likeliest; OUT.png shows all. At most `batch` are sung at the same time.
    After `stop` they are as far as they were sung.
    """
    began, compiled, console = time.perf_counter(), compiling(), Console()
    task, songs = make_task(singer, request), []
    seeds = [request.seed + i for i in range(count)]
    tasks = [task._replace(request=dataclasses.replace(request, seed=seed)) for seed in seeds]
    with Bar(console, "singing", count, "songs") as bar:
        while len(songs) < count and not (songs and stop.by):
            together = tasks[len(songs) : len(songs) + batch]
            songs += sing(singer, together, _progress(bar, len(songs), len(together)), lambda: stop.by)
    took = {"total": time.perf_counter() - began, "compiling": compiling() - compiled}
    # Of an empty or a stopped one the likelihood says little.
    songs.sort(key=lambda song: (not len(song.codes), bool(song.about["stopped_by"]), song.about["nats_per_code"]))
    for warning in task.warnings:
        say(console, f"warning: {warning}")
    say(console, "rank  nats per code        seed  seconds  song")
    sounds = {}
    for rank, song in enumerate(songs, 1):
        path = variation(out, rank)
        song.about["rank"] = rank
        song.save(path)
        seed, nats = song.about["request"]["seed"], f"{song.about['nats_per_code']:.4f}"
        end = song.about["cut"] or "ended by itself"
        say(console, f"{rank:4}  {nats:>13}  {seed:10}  {song.seconds:7.1f}  {path} ({end})")
        sounds[f"{rank}: {path.name}, seed {seed}, {nats} nats per code"] = to_mono(song.samples)
    draw_spectrograms(out.with_suffix(".png"), sounds, singer.codec.rate, columns=min(-(-count // 6), 4))
    say(console, f"{_speed(songs, took)}; all in one picture: {out.with_suffix('.png')}")


def sing_requests(singer: Singer, path: Path, defaults: Request, batch: int, out: Path, stop: StopSignal) -> int:
    """Sings what the lines of a JSONL file ask for and is not in `out` yet: OUT/ID.wav, .ecdc, .npz, .json.

    Requests of one rule and like limits are sung together, at most `batch`. A line that cannot be sung gets
    OUT/ID.error.json, and the others go on; returns how many failed. After `stop` songs that are whole by then are
    kept, and the same call goes on.
    """
    console, lines = Console(), read_requests(path, defaults)
    check_output(out / "song.wav")
    todo: list[tuple[Line, Request]] = []
    new = failed = 0
    for name in {name for line in lines for name in (line.name, f"line-{line.number}")}:
        (out / f"{name}.error.json").unlink(missing_ok=True)
    for line in lines:
        if isinstance(line.request, UserError):
            failed += _fail(out, path, line, line.request, console)
        elif not _is_sung(out / f"{line.name}.wav", line.request, singer):
            todo.append((line, line.request))
    before = len(lines) - len(todo) - failed
    with Bar(console, "singing", len(lines), "songs", before + failed) as bar:
        for together in pack([request for _, request in todo], batch):
            ready: list[tuple[Line, Task]] = []
            for line, request in (todo[i] for i in together):
                try:
                    check_output(out / f"{line.name}.wav", request.prompt)
                    ready.append((line, make_task(singer, request)))
                except UserError as error:
                    failed += _fail(out, path, line, error, console)
            bar.update(before + new + failed)
            if not ready:
                continue
            progress = _progress(bar, before + new + failed, len(ready))
            songs = sing(singer, [task for _, task in ready], progress, lambda: stop.by)
            for (line, task), song in zip(ready, songs):
                if song.about["stopped_by"]:
                    continue
                song.save(out / f"{line.name}.wav")
                for warning in task.warnings:
                    say(console, f"warning: {line.name}: {warning}")
                new += 1
            if stop.by:
                break
    stopped = f"; stopped by {stop.by}, the same command goes on from there" if stop.by else ""
    say(console, f"{before + new} songs of {len(lines)} in {out} ({new} new, {failed} failed){stopped}")
    return failed


def variation(out: Path, rank: int) -> Path:
    """OUT_1.wav, OUT_2.wav, ..."""
    return out.with_name(f"{out.stem}_{rank}.wav")


def _progress(bar: Bar, done: int, songs: int) -> Callable[[float], None]:
    """Tells the bar of the share of a batch of `songs` songs, after `done` others."""
    return lambda share: bar.update(round(done + share * songs, 1))


def _speed(songs: Sequence[Song], took: Mapping[str, float]) -> str:
    """How fast they were sung; what was compiled for it, once, is told apart."""
    sung, singing = sum(song.seconds - song.about["given_s"] for song in songs), took["total"] - took["compiling"]
    compiled = f" (and {took['compiling']:.1f} s of compiling)" if took["compiling"] >= 0.1 else ""
    return f"{sung:.1f} s sung in {singing:.1f} s{compiled}, {sung / max(singing, 1e-3):.2f} times real time"


def _is_sung(out: Path, request: Request, singer: Singer) -> bool:
    """Whether the song of this very request and model is there already, and its prompt no newer."""
    try:
        about = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        if request.prompt and Path(request.prompt).exists():
            if Path(request.prompt).stat().st_mtime > out.with_suffix(".json").stat().st_mtime:
                return False
        mine = {"request": dataclasses.asdict(request), "model": singer.fingerprint}
        whole = all(out.with_suffix(suffix).is_file() for suffix in (".wav", ".ecdc", ".npz"))
        return whole and all(about[key] == value for key, value in mine.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fail(out: Path, path: Path, line: Line, error: UserError, console: Console) -> int:
    """Says so, on the terminal and in a file; returns 1, to be counted."""
    say(console, f"failed: {path}, line {line.number}: {error}")
    write_json(out / f"{line.name}.error.json", {"file": str(path), "line": line.number, "error": str(error)})
    return 1


def decode_file(path: Path, out: Path, codec_name: str = "solfege") -> float:
    """Turns a .ecdc or .npz into a WAV; returns its seconds. UserError where it is damaged or of another codec."""
    check_output(out)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    length, scales = None, None
    if path.suffix.lower() == ".ecdc":
        codec = load_codec(codec_name)
        codes, length, scales = read_ecdc(path, codec)
        codec = codec if codes.shape[1] == codec.codebooks else load_codec(codec_name, codes.shape[1])
    elif path.suffix.lower() == ".npz":
        codes, name, fingerprint = read_npz(path)
        codec = load_codec(codec_name, codes.shape[1])
        if fingerprint != codec.fingerprint:
            raise UserError(f"{path} has codes of {name} [{fingerprint}], not of {codec.name}: name it with --codec")
    else:
        raise UserError(f"{path}: a .ecdc or a .npz is needed")
    samples = (decode_song(codec, codes) if scales is None else decode(codec, codes, scales=scales))[:length]
    write_wav(out, samples, codec.rate)
    return len(samples) / codec.rate
