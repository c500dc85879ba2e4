"""How well a model foretells songs, in bits per code, with their own lyrics and genre, another's, and none.

After `train` and `bootstrap`. What a song's own lyrics save against none, or against another song's, is the *lyrics
gain*: the information that the model takes from the words. Likewise the *genre gain*. END is told apart from the codes.

Letters: N songs, C conditions, F frames, K codebooks, Z stretches of time, T positions, J streams.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from l2m_jax.bootstrap import estimate
from l2m_jax.data import Dataset, Example, Record, prompt_rows
from l2m_jax.lyrics import normalise_genre, parse_lyrics
from l2m_jax.model import SoundTransformer, prompt_of
from l2m_jax.tokens import Layout

STRETCH = 5.0  # seconds of a point over song time

# Whose lyrics and whose genre the model is given: the song's own, another song's, or none.
CONDITIONS = {
    "right": ("own", "own"),
    "shuffled_lyrics": ("other", "own"),
    "no_lyrics": ("none", "own"),
    "other_genre": ("own", "other"),
    "no_genre": ("own", "none"),
    "neither": ("none", "none"),
}
# What the right lyrics or genre save against this condition.
GAINS = {
    "lyrics_against_none": "no_lyrics",
    "lyrics_against_shuffled": "shuffled_lyrics",
    "genre_against_none": "no_genre",
    "genre_against_other": "other_genre",
    "both_against_neither": "neither",
}


class Text(NamedTuple):
    """What a song is told by."""

    song: str
    words: tuple[str, ...]
    genre: str


class Donors(NamedTuple):
    """Index of the song whose lyrics, and of that whose genre, a song is given in the place of its own."""

    lyrics: int | None
    genre: int | None


class SongBits(NamedTuple):
    """Bits of one song under each condition, NaN where there is no such condition for it."""

    song: str
    codes: Float[np.ndarray, "C K"]  # summed over frames
    end: Float[np.ndarray, " C"]  # of END; NaN where the song ends outside of the window
    stretches: Float[np.ndarray, "C Z"]  # summed over frames and codebooks
    words: Float[np.ndarray, " C"]  # summed over the frames of all sung words
    frames: int  # inside of the window
    stretch_frames: Float[np.ndarray, " Z"]
    sung: int  # words whose times are known and lie inside of the window
    cut: int  # frames outside of the window


def choose_donors(texts: Sequence[Text]) -> list[Donors]:
    """Another song's lyrics, of the same genre where possible, and another genre, for each song: no song's own.

    Songs stand in a circle in the order of their hashed names, whatever their order in the dataset, and each takes from
    the next that will do, so that within a genre of different words each is taken once. None where no song will do.
    """
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].song.encode()).digest())
    place = {i: at for at, i in enumerate(order)}

    def following(i: int, will_do: Callable[[Text], bool]) -> int | None:
        others = (order[(place[i] + step) % len(order)] for step in range(1, len(order)))
        return next((j for j in others if will_do(texts[j])), None)

    donors = []
    for i, own in enumerate(texts):
        lyrics = following(i, lambda t, own=own: t.genre == own.genre and t.words != own.words)
        if lyrics is None:
            lyrics = following(i, lambda t, own=own: t.words != own.words)
        genre = following(i, lambda t, own=own: t.genre not in ("", own.genre)) if own.genre else None
        donors.append(Donors(lyrics, genre))
    return donors


@functools.partial(jax.jit, static_argnames=("layout", "chunk"))
def nats_of_targets(
    model: SoundTransformer, batch: Example, keep: Bool[Array, "B kinds"], layout: Layout, chunk: int
) -> Float[Array, "B T J"]:
    """Cross-entropy of each target, 0 of PAD: what `train.losses` sums. `chunk` positions' logits at a time."""
    ids, targets = jnp.asarray(batch.ids), jnp.asarray(batch.targets)
    memory = model.memory(prompt_of(batch), keep)
    hidden = model.hidden(ids, layout.place(jnp.arange(ids.shape[1])), memory)
    size = math.gcd(chunk, ids.shape[1])

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[-1]), 1, 0)

    def nats(part: tuple[Array, Array]) -> Array:
        found = optax.softmax_cross_entropy_with_integer_labels(model.logits(part[0]), part[1])
        return jnp.where(part[1] == layout.pad, 0.0, found)

    return jnp.moveaxis(jax.lax.map(nats, (split(hidden), split(targets))), 0, 1).reshape(targets.shape)


