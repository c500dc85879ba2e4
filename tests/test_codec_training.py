"""Training the codec: k-means, moving averages, one step, and the whole script with a stop in the middle."""

import dataclasses
import functools
import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l2m_jax.codec_losses import Weights
from l2m_jax.codec_training import (
    COMMITMENT,
    DEAD,
    DECAY,
    Codebooks,
    finished,
    first_codebooks,
    k_means,
    quantize,
    run,
    start,
    train_step,
)
from l2m_jax.config import UserError
from l2m_jax.encodec import Encodec, EncodecConfig
from l2m_jax.published import resolve
from l2m_jax.sounds import kind_of, make_clip
from l2m_jax.weights import codec_tensors, load_codec

run = jax.jit(run)  # op by op it takes seconds
CONFIG = EncodecConfig(num_filters=2, hidden_size=8, num_lstm_layers=0, codebook_size=16, target_bandwidths=(0.6,))


def test_k_means_finds_clusters():
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(8, 4)) * 10
    points = (middles[np.arange(800) % 8] + rng.normal(size=(800, 4)) * 0.1).astype(np.float32)
    best = min(
        (k_means(jnp.asarray(points), 8, 30, jax.random.key(seed)) for seed in range(8)),
        key=lambda found: float(jnp.min(jnp.sum((points[:, None] - found[0]) ** 2, -1), 1).sum()),
    )
    distance = np.linalg.norm(middles[:, None] - np.asarray(best[0]), axis=-1).min(1)
    assert distance.max() < 0.1 and np.asarray(best[1]).sum() == 800


def test_residual_codebooks_leave_less_and_less():
    latents = jax.random.normal(jax.random.key(0), (4000, 6))
    books = first_codebooks(latents, 2, 64, jax.random.key(1))
    each = jnp.ones(len(latents))
    one, _ = quantize(latents, each, Codebooks(books.count[:1], books.total[:1]), jax.random.key(2))
    two, _ = quantize(latents, each, books, jax.random.key(2))
    left = [float(jnp.mean((latents - x) ** 2)) for x in (one, two)]
    assert left[1] < 0.6 * left[0] < 0.6 * 0.6


def test_codebooks_are_moving_averages_and_dead_entries_are_revived():
    rng = np.random.default_rng(0)
    entries = jnp.asarray(rng.normal(size=(1, 4, 3)).astype(np.float32)).at[0, 3].set(100.0)  # chosen by nobody
    latents = jnp.asarray(rng.normal(size=(40, 3)).astype(np.float32))
    before = Codebooks(jnp.full((1, 4), 10.0).at[0, 3].set(DEAD * 10), entries * 10.0)
    before = before._replace(total=entries * before.count[..., None])
    importance = jnp.where(jnp.arange(40) < 10, 3.0, 1.0)
    nearest, after = quantize(latents, importance, before, jax.random.key(0))
    code = np.argmin(np.sum((np.asarray(latents)[:, None] - np.asarray(entries[0])) ** 2, -1), 1)
    np.testing.assert_allclose(nearest, np.asarray(entries[0])[code], atol=1e-5)
    for entry in range(3):
        counts = np.asarray(importance)[code == entry]
        np.testing.assert_allclose(after.count[0, entry], DECAY * 10 + (1 - DECAY) * counts.sum(), rtol=1e-5)
        total = DECAY * 10 * np.asarray(entries[0, entry]) + (1 - DECAY) * counts @ np.asarray(latents)[code == entry]
        np.testing.assert_allclose(after.total[0, entry], total, rtol=1e-4, atol=1e-5)
    assert 3 not in code
    revived = np.asarray(after.entries[0, 3])
    assert np.abs(np.asarray(latents) - revived).max(1).min() < 1e-5  # it stands on a latent now


