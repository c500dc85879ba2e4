"""Figures of a codec, against sounds whose figures are known."""

import numpy as np
import pytest

from l2m_jax.quality import FLOOR, measure, mel_distance, mel_filters, pitch_errors, si_sdr, track_pitch
from l2m_jax.solfege import make_song
from l2m_jax.weights import load_codec

RATE = 24_000
TIME = np.arange(RATE) / RATE
NOISE = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)


def tone(hz: float) -> np.ndarray:
    return (0.2 * sum(np.sin(2 * np.pi * hz * h * TIME) / h for h in range(1, 6))).astype(np.float32)


def test_a_sound_has_no_distance_from_itself():
    assert si_sdr(NOISE, 0.5 * NOISE) > 60
    assert mel_distance(NOISE, NOISE, RATE) == 0
    assert pitch_errors(tone(220), tone(220), RATE)[0].max() == 0


def test_si_sdr_is_the_ratio_of_orthogonal_parts():
    a, b = np.sin(2 * np.pi * 100 * TIME).astype(np.float32), np.cos(2 * np.pi * 100 * TIME).astype(np.float32)
    assert si_sdr(a, 3 * a + 0.3 * b) == pytest.approx(20, abs=1e-3)


def test_mel_distance_of_a_louder_sound_is_the_logarithm_of_its_power():
    assert mel_distance(NOISE, 2 * NOISE, RATE) == pytest.approx(2 * np.log(2), rel=1e-3)
    assert mel_distance(np.zeros(RATE, np.float32), np.zeros(RATE, np.float32), RATE) == 0
    assert FLOOR == 1e-4


def test_mel_filters_are_triangles_of_equal_area():
    filters = mel_filters(4096, 80)
    assert filters.shape == (80, 2049)
    np.testing.assert_allclose(filters[10:].sum(1) * RATE / 4096, 1, rtol=0.1)
    assert (np.diff(filters.argmax(1)) > 0).all()
    # Slaney's scale: 15 mel a kHz below 1 kHz, then 27 steps for each factor of 6.4.
    top = 15 + 27 * np.log(12) / np.log(6.4)
    assert filters[20].argmax() * RATE / 4096 == pytest.approx(21 * top / 81 * 200 / 3, abs=6)


@pytest.mark.parametrize("hz", [58.0, 110.0, 261.63, 493.88, 900.0])
def test_pitch_of_a_tone(hz):
    found, voiced = track_pitch(tone(hz), RATE)
    assert voiced.mean() > 0.9
    assert np.abs(1200 * np.log2(found[voiced] / hz)).max() < 5


def test_noise_has_no_pitch_and_a_semitone_is_a_hundred_cents():
    assert track_pitch(NOISE, RATE)[1].mean() < 0.02
    cents, frames = pitch_errors(tone(220), tone(220 * 2 ** (1 / 12)), RATE)
    assert frames > 90 and np.median(cents) == pytest.approx(100, abs=2)
    cents, frames = pitch_errors(NOISE, tone(220), RATE)
    assert frames <= 2 and len(cents) == frames


def test_measure_a_song():
    codec = load_codec()
    samples = make_song(5, 0, (3, 4))[2]
    quality, heard, codes = measure(codec, samples)
    assert heard.shape == samples.shape and codes.shape[1] == 2
    assert quality.seconds == len(samples) / RATE and quality.bits_per_s == 1500
    assert quality.entries_used == tuple(len(np.unique(book)) for book in codes.T)
    assert all(0 < bits <= np.log2(used) for bits, used in zip(quality.entropy_bits, quality.entries_used))
    assert quality.level_db == pytest.approx(10 * np.log10(np.mean(heard**2) / np.mean(samples**2)), abs=1e-3)
    assert quality.pitch_within_50_cents is not None and quality.pitch_within_50_cents > 0.8
    assert 0 < quality.voiced_s <= quality.seconds and 0 < quality.rtf
    silent = measure(codec, np.zeros(RATE, np.float32))[0]
    assert silent.pitch_cents_median is None and silent.pitch_within_50_cents is None and silent.voiced_s == 0