def measure(
    model: SoundTransformer,
    layout: Layout,
    dataset: Dataset,
    songs: Sequence[int],
    pace: float,
    batch: int = 8,
    chunk: int = 1024,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[SongBits]:
    """Bits of the chosen songs, in order of their names, `batch` of similar length at a time.

    Lyrics and genres that are not a song's own are those of other chosen songs. Each window that is compiled is the
    model's or a half, a quarter or an eighth of it. `pace` is the codec's frames a second of sound; `progress` is told
    how many songs are done.
    """
    texts, lengths, most, most_genre = [], [], 0, 0
    for r in map(dataset.__getitem__, songs):  # codes and states are read again when they are needed
        texts.append(Text(r.song, parse_lyrics(r.lyrics).words, normalise_genre(r.genre)))
        lengths.append(len(r.codes))
        most, most_genre = max(most, len(r.lyric_states)), max(most_genre, len(r.genre_states))
    rows = most + most_genre  # one song's lyrics with another's genre may be more than the model's memory
    donors, found = choose_donors(texts), []
    order = sorted(range(len(songs)), key=lambda i: (lengths[i], texts[i].song))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        window = _window(layout, lengths[chosen[-1]])
        records = [dataset[songs[i]] for i in chosen]
        others = [
            (None if lyrics is None else dataset[songs[lyrics]], None if genre is None else dataset[songs[genre]])
            for lyrics, genre in (donors[i] for i in chosen)
        ]
        bits = _batch_bits(model, window, records, others, rows, batch, chunk)
        found += [_song_bits(record, window, pace, b) for record, b in zip(records, bits)]
        progress(len(found))
    return sorted(found, key=lambda song: song.song)


def summarise(songs: Sequence[SongBits]) -> dict[str, Any]:
    """All figures of the songs, those over all songs as `Estimate`s.

    Bits per code are of all codes of all songs, so that a long song counts for more than a short one; bits per sung
    word are summed over codebooks and the frames from the word's start to its end.
    """
    codes = np.stack([s.codes for s in songs])  # [N, C, K]
    words, ends = np.stack([s.words for s in songs]), np.stack([s.end for s in songs])  # [N, C]
    frames, sung = (np.array([getattr(s, name) for s in songs], float) for name in ("frames", "sung"))
    index, books = {name: c for c, name in enumerate(CONDITIONS)}, range(codes.shape[2])

    def per_code(bits: Float[np.ndarray, "N K"]) -> dict[str, Any]:
        apart = [estimate(bits[:, k], frames) for k in books]
        return {"all_codebooks": estimate(bits.sum(1), frames * len(books)), "each_codebook": apart}

    gains = {name: (index[against], index["right"]) for name, against in GAINS.items()}
    return {
        "songs": len(songs),
        "codes": int(frames.sum()) * len(books),
        "sung_words": int(sung.sum()),
        "songs_cut": sum(s.cut > 0 for s in songs),
        "frames_outside_of_the_window": sum(s.cut for s in songs),
        "bits_per_code": {name: per_code(codes[:, c]) for name, c in index.items()},
        "bits_of_the_end": {name: estimate(ends[:, c]) for name, c in index.items()},
        "gain_per_code": {name: per_code(codes[:, a] - codes[:, b]) for name, (a, b) in gains.items()},
        "gain_per_sung_word": {name: estimate(words[:, a] - words[:, b], sung) for name, (a, b) in gains.items()},
        "over_time": _over_time(songs),
    }


def _over_time(songs: Sequence[SongBits]) -> dict[str, Any]:
    """Bits per code in each stretch of the songs' time, NaN where no song has such a condition."""
    most = max(len(s.stretch_frames) for s in songs)
    frames, bits, count = np.zeros((len(CONDITIONS), most)), np.zeros((len(CONDITIONS), most)), np.zeros(most, int)
    for song in songs:
        here = len(song.stretch_frames)
        known = np.isfinite(song.stretches)
        bits[:, :here] += np.where(known, song.stretches, 0)
        frames[:, :here] += known * song.stretch_frames
        count[:here] += 1
    points = bits / np.where(frames > 0, frames * songs[0].codes.shape[1], np.nan)
    return {
        "starts_s": [STRETCH * z for z in range(most)],
        "songs": count.tolist(),
        "bits_per_code": dict(zip(CONDITIONS, points.tolist())),
    }


def _window(layout: Layout, frames: int) -> Layout:
    """The layout with the smallest of four windows that holds so many frames, or the whole one."""
    sizes = [-(-layout.frames // part) for part in (8, 4, 2)]
    return dataclasses.replace(layout, frames=next((size for size in sizes if frames <= size), layout.frames))


def _batch_bits(
    model: SoundTransformer,
    layout: Layout,
    records: Sequence[Record],
    others: Sequence[tuple[Record | None, Record | None]],
    rows: int,
    batch: int,
    chunk: int,
) -> Float[np.ndarray, "B C T J"]:
    """Bits of every target of each record under every condition; `others` are the donors of lyrics and of genre."""
    tokens, bits = [layout.encode(record.codes) for record in records], []
    for of_lyrics, of_genre in CONDITIONS.values():
        examples = []
        for record, song, (lyrics, genre) in zip(records, tokens, others):
            words = lyrics if of_lyrics == "other" and lyrics is not None else record
            style = genre if of_genre == "other" and genre is not None else record
            prompt = prompt_rows(words.lyric_states, words.section, style.genre_states, rows)
            examples.append(Example(*song, *prompt))
        examples += examples[:1] * (batch - len(examples))  # one shape to compile
        keep = jnp.tile(jnp.array([of_genre != "none", of_lyrics != "none"]), (batch, 1))
        nats = nats_of_targets(model, jax.tree.map(lambda *songs: np.stack(songs), *examples), keep, layout, chunk)
        bits.append(np.asarray(nats, np.float64)[: len(records)] / math.log(2))
    together = np.stack(bits, axis=1)
    for song, record, donors in zip(together, records, others):
        song[_unknown(record, *donors)] = np.nan
    return together


def _unknown(record: Record, lyrics: Record | None, genre: Record | None) -> list[bool]:
    """Of each condition, whether the song has no such one."""
    return [
        (of_lyrics == "other" and lyrics is None)
        or (of_genre == "other" and genre is None)
        or (of_lyrics == "own" and of_genre != "own" and not record.genre)
        for of_lyrics, of_genre in CONDITIONS.values()
    ]


def _song_bits(record: Record, layout: Layout, pace: float, bits: Float[np.ndarray, "C T J"]) -> SongBits:
    """What is kept of a song: sums."""
    frames = min(len(record.codes), layout.frames)
    codes = np.stack([layout.by_frame(condition, frames) for condition in bits])  # [C, F, K]
    end = bits.sum((1, 2)) - codes.sum((1, 2)) if frames == len(record.codes) else np.full(len(bits), np.nan)
    upto = np.pad(codes.sum(2).cumsum(1), ((0, 0), (1, 0)))  # bits of the first 0, 1, ... frames
    cuts = np.rint(np.arange(0, frames / pace, STRETCH) * pace).astype(int)
    cuts = np.append(cuts[cuts < frames], frames)
    # The frame in which a word begins is its own: there its first consonant is heard.
    times = np.floor(record.word_times[:, :2] * pace + 1e-3).astype(int)
    times = np.minimum(times, len(record.codes))
    times = times[times[:, 1] <= frames]
    return SongBits(
        song=record.song,
        codes=codes.sum(1),
        end=end,
        stretches=np.diff(upto[:, cuts], axis=1),
        words=(upto[:, times[:, 1]] - upto[:, times[:, 0]]).sum(1),
        frames=frames,
        stretch_frames=np.diff(cuts).astype(float),
        sung=len(times),
        cut=len(record.codes) - frames,
    )
