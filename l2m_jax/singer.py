"""A trained model that sings: requests to songs, one by one as a stream, or many in batches. After `sample` and `song`.

    model = l2m_jax.load("run")
    song = model.generate(lyrics="sol mi do", genre="march")
    song.save("song.wav")

The command line sings through the same object.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from l2m_jax import sample
from l2m_jax.checkpoint import RunInfo, default_run, load_model
from l2m_jax.codec import Codec, decode, decode_chunk, decoder_state
from l2m_jax.compiled import compiling, keep_compiled
from l2m_jax.config import UserError
from l2m_jax.data import prompt_rows
from l2m_jax.encoders import Encoders, signature
from l2m_jax.lyrics import (
    TextEncoder,
    check_memory,
    encode_genre,
    encode_text,
    normalise_genre,
    parse_lyrics,
    split_pieces,
    unknown_warning,
)
from l2m_jax.model import Prompt, SoundTransformer
from l2m_jax.request import Request, pack
from l2m_jax.song import Song, read_sound
from l2m_jax.tokens import Layout, make_layout
from l2m_jax.weights import load_codec

PIECE = 48  # frames that a stream decodes at a time: one shape to compile, 0.64 s at 75 frames/s


class Task(NamedTuple):
    """A request made ready to be sung. Limits are in frames and count those that are given."""

    request: Request
    prompt: Prompt  # of this song alone, [1, S, ...]
    given: Int[np.ndarray, "G K"]  # codes that the song begins with
    least: int
    most: int
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Singer:
    """A trained model with the codec and the text encoder that it was trained with."""

    run: Path
    step: int
    info: RunInfo
    model: SoundTransformer
    layout: Layout
    codec: Codec
    encoder: TextEncoder
    fingerprint: str
    """Of the model's weights: a folder and a step may come to hold others."""

    @property
    def longest(self) -> float:
        """Seconds of the window."""
        return self.layout.frames / self.codec.pace

    def generate(self, lyrics: str, genre: str = "", **controls: Any) -> Song:
        """One song. `controls` are the other fields of `Request`: seed, seconds, temperature, prompt ...

        UserError where the request cannot be sung.
        """
        stream = self.stream(lyrics, genre, **controls)
        for _ in stream:
            pass
        return stream.song()

    def stream(self, lyrics: str, genre: str = "", stopped: Callable[[], str] = lambda: "", **controls: Any) -> Stream:
        """One song while it is sung; see `Stream`. Takes what `generate` takes."""
        return Stream(self, Request(lyrics=lyrics, genre=genre, **controls), stopped)

    def generate_batch(self, requests: Sequence[Request], batch: int = 8) -> list[Song]:
        """The songs of the requests, up to `batch` sung at the same time. UserError where one cannot be sung."""
        songs: dict[int, Song] = {}
        for together in pack(requests, batch):
            tasks = [make_task(self, requests[i]) for i in together]
            songs |= zip(together, sing(self, tasks))
        return [songs[i] for i in range(len(requests))]


def load(run: str | Path | None = None, step: int | None = None, codec: str = "", text_encoder: str = "") -> Singer:
    """The newest (or given) checkpoint of a run, with its codec and its text encoder, or those named.

    Without a run: the model that comes with the package.

    Compiled programs are kept for the next process. UserError where the run is none, or codec or text encoder are not
    those that it was trained with.
    """
    keep_compiled()
    run = default_run() if run is None else Path(run)
    model, info, step = load_model(run, step)
    made = info.made_with
    encoders = Encoders(codec or made.codec, made.codebooks, text_encoder or made.text_encoder, made.text_layer)
    encoders = encoders._replace(text_backend=made.text_backend)  # codes of torch's codec are ours: the weights are
    loaded = load_codec(encoders.codec, encoders.codebooks), encoders.load_text_encoder()
    if apart := made.differences(signature(encoders, *loaded)):
        raise UserError(f"{run} was trained with another origin of codes or states ({'; '.join(apart)})")
    fingerprint = hashlib.sha256(np.asarray(model.head.kernel[...]).tobytes()).hexdigest()[:16]
    # The loop wants the layers apart; made so once, their weights are in memory once.
    return Singer(run, step, info, model.unstacked(), make_layout(info.config.model), *loaded, fingerprint)


