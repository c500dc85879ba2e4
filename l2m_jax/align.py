"""Which word is sung when: cross-attention of a teacher-forced song to the start of every word. After `follow`.

    attention_maps   which rows of the memory each frame looks at, head by head         [heads, F, M]
    word_mass        pieces merged into words, genre and null rows left out             [F, W]
    word_times       the words in their order, with blanks between, along the best path [W, 2]

Heads differ: some follow the words, others do not. `choose_heads` finds those that do, on songs whose times are known.
M rows of the memory, W words.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from l2m_jax.config import UserError
from l2m_jax.data import Record, prompt_rows
from l2m_jax.follow import diagonality, frame_weights, positions_of_a_frame
from l2m_jax.model import KINDS, LYRIC, Layer, Memory, Prompt, SoundTransformer
from l2m_jax.tokens import Layout, padded_length

BLANKS = (0.2, 0.3, 0.4, 0.5, 0.6)  # of which the best is chosen
BLANK = 0.4
MOST = 6  # heads that are chosen at most
Head = tuple[int, int]  # layer and head


class Reading(NamedTuple):
    """How the words are read from a model's attention."""

    heads: tuple[Head, ...]
    blank: float = BLANK  # share of a look that a word must get to be taken for sung: below it nothing is


class Teacher(NamedTuple):
    """A song that is sung already, and what it was sung from."""

    codes: Int[np.ndarray, "F K"]
    prompt: Prompt  # of this song alone, [1, S, ...]
    words: Int[np.ndarray, " M"]  # word of each row of the memory, null rows first; -1 where it is none
    starts: Float[np.ndarray, " W"] | None = None  # in s, where they are known; NaN after the window
    cut: bool = False  # whether the song goes on after these codes


class Errors(NamedTuple):
    """How far word starts are from the true ones."""

    words: int
    median_ms: float
    mean_ms: float
    within_100_ms: float  # share of words
    within_300_ms: float


def teacher(record: Record, memory: int, frames: int, pace: float) -> Teacher:
    """The song of a record for a model whose memory has `memory` rows, up to a window of `frames`, `pace` a second."""
    rows = prompt_rows(record.lyric_states, record.section, record.genre_states, memory)
    prompt = Prompt(*(row[None] for row in rows))
    codes, starts = record.codes[:frames].astype(np.int32), None
    if len(record.word_times):
        starts = np.where(record.word_times[:, 0] < len(codes) / pace, record.word_times[:, 0], np.nan)
    return Teacher(codes, prompt, memory_words(prompt, record.word), starts, len(record.codes) > frames)


def memory_words(prompt: Prompt, word: Int[np.ndarray, " P"]) -> Int[np.ndarray, " M"]:
    """Word of each row of the memory, from those of the lyric rows (`EncodedText.word`)."""
    words = np.full(KINDS + prompt.kind.shape[1], -1, np.int32)
    words[KINDS:][np.asarray(prompt.kind[0]) == LYRIC] = word
    return words


def attention_maps(
    model: SoundTransformer,
    layout: Layout,
    codes: Int[np.ndarray, "F K"],
    prompt: Prompt,
    heads: Sequence[Head] | None = None,
) -> Float[np.ndarray, "heads F M"]:
    """How each frame of the song shares its look among the rows of the memory; a row sums to 1.

    Of the given heads, or of all, in order of layer and head. A frame's positions are averaged. UserError where the
    song is longer than the window.
    """
    return np.stack([one for _, one in _each_map(model, layout, codes, prompt, heads)])


