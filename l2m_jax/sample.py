"""The decode loop: from a memory to token ids, song by song until each one ends. After `rule`, before `train`.

It knows ids and a layout, neither lyrics nor sound. The cache starts small and grows through a few sizes, so that the
first second does not pay for a long song.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from l2m_jax.attention import to_pages
from l2m_jax.config import SampleConfig, UserError
from l2m_jax.model import KeysValues, Layer, Memory, Pages, Prompt, SoundTransformer
from l2m_jax.rule import draw, guide, penalise, variants
from l2m_jax.tokens import Layout, padded_length

FIRST, LONGEST = 75, 300  # frames between looks at the host: a stream begins early, and the longer it is the fewer
PAGE = 512  # positions; what one product reads of the cache


class SampleState(NamedTuple):
    """Where the loop stands."""

    position: Int[Array, ""]  # of the target that is drawn next
    heard: Int[Array, "B J"]  # input at that position
    said: Int[Array, "B T J"]  # targets so far; where codes are given, theirs
    end: Int[Array, " B"]  # frame at which each song ended; past the window where it has not
    logprob: Float[Array, " B"]  # of what was drawn, under the model's own distribution


class Context(NamedTuple):
    """What stays the same from step to step, computed once. R = B x variants rows: guidance computes several."""

    layers: list[Layer]  # unstacked: slices of the stack would be copied at every step
    lyrics: list[KeysValues]  # of each layer, [R, N, M, H]
    memory: Memory  # [R, M, D]
    luck: Float[Array, "B T J"]  # uniform in [0, 1): a number a draw
    given: Int[Array, " B"]  # frames that are said as they were given
    least: Int[Array, " B"]  # frame from which on END may come
    most: Int[Array, " B"]  # frame at which END must come


class Song(NamedTuple):
    """What was sampled."""

    codes: Int[np.ndarray, "F K"]
    ended: bool  # by itself, not by the length limit
    logprob: float  # of the drawn codes under the model's own distribution, natural logarithm


Cache = tuple[Pages, ...]  # a layer each


@functools.partial(jax.jit, static_argnames=("layout", "rule"), donate_argnames=("cache",))
def _segment(
    model: SoundTransformer,
    context: Context,
    state: SampleState,
    cache: Cache,
    stop: Int[Array, ""],
    layout: Layout,
    rule: SampleConfig,
) -> tuple[SampleState, Cache]:
    """Positions up to `stop`, or until every song has said all of its codes."""
    songs, count = state.heard.shape[0], len(variants(rule))
    window = min(rule.repetition_window * layout.codebooks // layout.streams, state.said.shape[1])

    def unfinished(carry: tuple[SampleState, Cache]) -> Array:
        state = carry[0]
        return (state.position < stop) & (state.position < layout.length(state.end)).any()

    def step(carry: tuple[SampleState, Cache]) -> tuple[SampleState, Cache]:
        (position, heard, said, end, logprob), cache = carry
        x = jnp.repeat(model.embed(heard[:, None], layout.place(position[None])), count, axis=0)
        kept = []
        for layer, lyrics, old in zip(context.layers, context.lyrics, cache):
            x, new = layer.step(x, old, lyrics, context.memory.seen, position)
            kept.append(new)
        logits = model.logits(x).reshape(songs, count, layout.streams, -1)
        allowed = layout.allowed(position, end, context.least, context.most)
        own = jax.nn.log_softmax(jnp.where(allowed, logits[:, -1], -jnp.inf))
        guided = guide(logits, rule)
        if rule.repetition_penalty != 1:
            first = jnp.maximum(position - window, 0)
            recent = jax.lax.dynamic_slice_in_dim(said, first, window, 1)
            recent = jnp.where((first + jnp.arange(window) < position)[:, None], recent, -1)
            guided = penalise(guided, recent, rule)
        ids = draw(guided, allowed, context.luck[:, position], rule).astype(jnp.int32)
        given = layout.target_frames(position) < context.given[:, None]
        ids = jnp.where(given, said[:, position], ids)
        drawn = jnp.where(given, 0.0, jnp.take_along_axis(own, ids[..., None], -1)[..., 0])
        ended = ids[:, 0] == layout.end
        after = SampleState(
            position=position + 1,
            heard=jnp.where(ids == layout.end, layout.pad, ids),
            said=jax.lax.dynamic_update_slice_in_dim(said, ids[:, None], position, 1),
            end=jnp.where(ended, jnp.minimum(end, layout.target_frames(position)[0]), end),
            logprob=logprob + drawn.sum(-1),
        )
        return after, tuple(kept)

    return jax.lax.while_loop(unfinished, step, (state, cache))


@functools.partial(jax.jit, static_argnames=("layout", "count", "page"))
def _prefill(
    model: SoundTransformer, memory: Memory, ids: Int[Array, "B C J"], layout: Layout, count: int, page: int
) -> Cache:
    """The cache of C positions whose inputs are known, in one forward pass."""
    x = jnp.repeat(model.embed(ids, layout.place(jnp.arange(ids.shape[1]))), count, axis=0)
    kept = jax.lax.scan(lambda x, layer: layer.prefill(x, memory), x, model.layers)[1]
    return tuple(Pages(*(to_pages(x[i], page) for x in kept)) for i in range(model.depth))


@functools.partial(jax.jit, static_argnames=("shape",))
def _context(
    model: SoundTransformer,
    rows: Prompt,
    kinds: Bool[Array, "R kinds"],
    keys: Key[Array, " B"],
    shape: tuple[int, int],
    given: Int[Array, " B"],
    least: Int[Array, " B"],
    most: Int[Array, " B"],
) -> Context:
    """What stays the same; `shape` is T and J. A draw's luck hangs on its song's key and its position alone."""
    memory, layers = model.memory(rows, kinds), model.unstacked()
    lyrics = [layer.cross_attention.keys_values(memory.states) for layer in layers]
    steps = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[0])))(keys)
    luck = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (shape[1],))))(steps)
    return Context(layers, lyrics, memory, luck, given, least, most)


@functools.partial(jax.jit, static_argnames="pages")
def _grow(cache: Array, pages: int) -> Array:
    return jnp.pad(cache, ((0, pages - len(cache)), (0, 0), (0, 0)))


def sample_states(
    model: SoundTransformer,
    layout: Layout,
    prompt: Prompt,
    rule: SampleConfig,
    seeds: Sequence[int],
    frames: int | Sequence[int],
    least: int | Sequence[int] = 0,
    given: Sequence[np.ndarray] | None = None,
) -> Iterator[SampleState]:
    """The state after every segment; the last one is whole.

    For each of the songs: its row of `prompt`, its seed, the longest (`frames`) and the shortest (`least`) that it may
    get, and the codes [F0, K] that it begins with, kept as they are; the draw begins after them. The same seed gives
    the same song within one batch size: 1, 2, 4, 8, ..., to which a batch is padded.
    UserError where lengths do not fit the window, or `given` is longer than its song may get.
    """
    songs = len(seeds)
    most, shortest = _each(frames, songs), _each(least, songs)
    if not 0 < min(most) <= max(most) <= layout.frames:
        wrong = next(n for n in most if not 0 < n <= layout.frames)
        raise UserError(f"the length limit is {wrong} frames; allowed: 1 to the model's window of {layout.frames}")
    given = [np.zeros((0, layout.codebooks), np.int32)] * songs if given is None else given
    for codes, limit in zip(given, most):
        if len(codes) > limit:
            raise UserError(f"{len(codes)} frames are given, the song may get {limit}: give fewer, or allow more")
        if codes.size and not 0 <= codes.min() <= codes.max() < layout.entries:
            raise UserError(
                f"given codes reach from {codes.min()} to {codes.max()}; allowed: 0 to {layout.entries - 1}"
            )
    padding = (1 << (songs - 1).bit_length()) - songs
    prompt, count = jax.tree.map(lambda x: _pad(np.asarray(x), padding), prompt), len(variants(rule))
    tokens = [layout.encode(codes) for codes in given] + [layout.encode(given[0][:0])] * padding
    known = [len(codes) for codes in given] + [0] * padding
    length, room = layout.length(max(most)), padded_length(layout.length(max(most)))
    context = _context(
        model,
        jax.tree.map(lambda x: np.repeat(x, count, axis=0), prompt),
        np.tile(variants(rule), (songs + padding, 1)),
        jnp.stack([jax.random.key(seed) for seed in [*seeds, *[0] * padding]]),
        (room, layout.streams),
        np.array(known),
        np.array([max(pair) for pair in zip(map(min, shortest, most), known)] + [0] * padding),
        np.array([*most, *[0] * padding]),  # what pads the batch ends at once
    )
    position = min(map(len, given)) * layout.codebooks // layout.streams
    ids = np.stack([t.ids for t in tokens])
    page = min(PAGE, room)
    size = page
    while size < position:
        size = _larger(size, page)
    heads, width = context.lyrics[0].keys.shape[1::2]
    rows = count * (songs + padding) * heads
    if position:
        known_ids = np.pad(ids, ((0, 0), (0, max(size - ids.shape[1], 0)), (0, 0)))[:, :size]
        cache = list(_prefill(model, context.memory, known_ids, layout, count, page))
    else:
        empty = (rows * (size // page), page, width)
        cache = [Pages(jnp.zeros(empty, model.dtype), jnp.zeros(empty, model.dtype)) for _ in context.layers]
    state = SampleState(
        position=jnp.array(position),
        heard=jnp.asarray(ids[:, position]),
        said=jnp.asarray(np.stack([t.targets[:room] for t in tokens])),
        end=jnp.full(songs + padding, layout.frames + 1),
        logprob=jnp.zeros(songs + padding),
    )
    segment = FIRST * layout.codebooks // layout.streams
    longest, done = segment * LONGEST // FIRST, position
    while position < length:
        stop = min(position + segment, length)
        segment = min(max(segment, stop - done), longest)
        while stop > size:
            size = _larger(size, page)
        for i, layer in enumerate(cache):  # one after the other: never is there more than one layer twice
            cache[i] = Pages(*(_grow(x, rows * size // page) for x in layer))
        state, kept = _segment(model, context, state, tuple(cache), jnp.array(stop), layout, rule)
        cache = list(kept)
        yield SampleState(state.position, *(x[:songs] for x in state[1:]))
        if int(state.position) < stop:  # every song has ended
            return
        position = stop


def _larger(size: int, page: int) -> int:
    return size + -(-size // (4 * page)) * page


def _each(value: int | Sequence[int], songs: int) -> list[int]:
    return [value] * songs if isinstance(value, int) else list(value)


def _pad(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:1], count, axis=0)])


def said(state: SampleState, layout: Layout, frames: int | Sequence[int]) -> list[Song]:
    """The songs as far as they are complete: for `delay` without the frames whose later codebooks are still to come.

    Works on every state. `frames` is the limit that `sample_states` had. `logprob` is the model's own: of the codes
    that were drawn (given ones do not count) and of END, given lyrics and genre, at temperature 1, without guidance,
    repetition control or filters.
    """
    targets, end, logprob = (np.asarray(x) for x in (state.said, state.end, state.logprob))
    limits = np.array(_each(frames, len(end)))
    complete = max(int(layout.target_frames(state.position)[-1]), 0)
    lengths = np.minimum(np.minimum(end, limits), complete)
    ended = (end < limits) & (end <= complete)
    return [
        Song(layout.decode(ids, int(n)), bool(e), float(p)) for ids, n, e, p in zip(targets, lengths, ended, logprob)
    ]


finished = said  # the songs of the last state


def sample_codes(
    model: SoundTransformer, layout: Layout, prompt: Prompt, rule: SampleConfig, seeds: Sequence[int], frames: int
) -> list[Song]:
    """The songs of the prompts, to their ends or to `frames`."""
    last = collections.deque(sample_states(model, layout, prompt, rule, seeds, frames), maxlen=1).pop()
    return said(last, layout, frames)
