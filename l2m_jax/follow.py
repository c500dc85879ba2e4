"""How far a model's attention follows the words, told while it trains, and a loss where it must. After `model`.

F frames, M rows of the memory, R those of them that are lyrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from l2m_jax.data import Dataset, Example, make_example, read_manifest
from l2m_jax.hosts import place
from l2m_jax.model import KINDS, LYRIC, Layer, SoundTransformer, prompt_of
from l2m_jax.sharding import batch_sharding
from l2m_jax.tokens import AnyArray, Layout


class Followed(NamedTuple):
    """Of the head that follows the words best."""

    diagonality: Float[Array, ""]  # mean over songs
    map: Float[Array, "F M"]  # of the first song


class Astray(NamedTuple):
    """What a head's look lacks at the word that is being sung."""

    nats: Float[Array, ""]  # minus the log of its weight there, summed
    positions: Int[Array, ""]  # over so many


def astray(
    keys: Float[Array, "B M H"],
    seen: Bool[Array, "B M"],
    times: Float[Array, "B S 2"],
    queries: Float[Array, "B T H"],
    frames: Float[Array, "1 T"],
    said: Bool[Array, "B T"],
) -> Astray:
    """How far a head's look goes astray at positions that say something of these `frames` while a word is sung.

    `times` are those of each row's word in frames, NaN where they are not known. A word of several pieces may be looked
    at in any of them. As a loss it makes attention walk along the words early on (compare Neekhara et al., 2024, where
    the times are not known).
    """
    scores = jnp.einsum("bth,bmh->btm", queries, keys, preferred_element_type=jnp.float32) * keys.shape[-1] ** -0.5
    times = jnp.pad(times, ((0, 0), (KINDS, 0), (0, 0)), constant_values=jnp.nan)[:, None]
    sung = (times[..., 0] <= frames[..., None]) & (frames[..., None] < times[..., 1]) & said[..., None] & seen[:, None]
    # -1e9, not -inf: rows without a sung word have a gradient too, of 0
    there = jax.nn.logsumexp(jnp.where(sung, scores, -1e9), axis=-1)
    weight = there - jax.nn.logsumexp(jnp.where(seen[:, None], scores, -1e9), axis=-1)
    some = sung.any(-1)
    return Astray(-jnp.where(some, weight, 0.0).sum(), some.sum())


def positions_of_a_frame(layout: Layout) -> int:
    """Positions that say a frame's codes, or in `delay` the one that says the first of them."""
    return layout.codebooks // layout.streams


@functools.partial(jax.jit, static_argnames="positions")
def frame_weights(
    queries: Float[Array, "T H"], keys: Float[Array, "M H"], seen: Bool[Array, " M"], positions: int
) -> Float[Array, "F M"]:
    """Attention weights of one head, the mean over each frame's `positions`; T that do not fill a frame are dropped."""
    frames = len(queries) // positions
    scores = jnp.einsum("th,mh->tm", queries, keys, preferred_element_type=jnp.float32) * queries.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return weights[: frames * positions].reshape(frames, positions, -1).mean(1)


def diagonality(mass: Float[AnyArray, "*heads F R"]) -> Float[Array, "*heads"]:
    """How much the attention goes forward with the song: 1 where it never goes back, 0 where it does not care.

    Of two looks drawn at random, each at a frame and a row by its mass, at different frames and rows: the chance that
    the later one is at the later row, minus the chance that it is at the earlier (Goodman and Kruskal's gamma). It
    asks for an order and not for a straight line, so that rests and long notes do not lower it. Rows are words or
    pieces of words, in their order; those that are none have no mass.
    """
    mass = jnp.asarray(mass)
    before = jnp.cumsum(mass, -2) - mass  # of each row, at earlier frames
    lower = jnp.cumsum(before, -1) - before
    higher = before.sum(-1, keepdims=True) - before - lower
    forth, back = (mass * lower).sum((-2, -1)), (mass * higher).sum((-2, -1))
    return (forth - back) / jnp.maximum(forth + back, jnp.finfo(mass.dtype).tiny)


def follow(model: SoundTransformer, layout: Layout, songs: Example, frames: Int[Array, " B"]) -> Followed:
    """The diagonality of the best head on songs that are `frames` long, and what it looks at; one head at a time."""
    ids, prompt = jnp.asarray(songs.ids), prompt_of(songs)
    memory = model.memory(prompt, jnp.ones((len(ids), KINDS), bool))
    lyrics = jnp.pad(songs.kind == LYRIC, ((0, 0), (KINDS, 0)))
    positions = positions_of_a_frame(layout)
    sung = jnp.arange(ids.shape[1] // positions) < frames[:, None]
    counts = sung[:, :, None] & lyrics[:, None]

    def look(best: Followed, head: tuple[Array, Array]) -> tuple[Followed, None]:
        maps = jax.vmap(functools.partial(frame_weights, positions=positions))(*head, memory.seen)
        found = Followed(diagonality(maps * counts).mean(), maps[0])
        return jax.tree.map(lambda a, b: jnp.where(found.diagonality > best.diagonality, a, b), found, best), None

    def apply(carry: tuple[Array, Followed], layer: Layer) -> tuple[tuple[Array, Followed], None]:
        x, best = carry
        x, queries, keys = layer.look(x, memory)
        keys = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
        best, _ = jax.lax.scan(look, best, (queries.swapaxes(0, 1), keys.swapaxes(0, 1)))
        return (x, best), None

    x = model.embed(ids, layout.place(jnp.arange(ids.shape[1])))
    none = Followed(jnp.array(-1.0), jnp.zeros((sung.shape[1], memory.seen.shape[1])))
    return jax.lax.scan(apply, (x, none), model.layers)[0][1]


def make_follow(
    dataset: Dataset, layout: Layout, memory: int, mesh: Mesh
) -> Callable[[SoundTransformer], tuple[float, Float[np.ndarray, "F R"]]]:
    """A function model -> (diagonality, map) on the first songs with lyrics, the fewest that divide over `mesh`.

    The map is that of the first song: its frames and its lyric rows. Without any lyrics the figure is 0. All processes
    take part.
    """
    songs = mesh.shape["data"] * mesh.shape["fsdp"]
    sung = [i for i, line in enumerate(read_manifest(dataset.folder)) if line["pieces"]] or [0]
    records = [dataset[sung[i % len(sung)]] for i in range(songs)]
    frames = np.array([min(len(record.codes), layout.frames) for record in records], np.int32)
    batch = Example(*map(np.stack, zip(*(make_example(record, layout, memory) for record in records))))
    rows = KINDS + np.flatnonzero(batch.kind[0] == LYRIC)
    run = jax.jit(functools.partial(follow, layout=layout), out_shardings=NamedSharding(mesh, PartitionSpec()))
    placed = place(batch_sharding(mesh), songs, range(songs), batch)

    def watch(model: SoundTransformer) -> tuple[float, np.ndarray]:
        best = run(model, songs=placed, frames=frames)
        return float(best.diagonality), np.asarray(best.map)[: frames[0], rows]

    return watch