def _each_map(
    model: SoundTransformer, layout: Layout, codes: np.ndarray, prompt: Prompt, heads: Sequence[Head] | None = None
) -> Iterator[tuple[Head, np.ndarray]]:
    """One after the other, so that no more is in memory than one layer's queries and what the caller keeps."""
    if len(codes) > layout.frames:
        raise UserError(f"the song has {len(codes)} frames; allowed: the model's window of {layout.frames}")
    length = padded_length(layout.length(len(codes)))
    memory = model.memory(prompt, jnp.ones((1, KINDS), bool))
    positions = positions_of_a_frame(layout)
    x = model.embed(jnp.asarray(layout.encode(codes).ids[None, :length]), layout.place(jnp.arange(length)))
    for depth in range(1 + max((layer for layer, _ in heads), default=-1) if heads is not None else model.depth):
        x, queries, keys = _look(_layer(model, depth), x, memory)
        for head in range(queries.shape[1]):
            if heads is None or (depth, head) in heads:
                share = queries.shape[1] // keys.shape[1]  # query heads of a key head
                weights = frame_weights(queries[0, head], keys[0, head // share], memory.seen[0], positions)
                yield (depth, head), np.asarray(weights)[: len(codes)]


def _layer(model: SoundTransformer, depth: int) -> Layer:
    return model.layers[depth] if isinstance(model.layers, nnx.List) else jax.tree.map(lambda p: p[depth], model.layers)


@jax.jit
def _look(layer: Layer, x: Array, memory: Memory) -> tuple[Array, Array, Array]:
    return layer.look(x, memory)


def word_mass(maps: Float[np.ndarray, "heads F M"], words: Int[np.ndarray, " M"]) -> Float[np.ndarray, "F W"]:
    """The share of its look that each frame gives to each word: the mean over heads, the sum over the word's pieces."""
    rows = np.flatnonzero(words >= 0)
    mass = np.zeros((maps.shape[1], words.max(initial=-1) + 1), np.float32)
    np.add.at(mass.T, words[rows], maps.mean(0)[:, rows].T)
    return mass


def word_times(
    maps: Float[np.ndarray, "heads F M"], words: Int[np.ndarray, " M"], pace: float, blank: float, cut: bool = False
) -> Float[np.ndarray, "W 2"]:
    """Start and end of every word in seconds: dynamic time warping of words against frames.

    Words come in their order, each for a frame at least; between them, before and after may be stretches in which
    nothing is sung. Of all such paths this is the one with the most attention on it, where blanks count as `blank`.
    A chorus that comes again has rows of its own, later in the memory: its words are no other case. `pace` is frames a
    second. Where the song is `cut`, the path may end at any word; those after it start and end where the frames do.
    """
    mass = word_mass(maps, words)
    (frames, count), fold = mass.shape, 1
    if not count or not frames:
        return np.zeros((count, 2), np.float32)
    if count > frames and not cut:  # more words than frames: some share one
        fold = -(-count // frames)
        mass = mass.repeat(fold, axis=0)
    path = _best_path(mass, blank, cut)
    starts = np.searchsorted(path, np.arange(1, 2 * count, 2))  # the path never goes back
    ends = np.searchsorted(path, np.arange(1, 2 * count, 2), side="right")
    return (np.stack([starts, ends], axis=1) / (fold * pace)).astype(np.float32)


def _best_path(mass: np.ndarray, blank: float, cut: bool = False) -> np.ndarray:
    """State of each frame, [F]: word w is state 2 w + 1, the blanks around it are 2 w and 2 w + 2. Viterbi.

    It ends at the last word or the blank after it, or, `cut`, anywhere.
    """
    frames, count = mass.shape
    gain = np.full((frames, 2 * count + 1), blank, np.float32)
    gain[:, 1::2] = mass
    best = np.full(2 * count + 3, -np.inf)  # two states before the first, so that every state has two before it
    best[2:4] = gain[0, :2]
    skips = np.where(np.arange(2 * count + 1) % 2, 0.0, -np.inf)  # a word may follow the word before, a blank may not
    came = np.zeros(gain.shape, np.int8)  # states that were stepped over
    for frame in range(1, frames):
        choices = np.stack([best[2:], best[1:-1], best[:-2] + skips])
        came[frame] = choices.argmax(0)
        best[2:] = choices.max(0) + gain[frame]
    last = 0 if cut else 2 * count - 1
    state = 2 * count - int(best[2 + last :][::-1].argmax())  # the last of equals
    path = np.zeros(frames, np.int64)
    for frame in range(frames - 1, -1, -1):
        path[frame] = state
        state -= int(came[frame, state])
    return path


def align_song(
    model: SoundTransformer, layout: Layout, song: Teacher, reading: Reading, pace: float
) -> Float[np.ndarray, "W 2"]:
    """Start and end of every word in seconds. UserError where the song is longer than the window."""
    maps = attention_maps(model, layout, song.codes, song.prompt, reading.heads)
    return word_times(maps, song.words, pace, reading.blank, song.cut)


def alignment_errors(starts: Float[np.ndarray, " W"], truth: Float[np.ndarray, " W"]) -> Errors:
    """How far the starts are from the truth, both in seconds, where it is known (not NaN); songs may stand in a row."""
    errors = 1000 * np.abs(np.asarray(starts, np.float64) - truth)
    errors = errors[np.isfinite(errors)]
    if not len(errors):
        return Errors(0, *4 * (float("nan"),))
    return Errors(
        len(errors),
        *map(float, (np.median(errors), errors.mean(), np.mean(errors <= 100), np.mean(errors <= 300))),
    )


def choose_heads(
    model: SoundTransformer, layout: Layout, songs: Sequence[Teacher], pace: float
) -> tuple[Reading, Errors]:
    """The heads that follow the words best, and the errors of all of them together on these songs.

    Each head alone aligns the songs; of the best ones, by their mean error, as many are taken (at most `MOST`), with
    that blank, as together err least. Songs without times have no say, unless none has any: then one head is
    taken, the most diagonal by the share of its look that words get. UserError where there are no words.
    """
    timed = [(song, song.starts) for song in songs if song.starts is not None and np.isfinite(song.starts).any()]
    songs = [song for song in songs if (song.words >= 0).any()]
    if not songs:
        raise UserError("no song has words: heads are chosen on songs with lyrics, best with times (words.csv)")
    scores: dict[Head, list[float]] = collections.defaultdict(list)
    if not timed:
        for song in songs:
            for head, one in _each_map(model, layout, song.codes, song.prompt):
                mass = word_mass(one[None], song.words)
                scores[head].append(-float(diagonality(mass)) * mass.sum(1).mean())
        return Reading((min(scores, key=lambda head: sum(scores[head])),)), alignment_errors(np.zeros(0), np.zeros(0))

    truth = np.concatenate([starts for _, starts in timed])
    for song, starts in timed:
        for head, one in _each_map(model, layout, song.codes, song.prompt):
            found = word_times(one[None], song.words, pace, BLANK, song.cut)[:, 0]
            scores[head] += np.abs(found - starts)[np.isfinite(starts)].tolist()
    ranked = sorted(scores, key=lambda head: sum(scores[head]))[:MOST]
    maps = [dict(_each_map(model, layout, song.codes, song.prompt, ranked)) for song, _ in timed]
    choices = []
    for count, blank in itertools.product(range(1, len(ranked) + 1), BLANKS):
        chosen = sorted(ranked[:count])
        starts = [
            word_times(np.stack([one[head] for head in chosen]), song.words, pace, blank, song.cut)[:, 0]
            for (song, _), one in zip(timed, maps)
        ]
        choices.append((Reading(tuple(chosen), blank), alignment_errors(np.concatenate(starts), truth)))
    return min(choices, key=lambda choice: choice[1].mean_ms)
