"""Distances between sounds."""

import numpy as np
import pytest

from l2m_jax.distance import frechet, nearest_genre, song_features, window_features
from l2m_jax.solfege import make_song

RATE = 24_000
RNG = np.random.default_rng(0)


def test_frechet_of_gaussians_is_the_closed_form():
    a = RNG.standard_normal((4000, 3))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    shifted, scaled = a + np.array([3, 0, 4]), 2 * a
    assert frechet(a, shifted) == pytest.approx(25)
    trace = np.trace(np.cov(a, rowvar=False))
    assert frechet(a - a.mean(0), scaled - scaled.mean(0)) == pytest.approx(trace)  # (2 - 1)^2 of each variance
    turn = np.linalg.qr(RNG.standard_normal((3, 3)))[0]
    b = RNG.standard_normal((500, 3)) * [1, 2, 3] + 1
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b)) == pytest.approx(frechet(b, a))
    assert frechet(np.zeros((5, 8)), np.zeros((7, 8))) == 0  # silence
    assert np.isnan(frechet(a[:1], a))


def test_windows_are_a_second_long_and_half_overlap():
    sound = RNG.standard_normal(4 * RATE).astype(np.float32)
    assert window_features(sound, RATE).shape == (7, 40)
    assert window_features(sound[: RATE // 4], RATE).shape == (1, 40)
    assert window_features(sound[:100], RATE).shape == (1, 40) and song_features(sound[:100], RATE).shape == (160,)
    quiet = window_features(sound / 10, RATE)
    assert frechet(quiet, window_features(sound, RATE)) > 100 * frechet(quiet[::2], quiet[1::2])


def test_solfege_songs_sound_like_their_genre():
    songs = [make_song(5, i) for i in range(48)]
    genres, features = [song[1] for song in songs], np.stack([song_features(song[2], RATE) for song in songs])
    right = [
        nearest_genre(features[i], np.delete(features, i, 0), [*genres[:i], *genres[i + 1 :]]) == genres[i]
        for i in range(len(songs))
    ]
    print(f"genre right in {np.mean(right):.3f} of the songs; tolerance 0.97")
    assert np.mean(right) >= 0.97


def test_features_that_never_differ_do_not_matter():
    known = np.array([[0.0, 1, 7], [0, 2, 7], [5, 1, 7], [5, 2, 7]])
    assert nearest_genre(np.array([4.0, 2, 7]), known, ["a", "a", "b", "b"]) == "b"
    assert nearest_genre(known[0], known, ["a"] * 4) == "a"
    with pytest.raises(ValueError, match="no songs of known genre"):
        nearest_genre(known[0], known[:0], [])
