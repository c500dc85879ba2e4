"""How far apart sounds are: which genre a song sounds like, and the Fréchet distance of two sets. After `quality`.

The embedding is our own, of log-mel spectra (80 bands, `quality.log_mel`): distances are comparable with others of this
same embedding and codec rate only. Letters: N, M songs or windows, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from l2m_jax.quality import BANDS, HOP, log_mel

SECONDS = 1.0  # of a window; the next one begins after half of it
POOLED = 20  # bands of a window's features
SHRUNK = 0.03  # of the covariance
LEAST = 1e-3  # nats; a feature that is the same in all songs has no deviation to divide by
EMBEDDING = f"mean and deviation of {POOLED} log-mel bands over windows of {SECONDS:g} s, half overlapping (l2m_jax)"


def song_features(samples: Float[np.ndarray, " T"], rate: int) -> Float[np.ndarray, " D"]:
    """Mean and deviation over a mono song of each of its 80 log-mel bands; D = 160."""
    spectrum = np.concatenate(list(log_mel(samples, rate)))
    return np.concatenate([spectrum.mean(0), spectrum.std(0)]).astype(np.float64)


def window_features(samples: Float[np.ndarray, " T"], rate: int) -> Float[np.ndarray, "N D"]:
    """Mean and deviation of 20 bands over each window of a mono song, as `EMBEDDING` says; D = 40.

    A song shorter than a window is one.
    """
    spectrum = np.concatenate(list(log_mel(samples, rate)))
    spectrum = spectrum.reshape(len(spectrum), POOLED, BANDS // POOLED).mean(2)
    rows = round(SECONDS * rate / HOP)
    windows = np.lib.stride_tricks.sliding_window_view(spectrum, min(rows, len(spectrum)), axis=0)[:: max(rows // 2, 1)]
    return np.concatenate([windows.mean(2), windows.std(2)], axis=1).astype(np.float64)


def nearest_genre(features: Float[np.ndarray, " D"], known: Float[np.ndarray, "M D"], genres: Sequence[str]) -> str:
    """The genre whose mean of `known` songs is nearest, in the metric of how songs differ inside of genres.

    Linear discriminant analysis (Fisher, 1936) of equally likely genres, its pooled covariance shrunk by SHRUNK towards
    independent features. ValueError without any song.
    """
    names = sorted(set(genres))
    if not names:
        raise ValueError("no songs of known genre")
    which = np.array([names.index(genre) for genre in genres])
    means = np.stack([known[which == i].mean(0) for i in range(len(names))])
    inside = known - means[which]
    deviation = np.sqrt((inside**2).mean(0)) + LEAST
    inside = inside / deviation
    covariance = (1 - SHRUNK) * inside.T @ inside / len(inside) + SHRUNK * np.eye(len(features))
    apart = (features - means) / deviation
    return names[int((apart * np.linalg.solve(covariance, apart.T).T).sum(1).argmin())]


def frechet(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    """Squared Fréchet distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson and Landau, 1982).

    Of few windows it is too large: compare only sets of like size. NaN where a set has less than two.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    (m, cov_a), (n, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T  # A^(1/2)
    product = np.linalg.eigvalsh(root @ cov_b @ root)  # those of A B, of a symmetric matrix
    cross = np.sqrt(np.maximum(product, 0)).sum()
    return float(((m - n) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
