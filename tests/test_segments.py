"""Segments: cut as Meta cuts them, counted from the frames alone, and joined."""

import math

import numpy as np
import pytest

from l2m_jax.encodec import PUBLISHED
from l2m_jax.segments import cut, join, loudness, segment_frames

CONFIG = PUBLISHED["encodec_48khz"]


@pytest.mark.parametrize("segments", [0, 1, 2, 7])
def test_frames_tell_the_segments(segments):
    """Of every length of the last segment: as many frames in each as there are in the sound's own segments."""
    for rest in [*range(1, 1_000, 7), 480, 481, *range(46_000, 47_521, 13), 47_520]:
        samples = np.zeros((segments * 47_520 + rest, 2), np.float32)
        frames = [math.ceil(len(segment) / 320) for segment in cut(samples, CONFIG)]
        assert segment_frames(sum(frames), CONFIG) == frames
    assert segment_frames(0, CONFIG) == [] and segment_frames(300, CONFIG) == [150, 149, 1]


@pytest.mark.parametrize("samples", [320, 48_000, 47_840, 95_360, 150_080])
@pytest.mark.parametrize("sides", [(), (2,)])
def test_joined_again_they_are_the_sound(samples, sides):
    sound = np.random.default_rng(0).normal(size=(samples, *sides)).astype(np.float32)
    np.testing.assert_allclose(join(cut(sound, CONFIG), CONFIG), sound, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 150, 151, 152, 299, 300, 301, 302, 451, 452])
def test_whole_frames_are_joined(frames):
    """As a decoder has them: segments of whole frames, for any number of frames of a song."""
    hop, overlap = CONFIG.hop, CONFIG.segment - CONFIG.segment_stride
    segments = segment_frames(frames, CONFIG)
    joined = join([np.full((hop * n, 2), 0.5, np.float32) for n in segments], CONFIG)
    np.testing.assert_allclose(joined, 0.5, atol=1e-6)
    assert frames * hop - len(segments) * overlap <= len(joined) <= frames * hop


def test_segments_fade_into_each_other():
    """From 1 to 3, over the 480 samples that they have in common, by equal steps."""
    joined = join([np.full(48_000, 1, np.float32), np.full(48_000, 3, np.float32)], CONFIG)
    assert len(joined) == 95_040  # a longer sound has a third segment
    np.testing.assert_allclose(joined[:47_520], 1, atol=1e-6)
    np.testing.assert_allclose(joined[48_000:], 3, atol=1e-6)
    np.testing.assert_allclose(np.diff(joined[47_520:48_000]), 2 / 481, atol=1e-5)


def test_loudness_is_that_of_the_mean_of_both_sides():
    assert loudness(np.array([[3, 1], [-2, -2]], np.float32)) == pytest.approx(2)
    assert loudness(np.array([[1, -1]], np.float32)) == pytest.approx(1e-8)
    assert loudness(np.array([0.6, -0.8], np.float32)) == pytest.approx(math.sqrt(0.5))
