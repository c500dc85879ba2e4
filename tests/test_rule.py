"""The rule of sampling against brute force in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2m_jax.config import SampleConfig
from l2m_jax.rule import draw, guide, make_rule, penalise, variants


def numpy_rule(logits: np.ndarray, allowed: np.ndarray, rule: SampleConfig) -> np.ndarray:
    """The probabilities [W] that the rule draws from."""
    logits = np.where(allowed, logits.astype(np.float64), -np.inf) / rule.temperature
    order = np.argsort(-logits, kind="stable")[: rule.top_k or None]
    p = np.zeros(len(logits))
    p[order] = np.exp(logits[order] - logits.max())
    p /= p.sum()
    inside = np.cumsum(p[order]) - p[order] < rule.top_p  # of the k likeliest, up to the one that reaches the mass
    p[order[~inside]] = 0
    p[p < rule.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "rule",
    [
        SampleConfig(top_k=0, temperature=1.0),
        SampleConfig(top_k=0, temperature=0.5),
        SampleConfig(top_k=3, temperature=1.0),
        SampleConfig(top_k=1, temperature=1.0),
        SampleConfig(top_k=200, temperature=1.0),
        SampleConfig(top_k=0, top_p=0.7, temperature=1.0),
        SampleConfig(top_k=4, top_p=0.6, temperature=2.0),
        SampleConfig(top_k=0, top_p=1e-6, temperature=1.0),
        SampleConfig(top_k=0, min_p=0.4, temperature=1.0),
        SampleConfig(top_k=0, min_p=1.0, temperature=1.0),
        SampleConfig(top_k=5, top_p=0.9, min_p=0.3, temperature=1.3),
        SampleConfig(),
        SampleConfig(temperature=0.01),
    ],
    ids=lambda r: f"temperature{r.temperature}-k{r.top_k}-p{r.top_p}-min{r.min_p}",
)
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (3.0, -40.0), (0.3, 25.0)])
def test_the_rule(rule: SampleConfig, scale: float, shift: float):
    """Each id is drawn over the stretch of luck that is its probability, however the logits lie about 0."""
    rng, count = np.random.default_rng(6), 4000
    logits, allowed = rng.normal(size=(2, 12)).astype(np.float32) * scale + shift, rng.random((2, 12)) < 0.8
    logits[:, 3] = -np.inf  # an id that pads the space
    wide = (jnp.broadcast_to(x, (count, 2, 12)) for x in (logits, allowed))
    luck = jnp.stack([jnp.arange(count) / count] * 2, 1)
    ids = np.asarray(draw(*wide, luck, make_rule(rule)))
    for j in range(2):
        expected = numpy_rule(logits[j], allowed[j], rule)
        frequency = np.bincount(ids[:, j], minlength=12) / count
        assert (frequency[expected == 0] == 0).all()
        np.testing.assert_allclose(frequency, expected, atol=1.5 / count)


def test_extreme_luck_draws_what_is_allowed():
    """Of a whole id space, at both ends of luck and at every id's edge."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(1, 1, 2176)) * 8, jnp.float32)
    allowed = jnp.asarray(rng.random((1, 1, 2176)) < 0.3)
    p = np.asarray(jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf)))[0, 0]
    edges = np.clip(np.concatenate([[0.0, 1 - 2**-23], p.cumsum(), np.nextafter(p.cumsum(), 2)]), 0, 1 - 2**-23)
    wide = (jnp.broadcast_to(x, (len(edges), 1, 2176)) for x in (logits, allowed))
    ids = np.asarray(
        draw(*wide, jnp.asarray(edges, jnp.float32)[:, None], make_rule(SampleConfig(top_k=0, temperature=1.0)))
    )
    assert np.asarray(allowed)[0, 0, ids[:, 0]].all() and (p[ids[:, 0]] > 0).all()
    assert len(np.unique(ids)) > 100


def test_ties_stay_in():
    luck = jnp.linspace(0, 0.999, 30)[:, None]
    logits, allowed = jnp.array([[[1.0, 2.0, 1.0, 0.0, 1.0]]] * 30), jnp.ones((30, 1, 5), bool)
    ids = draw(logits, allowed, luck, make_rule(SampleConfig(top_k=2, temperature=1.0)))
    assert set(np.asarray(ids).ravel()) == {0, 1, 2, 4}


def test_greedy_takes_the_likeliest_allowed():
    logits = jnp.array([[[3.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]])
    allowed = jnp.array([[[False, True, True]], [[True, True, True]]])
    assert draw(logits, allowed, jnp.zeros((2, 1)), make_rule(SampleConfig(temperature=0))).tolist() == [[1], [0]]


@pytest.mark.parametrize(
    "lyrics, genre, computed",
    [(3.0, 0.5, 3), (2.0, 1.0, 2), (1.0, 2.0, 3), (2.0, 2.0, 2), (0.0, 1.0, 2), (1.0, 1.0, 1)],
)
def test_guidance(lyrics: float, genre: float, computed: int):
    """The formula of the design, computed from no more variants than it needs."""
    rng, rule = np.random.default_rng(8), SampleConfig(guidance_lyrics=lyrics, guidance_genre=genre)
    logits = rng.normal(size=(2, 3, 1, 5)).astype(np.float32)
    logits[..., 4] = -np.inf
    nothing, with_genre, both = logits[:, 0, :, :4], logits[:, 1, :, :4], logits[:, 2, :, :4]
    rows = [(2 * genre_kept + lyrics_kept + 1) // 2 for genre_kept, lyrics_kept in variants(rule).astype(int)]
    assert len(rows) == computed and rows[-1] == 2  # the last is the model's own distribution
    guided = np.asarray(guide(jnp.asarray(logits[:, rows]), make_rule(rule)))
    assert (guided[..., 4] == -np.inf).all()
    expected = nothing + genre * (with_genre - nothing) + lyrics * (both - with_genre)
    np.testing.assert_allclose(guided[..., :4], expected, rtol=1e-5, atol=1e-5)


def test_repetition():
    """Each recent id of a stream loses the penalty's share of its odds once, however often it was said."""
    rng, nats = np.random.default_rng(9), make_rule(SampleConfig(repetition_penalty=1.7)).repetition
    assert nats is not None and make_rule(SampleConfig()).repetition is None
    logits = rng.normal(size=(2, 2, 6)).astype(np.float32)
    recent = np.array([[[0, 5], [0, 4], [-1, -1]], [[-1, -1], [3, 3], [2, -1]]])
    expected = logits.astype(np.float64)
    for b, j in np.ndindex(2, 2):
        for i in set(recent[b, :, j]) - {-1}:
            expected[b, j, i] -= np.log(1.7)
    np.testing.assert_allclose(penalise(jnp.asarray(logits), jnp.asarray(recent), nats), expected, rtol=1e-5, atol=1e-6)