def test_an_entry_is_revived_where_it_is_most_wanted():
    """On an important latent that no entry fits, not on one of the many that have theirs."""
    latents = jnp.zeros((40, 3)).at[7].set(jnp.array([5.0, 0.0, 0.0])).at[8].set(jnp.array([0.0, 5.0, 0.0]))
    latents = latents.at[9:].set(jnp.array([1.0, 1.0, 0.0]))
    entries = jnp.array([[[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [99.0, 0.0, 0.0]]])
    books = Codebooks(jnp.array([[10.0, 10.0, 0.0]]), entries * jnp.array([10.0, 10.0, 1.0])[None, :, None])
    books = books._replace(count=books.count.at[0, 2].set(1e-5))
    importance = jnp.ones(40).at[7].set(1e6)
    for seed in range(8):
        _, after = quantize(latents, importance, books, jax.random.key(seed))
        np.testing.assert_allclose(after.entries[0, 2], latents[7], atol=1e-5)


def test_a_finished_codec_has_latents_of_its_own_scale():
    """Codes and sound stay what they were; without it, latents a million times as large do not fit float16."""
    module = Encodec(CONFIG, 2, nnx.Rngs(0))
    last, first = module.encoder.layers[-1], module.decoder.layers[0]
    last.kernel[...] *= 1e6
    first.kernel[...] *= 1e-6
    state = start(module, optax.adam(1e-3))
    latents = run(state.encoder, jnp.asarray(make_clip(0, 0, 0.16, "fm"))[None, :, None])
    state = state._replace(codebooks=first_codebooks(latents[0], 2, 4, jax.random.key(0)))
    nearest = quantize(latents[0], jnp.ones(latents.shape[1]), state.codebooks, jax.random.key(0))[0]
    heard = run(state.decoder, nearest[None])
    codec = finished(state, Encodec(CONFIG, 2, nnx.Rngs(1)))
    assert jnp.abs(codec.codebooks[...]).max() < 10
    again = run(codec.encoder, jnp.asarray(make_clip(0, 0, 0.16, "fm"))[None, :, None])
    found = codec.quantize(again)
    entries = jnp.sum(codec.codebooks[...][jnp.arange(2), found], axis=-2)
    np.testing.assert_allclose(run(codec.decoder, entries), heard, atol=1e-4 * float(jnp.abs(heard).max()))


@pytest.mark.parametrize("phase", ["free", "bound", "decoder"])
def test_steps_learn(phase):
    optimizer = optax.adam(3e-3)
    state = start(Encodec(CONFIG, 2, nnx.Rngs(0)), optimizer)
    sound = jnp.asarray(np.stack([make_clip(0, i, 0.16, "drums") for i in range(2)]))
    weights = Weights(1.0, *7 * [0.1])
    step = jax.jit(functools.partial(train_step, optimizer=optimizer), static_argnames="phase")
    if phase == "decoder":  # what was learnt before would go on moving the encoder
        state, _ = step(state, sound, jnp.ones(2), jax.random.key(99), weights, phase="bound")
    losses, encoder, codebooks = [], jax.tree.leaves(state.encoder), state.codebooks
    for i in range(30):
        state, metrics = step(state, sound, jnp.ones(2), jax.random.key(i), weights, phase=phase)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(encoder, jax.tree.leaves(state.encoder))]
    if phase == "decoder":
        assert max(moved) == 0 and (state.codebooks.total == codebooks.total).all()
    else:
        assert min(moved) > 0  # the gradient goes through the quantizer to every parameter of the encoder


def test_songs_and_bands_count_more_in_the_codebooks():
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "train_codec.py"))
    settings = script["Settings"](batch=4, frames=8, solfege=3.0, band=2.0)
    parts, seen = script["PARTS"], set()
    for index, (clips, importance) in enumerate(script["_clips"](settings, range(48), workers=2)):
        for row, counts in enumerate(importance):
            whole, part = divmod(index + row, parts)
            whole, size = whole * settings.batch + row, clips.shape[1]
            assert counts == {"solfege": 3.0, "band": 2.0}.get(kind_of(settings.seed, whole), 1.0)
            seen.add(float(counts))
            if index == 5:  # each clip is the right part of the right longer one
                made = make_clip(settings.seed, whole, parts * size / 24_000)
                np.testing.assert_array_equal(clips[row], made[part * size :][:size])
    assert seen == {1.0, 2.0, 3.0}
    bands = dataclasses.replace(settings, shares=(*9 * [0.0], 1.0))
    clips, importance = next(script["_clips"](bands, range(1), workers=1))
    np.testing.assert_array_equal(clips[0], make_clip(bands.seed, 0, parts * size / 24_000, "band")[:size])
    assert set(importance) == {2.0}


