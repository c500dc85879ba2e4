"""The decode loop: from a memory to token ids, song by song until each one ends. After `rule`, before `train`.

It knows ids and a layout, neither lyrics nor sound. The cache starts small and grows through a few sizes, so that the
first second does not pay for a long song.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from l2m_jax.attention import as_columns, platform
from l2m_jax.config import SampleConfig, UserError
from l2m_jax.model import Cache, LyricCache, Memory, Prompt, SoundTransformer
from l2m_jax.rule import Rule, draw, guide, make_rule, penalise, variants
from l2m_jax.tokens import Layout

FIRST, LONGEST = 75, 300  # frames between looks at the host: a stream begins early, and the longer it is the fewer
ROOM = 512  # positions by which the cache grows at least
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class SampleState(NamedTuple):
    """Where the loop stands."""

    position: Int[Array, ""]  # of the target that is drawn next
    heard: Int[Array, "B J"]  # input at that position
    said: Int[Array, "B T J"]  # targets so far
    end: Int[Array, " B"]  # frame at which each song ended; past the window where it has not
    logprob: Float[Array, " B"]  # of what was drawn, under the model's own distribution


class Context(NamedTuple):
    """What stays the same from step to step, computed once. R = B x variants rows: guidance computes several."""

    lyrics: list[LyricCache]  # of each layer
    memory: Memory  # [R, M, D]
    rule: Rule
    luck: Float[Array, "B T J"]  # uniform in [0, 1): a number a draw
    given: Int[Array, "B T J"]  # targets that are said as they were given; -1 where they are drawn
    least: Int[Array, " B"]  # frame from which on END may come
    most: Int[Array, " B"]  # frame at which END must come


class Song(NamedTuple):
    """What was sampled."""

    codes: Int[np.ndarray, "F K"]
    ended: bool  # by itself, not by the length limit
    logprob: float  # of the drawn codes under the model's own distribution, natural logarithm


def segment(
    model: SoundTransformer,
    context: Context,
    state: SampleState,
    cache: list[Cache],
    stop: Int[Array, ""],
    layout: Layout,
    window: int,
) -> tuple[SampleState, list[Cache]]:
    """Positions up to `stop`, or until every song has said all of its codes; `window` is repetition control's."""
    songs, count = state.heard.shape[0], len(context.rule.guidance)

    def unfinished(carry: tuple[SampleState, list[Cache]]) -> Array:
        state = carry[0]
        return (state.position < stop) & (state.position < layout.length(state.end)).any()

    def step(carry: tuple[SampleState, list[Cache]]) -> tuple[SampleState, list[Cache]]:
        (position, heard, said, end, logprob), cache = carry
        x = jnp.repeat(model.embed(heard[:, None], layout.place(position[None])), count, axis=0)
        kept = []
        for layer, lyrics, old in zip(model.layers, context.lyrics, cache):
            x, new = layer.step(x, old, lyrics, position)
            kept.append(new)
        logits = model.logits(x).reshape(songs, count, layout.streams, -1)
        allowed = layout.allowed(position, end, context.least, context.most)
        own = jax.nn.log_softmax(jnp.where(allowed, logits[:, -1], -jnp.inf))
        logits = guide(logits, context.rule)
        if context.rule.repetition is not None:
            first = jnp.maximum(position - window, 0)
            recent = jax.lax.dynamic_slice_in_dim(said, first, window, 1)
            recent = jnp.where((first + jnp.arange(window) < position)[:, None], recent, -1)
            logits = penalise(logits, recent, context.rule.repetition)
        ids = draw(logits, allowed, context.luck[:, position], context.rule).astype(jnp.int32)
        given = context.given[:, position]
        drawn = jnp.where(given < 0, jnp.take_along_axis(own, ids[..., None], -1)[..., 0], 0.0)
        ids = jnp.where(given < 0, ids, given)
        ended = ids[:, 0] == layout.end
        after = SampleState(
            position=position + 1,
            heard=jnp.where(ids == layout.end, layout.pad, ids),
            said=jax.lax.dynamic_update_slice_in_dim(said, ids[:, None], position, 1),
            end=jnp.where(ended, jnp.minimum(end, layout.target_frames(position)[0]), end),
            logprob=logprob + drawn.sum(-1),
        )
        return after, kept

    return jax.lax.while_loop(unfinished, step, (state, cache))


