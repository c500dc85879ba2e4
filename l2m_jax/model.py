"""The SoundTransformer: next-code logits from the codes before and every word of the lyrics. Only mathematics.

After `attention`, before `follow`. With a the residual scale and M the memory:

    x = LN(a x + SelfAttention(x));   x = LN(a x + CrossAttention(x, M));   x = LN(a x + MLP(x))

or, with norm "pre", x = x + f(LN(x)) for each of the three, and an LN after the last layer. Parameters are float32;
`dtype` is what products are computed in. Layers are stacked and scanned.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from l2m_jax.attention import as_columns, as_rows, attention, platform, step_attention, write
from l2m_jax.blockwise import KEPT
from l2m_jax.config import ModelConfig
from l2m_jax.lyrics import SECTIONS
from l2m_jax.sharding import SONGS, gathered, spread
from l2m_jax.tokens import AnyArray, Place, make_layout

GENRE, LYRIC = 0, 1
KINDS = 2
STRIP = 1024  # positions
Remat = Literal["none", "attention", "layer"]


class Prompt(NamedTuple):
    """Genre and lyrics of each song as text states, padded to the memory length. Rows of kind -1 are padding."""

    states: Float[AnyArray, "B S E"]
    kind: Int[AnyArray, "B S"]
    section: Int[AnyArray, "B S"]
    position: Int[AnyArray, "B S"]


def prompt_of(example: Any) -> Prompt:
    """The part of a `data.Example` that is the prompt."""
    return Prompt(*(getattr(example, name) for name in Prompt._fields))


class Memory(NamedTuple):
    """What cross-attention looks at: a null row a kind, then the prompt's rows."""

    states: Float[Array, "B M D"]
    seen: Bool[Array, "B M"]


class KeysValues(NamedTuple):
    """Keys and values, heads before positions."""

    keys: Float[Array, "B K C H"]
    values: Float[Array, "B K C H"]


class Cache(NamedTuple):
    """Keys and values of the positions so far, as `attention.as_columns`; room for more behind them."""

    keys: Float[Array, "*R H C"]
    values: Float[Array, "*R H C"]


class LyricCache(NamedTuple):
    """What a layer's decode steps look at, as `attention.as_columns`."""

    keys: Float[Array, "*R H M"]
    values: Float[Array, "*R H M"]
    seen: Bool[Array, "*R M"]


class Look(NamedTuple):
    """How one head looks at the memory."""

    queries: Float[Array, "B T H"]
    keys: Float[Array, "B M H"]


class Attention(nnx.Module):
    """Multi-head attention; what it attends to is the caller's."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        plain, gained = _xavier(1.0), _xavier(config.initial_gain)
        self.head_width, queries, keys = config.head_width, config.query_width, config.key_width
        self.query = _linear(config.width, queries, plain, dtype, rngs)
        self.key = _linear(config.width, keys, plain, dtype, rngs)
        self.value = _linear(config.width, keys, gained, dtype, rngs)
        self.out = _linear(queries, config.width, gained, dtype, rngs)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.head_width).swapaxes(1, 2)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B N T H"]:
        """Queries of each head."""
        return self._split(_of_rows(self.query, x))

    def keys_values(self, x: Float[Array, "B T D"]) -> KeysValues:
        """Keys and values of each key head."""
        return KeysValues(self._split(_of_rows(self.key, x)), self._split(_of_rows(self.value, x)))

    def merge(self, heads: Float[Array, "B N T H"]) -> Float[Array, "B T D"]:
        """The heads' results put together."""
        return _of_rows(self.out, heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1))