SHAPE = {"batch": 2, "frames": 16, "filters": 2, "hidden": 8, "latents": 1200}


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Steps are compiled for a few rounds: LLVM's optimizations take longer than they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The script, and a run of it through all three phases, with its settings; only for reading."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "train_codec.py"))
    settings, run = script["Settings"](steps=7, free_steps=2, decoder_steps=1, **SHAPE), tmp_path_factory.mktemp("run")
    script["main"](run, settings, checkpoint_every=2)
    return script, settings, run


def test_the_script_goes_on_to_the_bit(tmp_path, whole):
    script, settings, run = whole
    script["main"](tmp_path / "parts", settings, checkpoint_every=2)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "7")  # as if killed after step 6
    shutil.rmtree(tmp_path / "parts" / "codec")
    script["main"](tmp_path / "parts", settings, checkpoint_every=2)
    stopped, never = ((x / "codec" / "model.safetensors").read_bytes() for x in (tmp_path / "parts", run))
    assert stopped == never
    told = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    for line, name in zip(told, 2 * ["free"] + 4 * ["bound"] + ["decoder"], strict=True):
        parts = sum(weight * line[part] for part, weight in script["WEIGHTS"][name]._asdict().items())
        assert line["loss"] == pytest.approx(parts + COMMITMENT * line["commitment"], rel=1e-4)
    codec = load_codec(str(tmp_path / "parts" / "codec"))
    assert (codec.codebooks, codec.entries, codec.config.num_lstm_layers) == (2, 1024, 1)
    with pytest.raises(UserError, match="parts holds a run with other settings"):
        script["main"](tmp_path / "parts", script["Settings"](steps=8, free_steps=2, decoder_steps=1))
    with pytest.raises(UserError, match="free and bound need one each"):
        script["Settings"](steps=8)


def test_the_script_begins_with_another_run(tmp_path, whole):
    (script, _, first), begun, nowhere = whole, tmp_path / "begun", str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run of this script is there, and no codec"):
        script["main"](begun, script["Settings"](init=nowhere, steps=2, free_steps=0, decoder_steps=0, **SHAPE))
    assert not begun.exists()  # nothing stands in the way of the command put right
    # One step at no learning rate to speak of: networks as they were, and of the entries those that were not chosen.
    settings = script["Settings"](
        init=str(first), steps=1, free_steps=0, decoder_steps=0, bound_lr=1e-12, **SHAPE | {"batch": 3}
    )
    script["main"](begun, settings)
    old, new = (load_codec(str(run / "codec")).module for run in (first, begun))
    kernels = [np.asarray(codec.encoder.layers[0].kernel[...]) for codec in (old, new)]
    np.testing.assert_allclose(*kernels, rtol=1e-3)
    entries = [np.asarray(codec.codebooks[...]) for codec in (old, new)]
    apart = np.abs(entries[0] - entries[1]).max(-1)
    assert np.median(apart) < 0.01 < np.abs(entries[0]).mean() and apart.max() > 0
    with pytest.raises(UserError, match="without --init, free and bound need one each"):
        script["Settings"](steps=2, free_steps=0, decoder_steps=0)
    for init in (first, first / "codec"):
        with pytest.raises(UserError, match="other shapes than this run: give --filters 2 --hidden 8 --lstm-layers 1"):
            script["main"](tmp_path / "wide", dataclasses.replace(settings, init=str(init), filters=4))
    other = shutil.copytree(first / "codec", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"dilation_growth_rate": 3}))
    with pytest.raises(UserError, match="no codec of the kind that this script trains: dilation_growth_rate 3, not 2"):
        script["main"](tmp_path / "wide", dataclasses.replace(settings, init=str(other)))
    assert not (tmp_path / "wide").exists()

    # A codec whose decoder alone is trained keeps its codes to the bit.
    script["main"](tmp_path / "decoder", dataclasses.replace(settings, init=str(first / "codec"), decoder_steps=1))
    old, new = (codec_tensors(resolve(str(run / "codec"))[1]) for run in (first, tmp_path / "decoder"))
    assert old.keys() == new.keys()
    same = {name for name in old if np.array_equal(old[name], new[name])}
    assert same >= {name for name in old if not name.startswith("decoder.")} and len(same) < len(old)