_segment = jax.jit(segment, static_argnames=("layout", "window"), donate_argnames="cache")


@functools.partial(jax.jit, static_argnames=("songs", "layout"))
def _first(given: Int[Array, "B T J"], position: Int[Array, ""], songs: int, layout: Layout) -> SampleState:
    """The state at `position`, before which every song's targets are given."""
    targets = jnp.where(given < 0, layout.pad, given)
    return SampleState(
        position=position,
        heard=jnp.where(position == 0, layout.bos, targets[:, jnp.maximum(position - 1, 0)]),
        said=targets,
        end=jnp.where(jnp.arange(len(given)) < songs, layout.frames + 1, 0),  # what pads the batch has ended
        logprob=jnp.zeros(len(given)),
    )


@functools.partial(jax.jit, static_argnames=("layout", "size"))
def _prefill(model: SoundTransformer, context: Context, layout: Layout, size: int) -> list[Cache]:
    """The cache of `size` positions with their inputs given, in one forward pass; those not given are written later."""
    heard = jnp.pad(context.given, ((0, 0), (1, 0), (0, 0)), constant_values=layout.bos)
    heard = jnp.where(heard < 0, layout.pad, heard)[:, :size]
    x = jnp.repeat(model.embed(heard, layout.place(jnp.arange(size))), len(context.rule.guidance), axis=0)
    cache = []
    for layer in model.layers:
        x, kept = layer.prefill(x, context.memory)
        cache.append(Cache(*map(as_columns, kept)))
    return cache


@functools.partial(jax.jit, static_argnames=("layout",))
def _context(
    model: SoundTransformer,
    rule: Rule,
    rows: Prompt,
    kinds: Bool[Array, "R kinds"],
    seeds: UInt32[Array, " B"],
    known: Int[Array, " B"],
    targets: Int[Array, "B T J"],
    least: Int[Array, " B"],
    most: Int[Array, " B"],
    layout: Layout,
) -> Context:
    """What stays the same; `known` frames of the targets are given. A draw's luck hangs on seed and position."""
    memory = model.memory(rows, kinds)
    lyrics = [layer.lyrics(memory) for layer in model.layers]

    def fortune(seed: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position), (layout.streams,))

    positions = jnp.arange(layout.positions)
    luck = jax.vmap(jax.vmap(fortune, (None, 0)), (0, None))(seeds, positions)
    frames = jax.vmap(layout.target_frames)(positions)
    given = jnp.where(frames < known[:, None, None], targets, -1)
    return Context(lyrics, memory, rule, luck, given, least, most)


def empty_cache(model: SoundTransformer, context: Context, size: int) -> list[Cache]:
    """Room for `size` positions in every layer, as many rows as the lyrics' keys have."""
    shape = (*context.lyrics[0].keys.shape[:-1], size)
    return [Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)) for _ in model.layers]


def grow(cache: list[Cache], size: int) -> None:
    """Gives every layer room for `size` positions, one array after the other: never is there more than one twice."""
    for i, name in itertools.product(range(len(cache)), Cache._fields):
        if (old := getattr(cache[i], name)).shape[-1] < size:
            longer = jax.block_until_ready(_longer(old, size))  # else all of them are allocated before one is freed
            cache[i] = cache[i]._replace(**{name: longer})
            del old, longer
            trim()


def trim() -> None:
    """Freed memory goes back to the system: glibc keeps arrays of some MiB, as much as the cache is big."""
    if MALLOC_TRIM and platform() == "cpu":
        MALLOC_TRIM(0)


