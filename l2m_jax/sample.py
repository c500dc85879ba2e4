"""The decode loop: from a memory to token ids, song by song until each one ends. After `log`, before `train`.

Four parts: rule (logits -> ids), state, loop, and the caller `sample_codes`. It knows ids and a layout, neither lyrics
nor sound. The cache starts small and grows through a few sizes, so that the first second does not pay for a long song.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from l2m_jax.config import SampleConfig, UserError
from l2m_jax.model import KINDS, KeysValues, Memory, Prompt, SoundTransformer
from l2m_jax.tokens import Layout, padded_length

SEGMENT = 256  # positions between looks at the host: progress, early stop
SMALLEST_CACHE = 512


class SampleState(NamedTuple):
    """Where the loop stands. R = B x variants rows: with guidance each song is computed in three variants."""

    position: Int[Array, ""]  # of the target that is drawn next
    heard: Int[Array, "B J"]  # input at that position
    said: Int[Array, "B T J"]  # targets so far
    end: Int[Array, " B"]  # frame at which each song ended; past the window where it has not
    logprob: Float[Array, " B"]  # of what was said, under the distribution it was drawn from
    cache: tuple[KeysValues, ...]  # a layer each, [R, N, C, H]


class Limits(NamedTuple):
    """Frames: END may come from `least` on and must come at `most`."""

    least: Int[Array, " B"]
    most: Int[Array, " B"]


class Song(NamedTuple):
    """What was sampled."""

    codes: Int[np.ndarray, "F K"]
    ended: bool  # by itself, not by the length limit
    logprob: float  # sum over its codes, natural logarithm


def draw(
    logits: Float[Array, "B J W"], allowed: Bool[Array, "B J W"], keys: Key[Array, " B"], rule: SampleConfig
) -> tuple[Int[Array, "B J"], Float[Array, "B J"]]:
    """Ids drawn from the allowed logits, with the log-probability of each under the rule's distribution.

    Temperature first, then the k likeliest (Fan et al., 2018), then the nucleus of mass p (Holtzman et al., 2020).
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    if rule.temperature == 0:
        ids = logits.argmax(-1)
        return ids, jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]
    logits = logits / rule.temperature
    width = logits.shape[-1]
    kept = min(rule.top_k or width, width)
    if kept < width or rule.top_p < 1:
        best, order = jax.lax.top_k(logits, kept)
        if rule.top_p < 1:
            before = jnp.cumsum(jax.nn.softmax(best), -1) - jax.nn.softmax(best)
            best = jnp.where(before < rule.top_p, best, -jnp.inf)
    else:
        best, order = logits, jnp.broadcast_to(jnp.arange(width), logits.shape)
    chosen = jax.vmap(jax.random.categorical)(keys, best)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(best), chosen[..., None], -1)[..., 0]
    return jnp.take_along_axis(order, chosen[..., None], -1)[..., 0], logprob


