"""The rule of sampling: logits to ids. After `log`, before `sample`; it knows nothing of state, cache or loop.

Logits pass guidance, repetition control, temperature, top-k, top-p and min-p, in this order; then ids are drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from l2m_jax.config import SampleConfig

KEPT = np.array([[False, False], [True, False], [True, True]])  # kinds (genre, lyrics) of each variant


class Rule(NamedTuple):
    """A `SampleConfig` as values of a compiled program: another value compiles nothing anew, None leaves a part out."""

    guidance: Float[Array, " variants"]  # coefficient of each computed variant
    temperature: Float[Array, ""] | None  # None takes the likeliest
    top_k: Float[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None
    repetition: Float[Array, ""] | None  # nats that what was said in the window loses


def make_rule(config: SampleConfig) -> Rule:
    """The rule of the config."""

    def unless(value: float, off: float) -> Array | None:
        return None if value == off else jnp.asarray(value, jnp.float32)

    return Rule(
        jnp.array([weight for _, weight in _coefficients(config)]),
        unless(config.temperature, 0),
        unless(config.top_k, 0),
        unless(config.top_p, 1),
        unless(config.min_p, 0),
        unless(math.log(config.repetition_penalty), 0),
    )


def variants(config: SampleConfig) -> Bool[np.ndarray, "variants kinds"]:
    """Which kinds (genre, lyrics) each computed variant keeps; the last keeps all."""
    return KEPT[[variant for variant, _ in _coefficients(config)]]


def _coefficients(config: SampleConfig) -> list[tuple[int, float]]:
    """Rows of `KEPT` with their weights in the guided logits; those of weight 0 need not be computed.

    The last row is always there: it is the model's own distribution.
    """
    genre, lyrics = config.guidance_genre, config.guidance_lyrics
    weights = (1 - genre, genre - lyrics, lyrics)
    return [(i, weight) for i, weight in enumerate(weights) if weight != 0 or i == 2]


def guide(logits: Float[Array, "B variants J W"], rule: Rule) -> Float[Array, "B J W"]:
    """l(0, 0) + g_genre (l(0, genre) - l(0, 0)) + g_lyrics (l(lyrics, genre) - l(0, genre)), over the variants.

    Classifier-free guidance with a weight for each condition (Ho and Salimans, 2022; Brooks et al., 2023).
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    finite = jnp.isfinite(logits)  # ids that pad the space are -inf in all variants
    guided = jnp.einsum("bvjw,v->bjw", jnp.where(finite, logits, 0.0), rule.guidance)
    return jnp.where(finite[:, -1], guided, -jnp.inf)


def penalise(logits: Float[Array, "B J W"], recent: Int[Array, "B R J"], nats: Float[Array, ""]) -> Array:
    """Takes `nats` from the logit of every id among the `recent` ones of its stream; -1 is no id.

    Keskar et al. (2019) divide positive logits and multiply negative ones, which depends on where their zero lies;
    dividing the probability does not.
    """
    said = (recent[..., None] == jnp.arange(logits.shape[-1])).any(1)
    return logits - jnp.where(said, nats, 0.0)


def draw(
    logits: Float[Array, "B J W"], allowed: Bool[Array, "B J W"], luck: Float[Array, "B J"], rule: Rule
) -> Int[Array, "B J"]:
    """Ids drawn from the allowed logits; `luck`, uniform in [0, 1), says where in the sum of the probabilities.

    Temperature first, then the k likeliest (Fan et al., 2018), of them the nucleus of mass p (Holtzman et al., 2020),
    of them those at least min-p times as likely as the likeliest (Nguyen et al., 2024). Ties at an edge stay in.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    if rule.temperature is None:
        return logits.argmax(-1)
    logits = logits / rule.temperature
    if rule.top_k is not None:
        logits = jnp.where(_highest(logits, jnp.ones_like(logits), rule.top_k), logits, -jnp.inf)
    if rule.top_p is not None:
        logits = jnp.where(_highest(logits, jax.nn.softmax(logits), rule.top_p), logits, -jnp.inf)
    share = jnp.exp(logits - logits.max(-1, keepdims=True))
    if rule.min_p is not None:
        share = jnp.where(share >= rule.min_p, share, 0.0)
    reached = jnp.where(share > 0, share.cumsum(-1), 0.0)  # 0 at what may not be drawn, so that no rounding draws it
    return (reached > luck[..., None] * reached.max(-1, keepdims=True)).argmax(-1)


def _highest(values: Float[Array, "B J W"], weights: Float[Array, "B J W"], goal: Array) -> Bool[Array, "B J W"]:
    """The fewest of the highest values whose weights add up to `goal`, found without a sort: the sort of a whole id
    space takes ten times as long on a CPU. Bisects, bit by bit, the unsigned integers that are ordered as floats are.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    top = jnp.uint32(1 << 31)
    order = jnp.where(bits < top, bits | top, ~bits)

    def narrow(i: Array, floor: Array) -> Array:
        higher = floor | (top >> i.astype(jnp.uint32))
        enough = jnp.where(order >= higher, weights, 0.0).sum(-1, keepdims=True) >= goal
        return jnp.where(enough, higher, floor)

    return order >= jax.lax.fori_loop(0, 32, narrow, jnp.zeros_like(order[..., :1]))