class Layer(nnx.Module):
    """Self-attention, cross-attention and MLP, each with a LayerNorm, of the scaled residual or (pre) of its input."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        gained = _xavier(config.initial_gain)
        self.scale, self.pre, self.rotary = config.residual_scale, config.norm == "pre", config.rotary
        self.self_attention = Attention(config, dtype, rngs=rngs)
        self.cross_attention = Attention(config, dtype, rngs=rngs)
        self.up = _linear(config.width, 4 * config.width, gained, dtype, rngs)
        self.down = _linear(4 * config.width, config.width, gained, dtype, rngs)
        self.norm1 = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.norm3 = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], memory: Memory, strip: int = 0) -> tuple[Float[Array, "B T D"], Look]:
        """The whole sequence at once (training), and how the first head looks at the memory.

        What follows self-attention is computed by `strip` positions, if that is not 0, and anew by the backward pass:
        what is D or 4 D wide never stands whole.
        """
        attended, _ = self._attend(x)
        lyrics = self.cross_attention.keys_values(memory.states)

        def rest(x: Array, attended: Array) -> tuple[Array, Array]:
            x, queries = self._rest(x, attended, lambda q: attention(q, *lyrics, memory.seen))
            return x, queries[:, 0]

        if not strip or x.shape[1] % strip:
            x, queries = rest(x, attended)
        else:
            x = jnp.moveaxis(x.reshape(len(x), -1, strip, x.shape[2]), 1, 0)
            attended = jnp.moveaxis(attended.reshape(*attended.shape[:2], -1, strip, attended.shape[3]), 2, 0)
            parts = jax.lax.map(lambda part: jax.checkpoint(rest, prevent_cse=False)(*part), (x, attended))
            x, queries = (jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[3]) for y in parts)
        return x, Look(queries, lyrics.keys[:, 0])

    def prefill(self, x: Float[Array, "B T D"], memory: Memory) -> tuple[Float[Array, "B T D"], KeysValues]:
        """The whole sequence at once, with its keys and values for the steps that follow."""
        attended, kept = self._attend(x)
        lyrics = self.cross_attention.keys_values(memory.states)
        return self._rest(x, attended, lambda q: attention(q, *lyrics, memory.seen))[0], kept

    def look(
        self, x: Float[Array, "B T D"], memory: Memory
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N T H"], Float[Array, "B _ M H"]]:
        """The whole sequence at once, with queries and keys of the cross-attention: what looks at which word."""
        attended, _ = self._attend(x)
        lyrics = self.cross_attention.keys_values(memory.states)
        return *self._rest(x, attended, lambda q: attention(q, *lyrics, memory.seen)), lyrics.keys

    def lyrics(self, memory: Memory) -> LyricCache:
        """What `step` looks at, computed once."""
        keys, values = self.cross_attention.keys_values(memory.states)
        seen = jnp.broadcast_to(memory.seen[:, None], keys.shape[:3])
        return LyricCache(as_columns(keys), as_columns(values), as_rows(seen))

    def step(
        self, x: Float[Array, "B 1 D"], cache: Cache, lyrics: LyricCache, at: Int[Array, ""]
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Position `at`: its keys and values are written into the cache, which is returned."""
        queries, new = self._ask(x, at[None])
        cache = Cache(write(cache.keys, new.keys, at), write(cache.values, new.values, at))
        heard = jnp.arange(cache.keys.shape[-1]) <= at
        attended = step_attention(queries, *cache, heard)
        return self._rest(x, attended, lambda q: step_attention(q, *lyrics))[0], cache

    def _attend(self, x: Array) -> tuple[Array, KeysValues]:
        """What self-attention finds in the whole sequence, and its keys and values."""
        queries, kept = self._ask(x, jnp.arange(x.shape[1]))
        return attention(queries, *kept), kept

    def _ask(self, x: Float[Array, "B T D"], position: Int[Array, " T"]) -> tuple[Array, KeysValues]:
        """Queries, keys and values of self-attention."""
        before = self._before(self.norm1, x)
        queries, kept = self.self_attention.queries(before), self.self_attention.keys_values(before)
        if self.rotary:
            queries, kept = turned(queries, position), kept._replace(keys=turned(kept.keys, position))
        return queries, kept

    def _rest(self, x: Array, attended: Array, look: Callable[[Array], Array]) -> tuple[Array, Array]:
        """What follows self-attention, and the queries of the cross-attention; `look` is what that finds for them."""
        x = self._after(self.norm1, x, self.self_attention.merge(attended))
        queries = self.cross_attention.queries(self._before(self.norm2, x))
        x = self._after(self.norm2, x, self.cross_attention.merge(look(queries)))
        found = _of_rows(lambda x: self.down(jax.nn.gelu(self.up(x))), self._before(self.norm3, x))
        return self._after(self.norm3, x, found), queries

    def _before(self, norm: nnx.LayerNorm, x: Array) -> Array:
        """What a sublayer is given."""
        return _of_rows(norm, x) if self.pre else x

    def _after(self, norm: nnx.LayerNorm, x: Array, found: Array) -> Array:
        """The residual, with what a sublayer found."""
        return x + found if self.pre else _of_rows(norm, self.scale * x + found)


