"""A figure of many songs with its interval: the bootstrap over songs (Efron, 1979), and for shares. After `config`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

RESAMPLES = 2000
SHARE = 0.95  # of the resamples that lie inside of an interval


class Estimate(NamedTuple):
    """A figure of some songs; `low` and `high` are None where one song cannot tell how much songs differ."""

    value: float
    low: float | None
    high: float | None
    songs: int


def estimate(parts: Float[np.ndarray, " N"], whole: Float[np.ndarray, " N"] | None = None) -> Estimate | None:
    """sum(parts) / sum(whole) of N songs, in which `whole` is 1 a song where it is not given; None without any song.

    The interval is that of the central 95 % of resamples of whole songs, always the same ones. Songs whose part is NaN
    are no songs.
    """
    whole = np.ones(len(parts)) if whole is None else whole
    known = np.isfinite(parts) & (whole > 0)
    # In order of size: the songs' own order must not choose the resamples.
    pairs = np.array(sorted(zip(parts[known].tolist(), whole[known].tolist()))).reshape(-1, 2)
    if not len(pairs):
        return None
    above, below = pairs.sum(0)
    if len(pairs) == 1:
        return Estimate(float(above / below), None, None, 1)
    rng, alike = np.random.default_rng(0), np.full(len(pairs), 1 / len(pairs))
    # How often each song is drawn; a hundred resamples at a time, so that many songs fit into memory.
    sums = np.concatenate([rng.multinomial(len(pairs), alike, 100) @ pairs for _ in range(RESAMPLES // 100)])
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Estimate(float(above / below), float(low), float(high), len(pairs))


def share(right: Sequence[bool]) -> Estimate | None:
    """The share of songs that are right, with Wilson's 95 % interval (1927); None without any song.

    Resampling would say of 64 songs that are all right that no other could be wrong.
    """
    if not (n := len(right)):
        return None
    interval = scipy.stats.binomtest(sum(right), n).proportion_ci(SHARE, "wilson")
    return Estimate(sum(right) / n, float(interval.low), float(interval.high), n)
