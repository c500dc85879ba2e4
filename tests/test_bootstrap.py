"""Intervals over songs."""

import numpy as np
import pytest

from l2m_jax.bootstrap import estimate, share

RNG = np.random.default_rng(0)


def test_an_interval_holds_the_value_and_is_as_wide_as_songs_differ():
    parts = RNG.normal(3, 1, 400)
    found = estimate(parts)
    assert found and found.low < found.value < found.high and found.songs == 400
    assert found.value == pytest.approx(parts.mean())
    print(f"width {found.high - found.low:.4f}; normal theory: {2 * 1.96 * parts.std() / 20:.4f}, tolerance 10 %")
    assert found.high - found.low == pytest.approx(2 * 1.96 * parts.std() / 20, rel=0.1)


def test_true_means_lie_in_nineteen_of_twenty_intervals():
    inside = [(e := estimate(RNG.normal(0, 1, 30))) and e.low < 0 < e.high for _ in range(100)]
    print(f"{sum(inside)} of 100 intervals hold the true mean; tolerance 86")
    assert sum(inside) >= 86


def test_a_ratio_is_of_sums_so_that_long_songs_count_for_more():
    found = estimate(np.array([1.0, 90.0]), np.array([10.0, 100.0]))
    assert found and found.value == 91 / 110
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.9)


def test_the_order_of_songs_changes_nothing():
    parts, whole = RNG.random(20), RNG.random(20)
    order = RNG.permutation(20)
    assert estimate(parts, whole) == estimate(parts[order], whole[order])


def test_songs_without_a_figure_are_none():
    parts, whole = np.array([1.0, np.nan, 3.0, 4.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert estimate(parts, whole) == estimate(np.array([1.0, 3.0]))
    assert estimate(parts[1:2]) is None and estimate(np.zeros(0)) is None
    assert estimate(np.array([2.0])) == (2.0, None, None, 1)
    assert estimate(np.full(5, 0.0)) == (0.0, 0.0, 0.0, 5)


def test_a_share_of_all_is_not_certain():
    """Of n right songs in n Wilson's interval begins at n / (n + z^2); of right and wrong ones it is mirrored."""
    found = share([True] * 64)
    assert found and found.value == 1 and found.low == pytest.approx(64 / (64 + 1.959964**2)) and found.high == 1
    right, wrong = share([True] * 8 + [False] * 2), share([False] * 8 + [True] * 2)
    assert right and wrong and right.songs == 10 and right.low < 0.8 < right.high
    assert (1 - right.high, 1 - right.low) == pytest.approx((wrong.low, wrong.high))
    assert share([]) is None and share([False]).low == 0