class SoundTransformer(nnx.Module):
    """Embeddings, memory, L layers and the output heads; the layout's `streams` J and `id_space` W give the shapes."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        layout = make_layout(config)
        dtype = compute_dtype(config)
        embed = nnx.initializers.normal(0.02)

        def table(rows: int) -> nnx.Param:
            return nnx.Param(embed(rngs.params(), (rows, config.width), jnp.float32))

        self.streams, self.id_space, self.last_id, self.dtype = layout.streams, layout.id_space, layout.pad, dtype
        self.token_embedding = table(layout.streams * layout.id_space)
        self.codebook_embedding = table(config.codebooks + 1)
        self.position_embedding = table(config.frames + config.codebooks)
        self.project = _linear(config.text_width, config.width, _xavier(1.0), dtype, rngs)
        self.kind_embedding = table(KINDS)
        self.section_embedding = table(len(SECTIONS))
        self.null_embedding = table(KINDS)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers: Any = jax.vmap(lambda key: Layer(config, dtype, rngs=nnx.Rngs(key)))(keys)
        self.final_norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs) if config.norm == "pre" else None
        self.head = _linear(config.width, layout.streams * layout.id_space, _xavier(1.0), dtype, rngs)

    def memory(self, prompt: Prompt, keep: Bool[Array, "B kinds"]) -> Memory:
        """Memory of each song. A kind that is not kept, or that has no rows, is its learned null row instead."""
        x = self.project(jnp.asarray(prompt.states, self.dtype))
        kind = jnp.maximum(prompt.kind, 0)
        x = x + self.kind_embedding[kind].astype(self.dtype) + self.section_embedding[prompt.section].astype(self.dtype)
        x = x + sinusoids(jnp.asarray(prompt.position), x.shape[-1]).astype(self.dtype)
        seen = (prompt.kind >= 0) & jnp.take_along_axis(keep, kind, axis=1)
        null = jnp.broadcast_to(self.null_embedding[...].astype(self.dtype), (len(x), KINDS, x.shape[-1]))
        absent = jnp.stack([~(seen & (kind == k)).any(-1) for k in range(KINDS)], axis=-1)
        return Memory(jnp.concatenate([null, x], 1), jnp.concatenate([absent, seen], 1))

    def embed(self, ids: Int[Array, "B T J"], place: Place) -> Float[Array, "B T D"]:
        """Token, codebook and position embeddings, added."""
        rows = ids + self.id_space * jnp.arange(self.streams)
        place_embedding = self.codebook_embedding[place.codebook] + self.position_embedding[place.frame]  # of all songs
        return (self.token_embedding[rows].sum(-2) + place_embedding).astype(self.dtype)

    def hidden(
        self, ids: Int[Array, "B T J"], place: Place, memory: Memory, remat: Remat = "none"
    ) -> Float[Array, "B T D"]:
        """States of every position, the whole sequence at once; `remat` is what the backward pass computes anew."""
        return self._layers(ids, place, memory, remat, look=False)[0]

    def hidden_and_look(
        self, ids: Int[Array, "B T J"], place: Place, memory: Memory, remat: Remat = "none"
    ) -> tuple[Float[Array, "B T D"], Look]:
        """The same, and how the first head of the middle layer looks at the memory."""
        x, look = self._layers(ids, place, memory, remat, look=True)
        assert look is not None
        return x, look

    def _layers(self, ids: Array, place: Place, memory: Memory, remat: Remat, look: bool) -> tuple[Array, Look | None]:
        # On many devices a strip would have each gather the weights, and a device's share of a song is short already.
        alone = jax.sharding.get_abstract_mesh().empty or jax.sharding.get_abstract_mesh().size == 1
        strip = STRIP if alone and remat != "none" else 0

        def apply(x: Array, layer: Layer) -> tuple[Array, Look | None]:
            x, of_layer = gathered(layer)(x, memory, strip)
            return spread(x, SONGS, "context"), of_layer if look else None

        if remat != "none":  # in a scan nothing of the forward pass can be mistaken for it: CSE need not be prevented
            keep = jax.checkpoint_policies.save_only_these_names(*([KEPT] if remat == "attention" else []))
            apply = jax.checkpoint(apply, policy=keep, prevent_cse=False)
        x, looks = jax.lax.scan(apply, spread(self.embed(ids, place), SONGS, "context"), self.layers)
        return x, jax.tree.map(lambda of_layers: of_layers[self.depth // 2], looks)

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T J W"]:
        """Float32 logits of every stream; ids that pad the space are -inf."""
        hidden = hidden if self.final_norm is None else self.final_norm(hidden)
        logits = self.head(hidden).astype(jnp.float32).reshape(*hidden.shape[:-1], self.streams, self.id_space)
        return jnp.where(jnp.arange(self.id_space) <= self.last_id, logits, -jnp.inf)

    def unstacked(self) -> SoundTransformer:
        """The same model with its layers one by one, for `step` and `prefill`: who only samples keeps no other.

        In a compiled loop slices of the stack would be copied at every step.
        """
        if isinstance(self.layers, nnx.List):
            return self
        apart = copy.copy(self)
        apart.layers = nnx.List(_slices(self.layers, self.depth))
        return apart

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers) if isinstance(self.layers, nnx.List) else jax.tree.leaves(self.layers)[0].shape[0]


def _of_rows(f: Callable[[Array], Array], x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """f(x), of one song without the axis of songs: beside it XLA's CPU compiler sums at a tenth of the rate.

    Not of a single position: decode steps would be slower.
    """
    return f(x[0])[None] if len(x) == 1 < x.shape[1] else f(x)


@functools.partial(jax.jit, static_argnames="depth")
def _slices(layers: Layer, depth: int) -> list[Layer]:
    return [jax.tree.map(lambda p, i=i: p[i], layers) for i in range(depth)]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """What products are computed in: float32 on CPU, bfloat16 on accelerators, unless the config says."""
    auto = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(auto if config.dtype == "auto" else config.dtype)


def sinusoids(position: Int[Array, "B S"], width: int) -> Float[Array, "B S D"]:
    """Sine and cosine of the position at wavelengths from 2 pi to 10,000 x 2 pi (Vaswani et al., 2017)."""
    angles = position[..., None] * _rates((width + 1) // 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


def _rates(count: int) -> Float[Array, " count"]:
    """Radians a position: from 1 down to almost 1 / 10,000."""
    return 10_000.0 ** (-jnp.arange(count) / count)


def turned(x: Float[Array, "B N T H"], position: Int[Array, " T"]) -> Float[Array, "B N T H"]:
    """Each pair (x[i], x[i + H / 2]) turned by position x 10,000^(-2 i / H) radians.

    Products of queries and keys then depend on how far apart they stand (Su et al., 2021, "RoFormer", 3.2).
    """
    half = x.shape[-1] // 2
    angles = position[:, None] * _rates(half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _xavier(gain: float) -> nnx.Initializer:
    return nnx.initializers.variance_scaling(gain**2, "fan_avg", "normal")


def _linear(inputs: int, outputs: int, init: nnx.Initializer, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)