def guide(logits: Float[Array, "B variants J W"], rule: SampleConfig) -> Float[Array, "B J W"]:
    """l(0, 0) + g_genre (l(0, genre) - l(0, 0)) + g_lyrics (l(lyrics, genre) - l(0, genre)).

    Classifier-free guidance with a weight for each condition (Ho and Salimans, 2022; Brooks et al., 2023).
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    none, genre, both = logits[:, 0], logits[:, 1], logits[:, 2]
    guided = none + rule.guidance_genre * (genre - none) + rule.guidance_lyrics * (both - genre)
    return jnp.where(jnp.isfinite(both), guided, -jnp.inf)  # ids that pad the space are -inf in all three


def variants(rule: SampleConfig) -> Bool[np.ndarray, "variants kinds"]:
    """Which kinds (genre, lyrics) each variant keeps: all in one where nothing is guided."""
    if rule.guidance_lyrics == 1 and rule.guidance_genre == 1:
        return np.ones((1, KINDS), bool)
    return np.array([[False, False], [True, False], [True, True]])


@functools.partial(jax.jit, static_argnames=("layout", "rule"), donate_argnames=("state",))
def _segment(
    model: SoundTransformer,
    memory: Memory,
    state: SampleState,
    keys: Key[Array, " B"],
    limits: Limits,
    stop: Int[Array, ""],
    layout: Layout,
    rule: SampleConfig,
) -> SampleState:
    """Positions up to `stop`, or until every song has said all of its codes."""
    layers = model.unstacked()
    lyrics = [layer.cross_attention.keys_values(memory.states) for layer in layers]
    songs, count = state.heard.shape[0], len(variants(rule))

    def unfinished(state: SampleState) -> Array:
        return (state.position < stop) & (state.position < layout.length(state.end)).any()

    def step(state: SampleState) -> SampleState:
        place = layout.place(state.position[None])
        x = jnp.repeat(model.embed(state.heard[:, None], place), count, axis=0)
        cache = []
        for layer, keys_values, kept in zip(layers, lyrics, state.cache):
            x, kept = layer.step(x, kept, keys_values, memory.seen, state.position)
            cache.append(kept)
        logits = guide(model.logits(x).reshape(songs, count, layout.streams, -1), rule)
        allowed = layout.allowed(state.position, state.end, *limits)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.position)
        ids, logprob = draw(logits, allowed, step_keys, rule)
        ended = ids[:, 0] == layout.end
        return SampleState(
            position=state.position + 1,
            heard=jnp.where(ids == layout.end, layout.pad, ids),
            said=jax.lax.dynamic_update_slice_in_dim(state.said, ids[:, None].astype(jnp.int32), state.position, 1),
            end=jnp.where(ended, jnp.minimum(state.end, layout.head_frame(state.position)), state.end),
            logprob=state.logprob + logprob.sum(-1),
            cache=tuple(cache),
        )

    return jax.lax.while_loop(unfinished, step, state)


@functools.partial(jax.jit, static_argnames=("size",))
def _grow(cache: tuple[KeysValues, ...], size: int) -> tuple[KeysValues, ...]:
    return jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, 0), (0, size - c.shape[2]), (0, 0))), cache)


def start(model: SoundTransformer, layout: Layout, songs: int, rows: int, positions: int) -> SampleState:
    """The state before the first code, with the smallest cache."""
    attention = model.layers.self_attention
    shape = (rows, attention.heads, min(SMALLEST_CACHE, positions), attention.key.out_features // attention.heads)
    empty = [KeysValues(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)) for _ in range(model.depth)]
    return SampleState(
        position=jnp.array(0),
        heard=jnp.full((songs, layout.streams), layout.bos, jnp.int32),
        said=jnp.full((songs, positions, layout.streams), layout.pad, jnp.int32),
        end=jnp.full(songs, layout.frames + 1),
        logprob=jnp.zeros(songs),
        cache=tuple(empty),
    )


def sample_states(
    model: SoundTransformer,
    layout: Layout,
    prompt: Prompt,
    rule: SampleConfig,
    seeds: list[int],
    frames: int,
    least: int = 0,
) -> Iterator[SampleState]:
    """The state after every segment; the last one is whole. The same seed gives the same song within one batch size.

    `frames` is the longest a song may get, `least` the shortest; UserError where they do not fit the window.
    """
    if not 0 < frames <= layout.frames:
        raise UserError(f"the length limit is {frames} frames; allowed: 1 to the model's window of {layout.frames}")
    songs, kinds = len(seeds), variants(rule)
    rows = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), len(kinds), axis=0), prompt)
    memory = jax.jit(SoundTransformer.memory)(model, rows, jnp.tile(kinds, (songs, 1)))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    limits = Limits(jnp.full(songs, min(least, frames)), jnp.full(songs, frames))
    length = layout.length(frames)
    state = start(model, layout, songs, len(kinds) * songs, padded_length(length))
    position = 0
    while position < length:
        stop = min(position + SEGMENT, length)
        size = state.cache[0].keys.shape[2]
        if stop > size:
            state = state._replace(cache=_grow(state.cache, min(2 * size, padded_length(length))))
        state = _segment(model, memory, state, keys, limits, jnp.array(stop), layout, rule)
        yield state
        if int(state.position) < stop:  # every song has ended
            return
        position = stop


def finished(state: SampleState, layout: Layout, frames: int) -> list[Song]:
    """The songs of the last state."""
    said, end, logprob = (np.asarray(x) for x in (state.said, state.end, state.logprob))
    lengths = np.minimum(end, frames)
    return [Song(layout.decode(ids, int(n)), bool(n < frames), float(p)) for ids, n, p in zip(said, lengths, logprob)]


def sample_codes(
    model: SoundTransformer, layout: Layout, prompt: Prompt, rule: SampleConfig, seeds: list[int], frames: int
) -> list[Song]:
    """The songs of the prompts, to their ends or to `frames`."""
    last = collections.deque(sample_states(model, layout, prompt, rule, seeds, frames), maxlen=1).pop()
    return finished(last, layout, frames)
