"""The step: condition dropout and the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from conftest import CONFIG, one_batch

from l2m_jax.checkpoint import load_model
from l2m_jax.data import Dataset
from l2m_jax.model import prompt_of
from l2m_jax.step import keep_conditions, losses
from l2m_jax.tokens import make_layout

LAYOUT = make_layout(CONFIG.model)


def test_condition_dropout_has_its_shares_and_depends_on_seed_step_and_row():
    config = dataclasses.replace(CONFIG.train, dropout=(0.2, 0.1, 0.3))
    draw = jax.jit(lambda seed, step, rows: keep_conditions(jax.random.key(seed), step, rows, config))
    rows = jnp.arange(20_000)
    kept = np.asarray(draw(0, 3, rows))
    genre, lyrics = kept.T
    shares = [np.mean(x) for x in (genre & ~lyrics, ~genre & lyrics, ~genre & ~lyrics, genre & lyrics)]
    np.testing.assert_allclose(shares, [0.2, 0.1, 0.3, 0.4], atol=0.012)  # 3.5 standard deviations
    np.testing.assert_array_equal(kept[500:600], draw(0, 3, rows[500:600]))
    for other in (draw(1, 3, rows), draw(0, 4, rows)):
        assert np.mean(other != kept) > 0.3
    assert keep_conditions(jax.random.key(0), jnp.array(0), rows, dataclasses.replace(config, dropout=(0, 0, 0))).all()


def test_loss_is_the_mean_over_codes_and_does_not_depend_on_chunk_or_remat(prepared, trained):
    model, batch = load_model(trained)[0], one_batch(Dataset(prepared))
    keep = jnp.ones((8, 2), bool)
    total = jax.jit(lambda m, b, k: losses(m, b, k, LAYOUT, 16, "layer"))(model, batch, keep)

    def plain(model, batch):
        memory = model.memory(prompt_of(batch), keep)
        hidden = model.hidden(batch.ids, LAYOUT.place(jnp.arange(batch.ids.shape[1])), memory)
        return jax.nn.log_softmax(model.logits(hidden))

    said = np.take_along_axis(np.asarray(jax.jit(plain)(model, batch)), batch.targets[..., None], -1)[..., 0]
    counts = batch.targets != LAYOUT.pad
    np.testing.assert_allclose(total.nats, -np.where(counts, said, 0).sum((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(total.codes, counts.sum((0, 1)))