def make_prompt(singer: Singer, lyrics: str, genre: str) -> tuple[Prompt, list[str]]:
    """The prompt of one song, [1, S, ...], and warnings. UserError where the lyrics are empty or beyond the cap."""
    parsed = parse_lyrics(lyrics)
    warnings = list(parsed.warnings)
    genre = normalise_genre(genre)
    if genre and genre not in singer.info.genres:
        known = ", ".join(singer.info.genres) or "none"
        warnings.append(
            f"genre {genre!r} was in no training song (those were: {known}); its words are used as they are"
        )
    cap, genre_states = singer.info.config.model.memory, encode_genre(singer.encoder, genre)
    pieces = split_pieces(singer.encoder, parsed)
    check_memory(len(pieces.ids), len(genre_states), cap, "the lyrics")
    warnings += unknown_warning(singer.encoder, pieces, "the lyrics")
    text = encode_text(singer.encoder, parsed)
    rows = prompt_rows(text.states, text.section, genre_states, cap)
    return Prompt(*(row[None] for row in rows)), warnings


def make_task(singer: Singer, request: Request) -> Task:
    """The request made ready to be sung.

    UserError where its lyrics are empty or beyond the cap, its limits beyond the window, or its prompt is unusable.
    """
    rate = singer.codec.pace
    limit = singer.longest if request.seconds is None else request.seconds
    for name, asked in (("the length limit", limit), ("min-seconds", request.min_seconds)):
        if asked > singer.longest:
            raise UserError(f"{name} is {asked:g} s; allowed: up to the model's window of {singer.longest:g} s")
    most = max(round(limit * rate), 1)
    prompt, warnings = make_prompt(singer, request.lyrics, request.genre)
    given = np.zeros((0, singer.codec.codebooks), np.int32)
    if request.prompt is not None:
        given = read_sound(Path(request.prompt), singer.codec)
        if request.from_seconds is not None:
            kept = round(request.from_seconds * rate)
            if kept > len(given):
                holds = f"{request.prompt} holds {len(given) / rate:g} s"
                raise UserError(f"from {request.from_seconds:g}: {holds}; allowed: up to there")
            given = given[:kept]
        if len(given) >= most:
            raise UserError(
                f"{request.prompt}: the {len(given) / rate:g} s of it that are kept leave nothing to sing within "
                f"{limit:g} s: keep less with --from, or allow more with --seconds"
            )
    least = min(round(request.min_seconds * rate), most)
    return Task(request, prompt, given, least, most, warnings)


def sung(singer: Singer, tasks: Sequence[Task]) -> Iterator[list[sample.Song]]:
    """What is sung so far, a song a task, after every segment; all in one batch, under the rule of the first."""
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *(task.prompt for task in tasks))
    given = [task.given for task in tasks] if any(len(task.given) for task in tasks) else None
    seeds, least = [task.request.seed for task in tasks], [task.least for task in tasks]
    most = [task.most for task in tasks]
    rule = tasks[0].request.rule
    for state in sample.sample_states(singer.model, singer.layout, together, rule, seeds, most, least, given):
        yield sample.said(state, singer.layout, most)


def sing(
    singer: Singer,
    tasks: Sequence[Task],
    progress: Callable[[float], Any] = lambda share: None,
    stopped: Callable[[], str] = lambda: "",
) -> list[Song]:
    """The songs of one batch; `progress` is told the share that is done, at most 1.

    `stopped` is asked after every segment: where it names what stops the singing, songs are what was sung so far.
    """
    began, compiled, songs, by = time.perf_counter(), compiling(), [], ""
    for songs in sung(singer, tasks):
        shares = [1.0 if song.ended else len(song.codes) / task.most for song, task in zip(songs, tasks)]
        progress(sum(shares) / len(shares))
        if by := stopped():
            break
    samples = [decode_song(singer.codec, song.codes) for song in songs]
    timings = {"total": time.perf_counter() - began, "compiling": compiling() - compiled, "songs_together": len(tasks)}
    return [_song(singer, *one, timings, by) for one in zip(tasks, songs, samples)]


