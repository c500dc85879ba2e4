"""The losses of the codec's training: each hears what it is for."""

import jax
import jax.numpy as jnp
import numpy as np

from l2m_jax.codec_losses import (
    Weights,
    all_losses,
    clipping_loss,
    envelope_loss,
    harmonic_loss,
    peak_loss,
    pitch_loss,
    salience_loss,
    spectral_loss,
)
from l2m_jax.sounds import make_clip

spectral_loss = jax.jit(spectral_loss)  # op by op it takes seconds


def test_each_weight_has_a_loss_that_is_nothing_between_a_sound_and_itself():
    sound = jnp.asarray(np.stack([make_clip(0, i, 0.3, "voice") for i in range(2)]))
    found = all_losses(sound, sound)
    assert tuple(found) == Weights._fields
    loud = 1.3 / jnp.abs(sound).max() * jnp.roll(sound, 90, 1)
    assert max(found.values()) < 1e-5 < min(all_losses(sound, loud).values())


def test_spectral_loss_hears_what_is_missing():
    sound = jnp.asarray(np.stack([make_clip(0, i, 0.3, "voice") for i in range(2)]))
    assert spectral_loss(sound, sound) < 1e-5
    silence = jnp.zeros((1, 7200))
    assert jnp.isfinite(jax.grad(spectral_loss, argnums=1)(silence, silence)).all()
    assert 0 < spectral_loss(sound, sound * 0.9) < spectral_loss(sound, sound * 0.5) < spectral_loss(sound, sound * 0)


def test_harmonic_loss_hears_pitch_that_mel_bands_do_not():
    time = np.arange(16_000) / 24_000
    low, sharp = (
        sum(np.sin(2 * np.pi * n * hz * time) / n for n in range(1, 9)) * 0.02 for hz in (98, 98 * 2 ** (1 / 12))
    )
    tone, moved = (jnp.asarray(x, jnp.float32)[None] for x in (low, sharp))
    assert harmonic_loss(tone, tone) < 1e-5
    heard = {loss: float(loss(tone, moved) / loss(tone, 1.5 * tone)) for loss in (harmonic_loss, spectral_loss)}
    assert heard[harmonic_loss] > 1.3 * heard[spectral_loss]
    assert jnp.isfinite(jax.grad(harmonic_loss, argnums=1)(jnp.zeros((1, 7200)), jnp.zeros((1, 7200)))).all()


def test_envelope_loss_hears_clicks_and_lost_level():
    sound = jnp.asarray(make_clip(0, 3, 0.3, "noise"))[None]
    click = sound.at[0, 2_000].set(3.0)
    assert envelope_loss(sound, sound) == 0
    assert envelope_loss(sound, click) > 0.02  # one of 30 blocks
    np.testing.assert_allclose(envelope_loss(sound, 0.7 * sound), -2 * np.log(0.7), rtol=0.05)
    assert jnp.isfinite(jax.grad(envelope_loss, argnums=1)(jnp.zeros((1, 7200)), jnp.zeros((1, 7200)))).all()


def test_pitch_loss_hears_quiet_notes_as_loud_ones():
    time = np.arange(16_000) / 24_000
    tone, moved, octave = (jnp.asarray(np.sin(2 * np.pi * hz * time), jnp.float32)[None] for hz in (110, 117, 220))
    assert pitch_loss(tone, tone) < 1e-5 < 0.1 < pitch_loss(tone, moved) < pitch_loss(tone, octave)
    np.testing.assert_allclose(pitch_loss(0.02 * tone, 0.01 * octave), pitch_loss(tone, octave), rtol=0.2)
    assert jnp.isfinite(jax.grad(pitch_loss, argnums=1)(jnp.zeros((1, 7200)), jnp.zeros((1, 7200)))).all()


def test_salience_loss_hears_which_pitch_it_is():
    """Not phases, level or timbre; but an octave in the place of the note."""
    time, rng = np.arange(16_000) / 24_000, np.random.default_rng(0)

    def tone(hz: float, harmonics: range) -> jax.Array:
        waves = [np.sin(2 * np.pi * (hz * n * time + rng.random())) / n for n in harmonics]
        return jnp.asarray(sum(waves), jnp.float32)[None]

    note, phases, dark = tone(110, range(1, 8)), tone(110, range(1, 8)), tone(110, range(1, 3))
    octave, sharp = tone(110, range(2, 8, 2)), tone(117, range(1, 8))
    assert salience_loss(note, note) < 1e-6
    assert max(salience_loss(note, phases), salience_loss(note, 0.02 * note)) < 0.01
    assert salience_loss(note, dark) < 0.5 < 1 < salience_loss(note, octave) < salience_loss(note, sharp)
    noise = jnp.asarray(rng.normal(size=(1, 16_000)), jnp.float32)
    assert salience_loss(noise, note) < 0.01  # which has none
    assert jnp.isfinite(jax.grad(salience_loss, argnums=1)(jnp.zeros((1, 7200)), jnp.zeros((1, 7200)))).all()


def test_peak_loss_hears_what_shoots_beyond():
    sound = jnp.asarray(make_clip(0, 3, 0.3, "voice"))[None]
    assert peak_loss(sound, sound) == peak_loss(sound, -0.9 * sound) == 0
    assert 0 < peak_loss(sound, sound.at[0, 2_000].set(2.0)) < peak_loss(sound, sound.at[0, 2_000].set(4.0))


def test_clipping_loss_hears_single_samples_beyond_full_scale():
    """As loudly in a long clip as in a short one, and not what stays below."""
    sound = jnp.asarray(make_clip(0, 3, 0.3, "band"))[None]
    assert clipping_loss(sound) == 0
    shot = sound.at[0, 2_000].set(-1.45)
    np.testing.assert_allclose(clipping_loss(shot), 0.5, rtol=1e-5)
    np.testing.assert_allclose(clipping_loss(jnp.concatenate([shot, sound], 1)), 0.5, rtol=1e-5)
