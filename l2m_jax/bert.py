"""BERT, the frozen text encoder (Devlin et al., 2019), as `transformers.BertModel` computes it, without its pooler.

Only mathematics: `lyrics` feeds it and `weights` loads it. Post-norm layers, learned positions, erf GELU. The layers
are stacked along a leading axis L and run with one scan. T is at most 512 positions in the published checkpoints.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder, with the names of the published `config.json`."""

    vocab_size: int
    hidden_size: int
    """E, width of the states."""
    num_hidden_layers: int
    """L, layers."""
    num_attention_heads: int
    """N, heads."""
    intermediate_size: int
    """Width inside the MLP."""
    max_position_embeddings: int
    """Largest T."""
    type_vocab_size: int
    layer_norm_eps: float


class BertLayer(nnx.Module):
    """One layer: x = LN(x + Attn(x)); x = LN(x + MLP(x))."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.mix = nnx.Linear(width, width, rngs=rngs)
        self.mix_norm = _layer_norm(config, rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)
        self.down_norm = _layer_norm(config, rngs)

    def __call__(self, x: Float[Array, "B T E"], bias: Float[Array, "B 1 1 T"]) -> Float[Array, "B T E"]:
        """`bias` is added to the attention logits: 0 at text, very negative at padding."""
        query, key, value = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits + bias), value)
        x = self.mix_norm(x + self.mix(mixed.reshape(x.shape)))
        return self.down_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """Embeddings and L stacked layers."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.words = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.positions = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)
        self.types = nnx.Embed(config.type_vocab_size, config.hidden_size, rngs=rngs)
        self.norm = _layer_norm(config, rngs)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = jax.vmap(lambda key: BertLayer(config, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, ids: Int[Array, "B T"], mask: Bool[Array, "B T"], layer: int) -> Float[Array, "B T E"]:
        """States after the first `layer` layers; no more are run: 0 gives the embeddings, L the last states.

        `ids`: one segment of text with [CLS] and [SEP]; `mask`: False at padding, whose states mean nothing.
        """
        x = self.norm(self.words(ids) + self.positions.embedding[: ids.shape[1]] + self.types.embedding[0])
        bias = jnp.where(mask[:, None, None, :], 0.0, jnp.finfo(x.dtype).min)
        first = jax.tree.map(lambda weight: weight[:layer], self.layers)
        return jax.lax.scan(lambda x, block: (block(x, bias), None), x, first)[0]


def _layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses the digits that parity needs.
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
