"""Songs that a model sings from held-out lyrics, heard beside the codec's reconstructions of the true ones.

Those are the ceiling: no model can do better than the codec that it speaks. After `generate`, `sung`, `distance`,
`heard` and `align`, before `evaluate`. Songs are heard one by one, and only what they are compared by is kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from l2m_jax.align import Reading, align_song, alignment_errors, teacher
from l2m_jax.audio import read_audio, to_mono, write_atomic
from l2m_jax.bootstrap import share
from l2m_jax.codec import decode
from l2m_jax.config import EvaluateConfig, UserError
from l2m_jax.data import Dataset, Record
from l2m_jax.distance import EMBEDDING, frechet, nearest_genre, song_features, window_features
from l2m_jax.generate import sing_requests
from l2m_jax.heard import Recogniser, error_rates, transcribe
from l2m_jax.lyrics import normalise_genre, parse_lyrics
from l2m_jax.picture import Label, draw_song
from l2m_jax.progress import Bar
from l2m_jax.request import Request
from l2m_jax.singer import Singer
from l2m_jax.song import read_npz
from l2m_jax.songs import Song
from l2m_jax.stop import StopSignal
from l2m_jax.sung import Sung, is_solfege, listen, score

MOST_KNOWN = 512  # songs of the reference that are listened to


class Known(NamedTuple):
    """Songs that others are compared with."""

    name: str
    own: list[int]  # index of each in the held-out dataset; -1 where they are others
    genres: list[str]
    features: Float[np.ndarray, "M D"]
    windows: list[Float[np.ndarray, "_ E"]]


class Heard(NamedTuple):
    """What is kept of a song's sound."""

    features: Float[np.ndarray, " D"]
    windows: Float[np.ndarray, "_ E"]
    sung: Sung | None  # of solfege
    words: str  # by the speech recogniser


class Asked(NamedTuple):
    """A held-out song whose lyrics are sung."""

    index: int  # in the dataset
    name: str  # of its files
    record: Record

    @property
    def genre(self) -> str:
        """In one spelling."""
        return normalise_genre(self.record.genre)


def evaluate_songs(
    singer: Singer,
    dataset: Dataset,
    settings: EvaluateConfig,
    out: Path,
    reference: Dataset | list[Song] | None,
    reading: Reading | None,
    recogniser: Recogniser | None,
    console: Console,
) -> dict[str, Any]:
    """Sings held-out lyrics into `out`/songs, those that are not there yet, and hears what was sung.

    By `reading` of the attention, where it is given, words are found in solfege songs. UserError where no song could be
    sung; SystemExit with a signal's status where it ends the singing.
    """
    indices = spread(np.arange(len(dataset)), settings.songs)
    asked = [Asked(int(i), f"{i + 1:05d}", dataset[int(i)]) for i in indices]
    asked, failed = _sing(singer, asked, settings, out)
    known = _hear_reference(dataset if reference is None else reference, dataset, singer, console)
    solfege = all(is_solfege(one.record.lyrics) for one in asked)
    generated, ceiling, ended, starts = [], [], [], []
    with Bar(console, "listening", len(asked), "songs") as bar:
        for one in asked:
            file = out / "songs" / f"{one.name}.wav"
            codes = read_npz(file.with_suffix(".npz"))[0]
            # A song may have ended before it began: that is heard as silence.
            samples = read_audio(file, singer.codec.rate) if len(codes) else np.zeros(1, np.float32)
            generated.append(_hear(samples, singer, one, solfege, recogniser))
            # As far as the model's window goes, which no song that it sings leaves.
            true = to_mono(decode(singer.codec, one.record.codes[: singer.layout.frames]))
            ceiling.append(_hear(true, singer, one, solfege, recogniser))
            ended.append(bool(json.loads(file.with_suffix(".json").read_text("utf-8"))["ended_by_itself"]))
            starts.append(_word_starts(singer, one, codes, reading) if solfege and reading and len(codes) else None)
            if len(generated) <= settings.pictures:
                _draw(file.with_suffix(".png"), samples, singer.codec.rate, one, generated[-1].sung, starts[-1])
            bar.update(len(generated))
    figures: dict[str, Any] = {
        "songs": len(asked),
        "failed": failed,
        "longer_than_the_window": sum(len(one.record.codes) > singer.layout.frames for one in asked),
        "solfege": solfege,
        "reference": {"data": known.name, "songs": len(known.genres)},
        "generated": {"ended_by_themselves": share(ended)},
        "ceiling": {},
    }
    for name, heard in (("generated", generated), ("ceiling", ceiling)):
        figures[name] |= _figures(heard, asked, known, recogniser)
    if known.own[0] >= 0:
        figures["ceiling"]["frechet"]["distance"] = None  # from songs that it is of itself
    if solfege:
        truth = [one.record.word_times[:, 0] if len(one.record.word_times) else None for one in asked]
        figures["ceiling"]["note_starts_against_word_times"] = _starts_errors(ceiling, truth)
        figures["generated"]["attention_against_note_starts"] = _starts_errors(generated, starts)
    figures["each_song"] = [_told(*each) for each in zip(asked, generated, ended)]
    return figures


