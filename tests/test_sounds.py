"""Procedural sound: repeatable, of every kind, in tune."""

import numpy as np
import pytest

from l2m_jax.quality import track_pitch
from l2m_jax.solfege import PEAK
from l2m_jax.sounds import KINDS, LOUD, NOTES, QUIET, RATE, SHARES, _hz, kind_of, make_clip


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_each_kind(kind):
    clips = [make_clip(3, i, 0.7, kind) for i in range(6)]
    for clip in clips:
        assert clip.shape == (round(0.7 * RATE),) and clip.dtype == np.float32 and np.isfinite(clip).all()
        peak = np.abs(clip).max()  # of silence where all of a short clip is a rest
        if kind == "solfege":  # as loud as the song, within 3 dB; a stretch between two notes is quiet
            assert peak <= PEAK * 10 ** (3 / 20) * 1.001
        else:
            assert peak == 0 or 10 ** (QUIET / 20) * 0.999 <= peak <= 10 ** (LOUD / 20) * 1.001
    np.testing.assert_array_equal(clips[2], make_clip(3, 2, 0.7, kind))
    assert len({clip.tobytes() for clip in clips}) >= 5
    assert (make_clip(4, 0, 0.7, kind) != clips[0]).any()


def test_bands_are_as_loud_as_released_songs():
    bands, mixtures = (
        [20 * np.log10(make_clip(3, i, 2.0, kind).std() + 1e-9) for i in range(12)] for kind in ("band", "mixture")
    )
    assert -16 < min(bands) and np.median(bands) > -12 > -14 > np.median(mixtures)  # dB of full scale


def test_melodies_keep_to_the_keys_of_a_piano():
    rng = np.random.default_rng(0)
    keys = np.array([12 * np.log2(_hz(rng, 82, 440) / 440) for _ in range(500)])
    assert 0.05 < np.std(keys - np.round(keys)) < 0.09
    assert set(np.round(keys)) == set(range(-29, 1))


def test_kinds_are_drawn_as_often_as_said():
    assert len(SHARES) == len(KINDS) and sum(SHARES) == pytest.approx(1)
    assert (make_clip(0, 0, 0.1) != make_clip(0, 1, 0.1)).any()
    kinds = [kind_of(0, i) for i in range(40)]
    assert set(kinds) <= set(KINDS) and 10 <= kinds.count("solfege") <= 26
    for i in range(4):
        np.testing.assert_array_equal(make_clip(0, i, 0.1), make_clip(0, i, 0.1, kinds[i]))
    half = [kind_of(0, i, (0, 0.5, 0, 0, 0, 0, 0, 0, 0, 0.5)) for i in range(40)]
    assert set(half) == {"voice", "band"} and 10 <= half.count("voice") <= 30


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("hz", [110.0, 261.63, 523.25])
def test_notes_are_in_tune(note, hz):
    """Voices tremble by some 40 cents and more; what is tuned is their middle."""
    errors = []
    for seed in range(5):
        found, voiced = track_pitch(note(np.random.default_rng(seed), hz, RATE // 2), RATE)
        if voiced.sum() > 5:
            errors.append(abs(1200 * np.log2(np.median(found[voiced]) / hz)))
    assert len(errors) >= 3 and np.median(errors) < 12