class Stream:
    """A song while it is sung: iterate for (codes [f, K], samples [f x hop]) of 0.64 s each, the last shorter.

    A prompt is sounded too. The song ends early once `stopped`, asked after every segment, names what stops it; `song`
    is all of it that has come. The samples are those that the codes would give if they were decoded at once. A codec
    that does not stream gives the whole song at the end.
    """

    def __init__(self, singer: Singer, request: Request, stopped: Callable[[], str] = lambda: ""):
        began, self._compiled = time.perf_counter(), compiling()
        self._singer, self._task = singer, make_task(singer, request)
        self._sung = sample.Song(self._task.given[:0], False, 0.0)
        self._frames, self._samples = 0, [decode(singer.codec, self._sung.codes)]
        self._stopped, self._by = stopped, ""
        self._timings = {"first_sound": 0.0, "total": time.perf_counter() - began, "compiling": 0.0}
        self._pieces = self._sing()

    def __iter__(self) -> Iterator[tuple[Int[np.ndarray, "F K"], Float[np.ndarray, "T ..."]]]:
        return self._pieces

    @property
    def limit(self) -> float:
        """Seconds that the song may get."""
        return self._task.most / self._singer.codec.pace

    def song(self) -> Song:
        """The song as far as it has come out of this stream."""
        codes, samples, song = self._sung.codes[: self._frames], np.concatenate(self._samples), self._sung
        if len(codes) < len(song.codes):  # what they all together are worth is not known of a part of them
            song = song._replace(codes=codes, ended=False, logprob=float("nan"))
        return _song(self._singer, self._task, song, samples, self._timings, self._by or "its listener")

    def _sing(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        since = time.perf_counter()  # what whoever listens does between the pieces is not counted
        for codes, samples in decode_growing(self._singer.codec, self._growing()):
            self._frames += len(codes)
            self._samples.append(samples)
            self._timings["total"] += time.perf_counter() - since
            self._timings["first_sound"] = self._timings["first_sound"] or self._timings["total"]
            self._timings["compiling"] = compiling() - self._compiled
            yield codes, samples
            since = time.perf_counter()

    def _growing(self) -> Iterator[np.ndarray]:
        for songs in sung(self._singer, [self._task]):
            self._sung = songs[0]
            yield self._sung.codes
            if by := self._stopped():
                self._by = by
                return


def decode_growing(
    codec: Codec, growing: Iterator[Int[np.ndarray, "F K"]]
) -> Iterator[tuple[Int[np.ndarray, "f K"], Float[np.ndarray, "T ..."]]]:
    """Codes and their samples, PIECE frames at a time, of codes that get longer; at the end what is left."""
    codes, done, state = np.zeros((0, codec.codebooks), np.int32), 0, None
    for codes in growing:
        while codec.streams and len(codes) - done >= PIECE:
            piece = codes[done : done + PIECE]
            state, samples = decode_chunk(codec, state or decoder_state(codec), piece)
            done += PIECE
            yield piece, samples
    rest = codes[done:]
    if not len(rest):
        return
    if state is None:  # all of it; the left edge is reflected: a few frames are no beginning of a longer song
        yield rest, decode(codec, rest)
    else:  # causal: what comes after changes nothing
        padded = np.pad(rest, ((0, PIECE - len(rest)), (0, 0)))
        yield rest, decode_chunk(codec, state, padded)[1][: len(rest) * codec.hop]


def decode_song(codec: Codec, codes: Int[np.ndarray, "F K"]) -> Float[np.ndarray, "T ..."]:
    """The samples of a whole song, to the bit those of its stream: pieces of another length add up in another order."""
    pieces = [samples for _, samples in decode_growing(codec, iter([codes]))]
    return np.concatenate(pieces) if pieces else decode(codec, codes)


def _song(
    singer: Singer, task: Task, song: sample.Song, samples: np.ndarray, timings: dict[str, float], by: str
) -> Song:
    """The song with all that is to be said about it; `by` stopped it if it is not whole."""
    rate = singer.codec.pace
    limit = task.most / rate
    drawn = max(len(song.codes) - len(task.given), 0) * song.codes.shape[1]
    seconds = len(samples) / singer.codec.rate
    stopped_by = None if song.ended or len(song.codes) == task.most else by
    cut = (
        f"stopped by {by} after {seconds:.1f} s"
        if stopped_by
        else f"the song had not ended at the limit of {limit:g} s"
    )
    about = {
        "request": dataclasses.asdict(task.request),
        "seconds": round(seconds, 3),
        "given_s": round(len(task.given) / rate, 3),
        "limit_s": round(limit, 3),
        "ended_by_itself": song.ended,
        "cut": None if song.ended else cut,
        "stopped_by": stopped_by,
        "nats_per_code": None if math.isnan(song.logprob) else -song.logprob / max(drawn, 1),
        "warnings": task.warnings,
        "run": str(singer.run),
        "model": singer.fingerprint,
        "step": singer.step,
        "made_with": singer.info.made_with._asdict(),
        "codes_sha256": hashlib.sha256(song.codes.astype("<i4").tobytes()).hexdigest(),
        "timings_s": {name: round(value, 3) for name, value in timings.items()},
    }
    return Song(song.codes, samples, song.ended, about, singer.codec)