def spread(items: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the items, evenly spread."""
    return items[np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int))]


def _sing(singer: Singer, asked: list[Asked], settings: EvaluateConfig, out: Path) -> tuple[list[Asked], int]:
    """Those that are sung, and how many could not be."""
    sampling, path = dataclasses.asdict(settings.sampling), out / "requests.jsonl"
    lines = [
        # An end of line makes sure that lyrics are no file's name.
        {"id": one.name, "lyrics": one.record.lyrics + "\n", "genre": one.record.genre, "seed": settings.seed + i}
        for i, one in enumerate(asked)
    ]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    stop = StopSignal()
    try:
        failed = sing_requests(singer, path, Request(**sampling), settings.batch, out / "songs", stop)
    finally:
        stop.restore()
    if stop.by:
        raise SystemExit(stop.status)
    sung = [one for one in asked if not (out / "songs" / f"{one.name}.error.json").exists()]
    if not sung:
        raise UserError(f"{out}/songs: not one song could be sung; its .error.json files say why")
    return sung, failed


def _hear_reference(reference: Dataset | list[Song], dataset: Dataset, singer: Singer, console: Console) -> Known:
    """Genres and features of the songs, of a dataset as the codec reconstructs them."""
    rate, found = singer.codec.rate, []
    chosen = spread(np.arange(len(reference)), MOST_KNOWN)
    with Bar(console, "listening to the reference", len(chosen), "songs") as bar:
        for i in chosen:
            song = reference[int(i)]
            if isinstance(song, Record):
                samples = to_mono(decode(singer.codec, song.codes))
            else:
                samples = read_audio(song.audio, rate)
            found.append((normalise_genre(song.genre), song_features(samples, rate), window_features(samples, rate)))
            bar.update(len(found))
    genres, features, windows = zip(*found)
    name, own = "", [-1] * len(chosen)
    if not isinstance(reference, Dataset):
        name = f"the sound of {reference[0].folder.parent}"
    elif reference.fingerprint != dataset.fingerprint:
        name = f"the codec's reconstructions of {reference.folder}"
    else:
        name, own = f"those of {dataset.folder}, each without itself", chosen.tolist()
    return Known(name, own, list(genres), np.stack(features), list(windows))


def _hear(
    samples: Float[np.ndarray, " T"], singer: Singer, asked: Asked, solfege: bool, recogniser: Recogniser | None
) -> Heard:
    rate = singer.codec.rate
    return Heard(
        song_features(samples, rate),
        window_features(samples, rate),
        listen(samples, rate, asked.record.lyrics) if solfege else None,
        "" if recogniser is None else transcribe(recogniser, samples, rate),
    )


def _word_starts(
    singer: Singer, asked: Asked, codes: Int[np.ndarray, "F K"], reading: Reading
) -> Float[np.ndarray, " W"]:
    """Where attention has the words of a song that was sung."""
    song = teacher(asked.record, singer.info.config.model.memory, singer.layout.frames, singer.codec.pace)
    song = song._replace(codes=codes, starts=None, cut=False)
    return align_song(singer.model, singer.layout, song, reading, singer.codec.pace)[:, 0]


def _figures(
    heard: Sequence[Heard],
    asked: Sequence[Asked],
    known: Known,
    recogniser: Recogniser | None,
) -> dict[str, Any]:
    """Notes, genre, distance and words; None where the songs do not have such."""
    windows, others = np.concatenate([h.windows for h in heard]), np.concatenate(known.windows)
    lyrics, words = [one.record.lyrics for one in asked], [h.words for h in heard]
    sung = [h.sung for h in heard if h.sung is not None]
    return {
        "notes": score(sung) if sung else None,
        "genre": _genres(heard, asked, known),
        "frechet": {
            "distance": frechet(windows, others),
            "windows": len(windows),
            "reference_windows": len(others),
            "embedding": EMBEDDING,
        },
        "words": None if recogniser is None else error_rates(recogniser, lyrics, words),
    }


def _genres(heard: Sequence[Heard], asked: Sequence[Asked], known: Known) -> dict[str, Any] | None:
    """Share of songs that sound like their genre, and what they sound like instead; None of less than two genres."""
    names = sorted({genre for genre in known.genres if genre})
    confusion = {genre: dict.fromkeys(names, 0) for genre in names}
    right = []
    for song, one in zip(heard, asked):
        others = [j for j, genre in enumerate(known.genres) if genre and known.own[j] != one.index]
        genres = [known.genres[j] for j in others]
        if one.genre not in genres or len(set(genres)) < 2:
            continue
        found = nearest_genre(song.features, known.features[others], genres)
        confusion[one.genre][found] += 1
        right.append(found == one.genre)
    return {"right": share(right), "confusion": confusion} if right else None


def _starts_errors(heard: Sequence[Heard], starts: Sequence[Float[np.ndarray, " _"] | None]) -> dict[str, Any] | None:
    """How far notes begin from these starts, of the songs that have one note a word."""
    pairs = [
        (np.array([note.start for note in h.sung.notes]), times)
        for h, times in zip(heard, starts)
        if h.sung is not None and times is not None and len(h.sung.notes) == len(times)
    ]
    if not pairs:
        return None
    notes, times = (np.concatenate(column) for column in zip(*pairs))
    return {"songs": len(pairs), **alignment_errors(notes, times)._asdict()}


def _told(asked: Asked, heard: Heard, ended: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"song": asked.record.song, "file": f"songs/{asked.name}.wav", "genre": asked.genre}
    told |= {"ended_by_itself": ended}
    if heard.sung is not None:
        told |= {"asked": heard.sung.asked, "sung": heard.sung.names, "note_accuracy": heard.sung.accuracy}
    return told | ({"heard": heard.words} if heard.words else {})


def _draw(
    path: Path,
    samples: Float[np.ndarray, " T"],
    rate: int,
    asked: Asked,
    sung: Sung | None,
    starts: Float[np.ndarray, " W"] | None,
) -> None:
    rows: dict[str, Sequence[Label]] = {}
    if starts is not None:
        ends = [*starts[1:], len(samples) / rate]
        words = parse_lyrics(asked.record.lyrics).words
        rows["attention"] = [Label(w, float(a), float(b)) for w, a, b in zip(words, starts, ends)]
    if sung is not None:
        rows["sung"] = [Label(note.syllable, note.start, note.end) for note in sung.notes]
    title = f"{asked.record.song}, {asked.genre}" + (
        "" if sung is None else f": {sung.accuracy:.0%} of the notes right"
    )
    draw_song(path, samples, rate, asked.record.lyrics, rows, title)