@functools.partial(jax.jit, static_argnames="size")
def _longer(x: Float[Array, "*R H C"], size: int) -> Float[Array, "*R H size"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def cache_size(positions: int, layout: Layout) -> int:
    """Positions of the cache in which `positions` are run: few sizes are few compilations, small steps little waste."""
    step = ROOM * (1 if positions <= 4 * ROOM else 2 if positions <= 12 * ROOM else 4)
    if layout.positions <= 2 * ROOM:
        step = layout.positions
    return min(-(-positions // step) * step, layout.positions)


def sample_states(
    model: SoundTransformer,
    layout: Layout,
    prompt: Prompt,
    rule: SampleConfig,
    seeds: Sequence[int],
    frames: int | Sequence[int],
    least: int | Sequence[int] = 0,
    given: Sequence[Int[np.ndarray, "_ K"]] | None = None,
) -> Iterator[SampleState]:
    """The state after every segment; the last one is whole.

    For each of the songs: its row of `prompt`, its seed, the longest (`frames`) and the shortest (`least`) that it may
    get, and the codes [F0, K] that it begins with, kept as they are; the draw begins after them. The same seed gives
    the same song within one batch size: 1, 2, 4, 8, ..., to which a batch is padded.
    UserError where lengths do not fit the window, or `given` is longer than its song may get.
    """
    songs = len(seeds)
    most, shortest = _each(frames, songs), _each(least, songs)
    given = [np.zeros((0, layout.codebooks), np.int32)] * songs if given is None else given
    _check(layout, most, given)
    model = model.unstacked()
    context = _start(model, layout, prompt, rule, seeds, most, shortest, given)
    position = min(map(len, given)) * layout.codebooks // layout.streams  # the first that is not given to every song
    size = cache_size(position + 1, layout)
    if position:
        cache = _prefill(model, context, layout, size)
    else:
        cache = empty_cache(model, context, size)
    state = _first(context.given, np.int32(position), songs, layout)
    window = min(rule.repetition_window * layout.codebooks // layout.streams, layout.positions)
    window = window if context.rule.repetition is not None else 0
    begun, stretch = position, FIRST * layout.codebooks // layout.streams
    while position < layout.length(max(most)):
        stop = min(position + stretch, layout.length(max(most)))
        stretch = min(max(stretch, stop - begun), LONGEST * layout.codebooks // layout.streams)
        grow(cache, cache_size(stop, layout))
        state, cache = _segment(model, context, state, cache, np.int32(stop), layout, window)
        yield SampleState(state.position, *(x[:songs] for x in state[1:]))
        if int(state.position) < stop:  # every song has ended
            return
        position = stop


def _check(layout: Layout, most: list[int], given: Sequence[np.ndarray]) -> None:
    for limit, codes in zip(most, given):
        if not 0 < limit <= layout.frames:
            raise UserError(f"the length limit is {limit} frames; allowed: 1 to the model's window of {layout.frames}")
        if len(codes) > limit:
            raise UserError(f"{len(codes)} frames are given and the song may get {limit}: give fewer, or allow more")
        if codes.size and not 0 <= codes.min() <= codes.max() < layout.entries:
            raise UserError(f"given codes are {codes.min()} to {codes.max()}; allowed: 0 to {layout.entries - 1}")


def _start(
    model: SoundTransformer,
    layout: Layout,
    prompt: Prompt,
    config: SampleConfig,
    seeds: Sequence[int],
    most: list[int],
    least: list[int],
    given: Sequence[np.ndarray],
) -> Context:
    """The context of a batch that is padded to 1, 2, 4, 8, ... songs with copies of the first."""
    kinds = variants(config)
    batch = 1 << (len(seeds) - 1).bit_length()

    def pad(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.repeat(values[:1], batch - len(values), axis=0)])

    known = np.array([len(codes) for codes in given] + [0] * (batch - len(given)))
    return _context(
        model,
        make_rule(config),
        jax.tree.map(lambda x: np.repeat(pad(np.asarray(x)), len(kinds), axis=0), prompt),
        np.tile(kinds, (batch, 1)),
        pad(np.array(seeds, np.uint32)),
        known,
        pad(np.stack([layout.encode(codes).targets for codes in given])),
        pad(np.minimum(np.maximum(least, known[: len(given)]), most)),
        pad(np.array(most)),
        layout,
    )


def _each(value: int | Sequence[int], songs: int) -> list[int]:
    return [value] * songs if isinstance(value, int) else list(value)


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


def sample_codes(
    model: SoundTransformer, layout: Layout, prompt: Prompt, rule: SampleConfig, seeds: Sequence[int], frames: int
) -> list[Song]:
    """The songs of the prompts, to their ends or to `frames`."""
    last = collections.deque(sample_states(model, layout, prompt, rule, seeds, frames), maxlen=1).pop()
    return said(last, layout, frames)
