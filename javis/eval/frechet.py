"""Frechet distance between two sets of feature vectors, each taken as a Gaussian.

Read next: frechet_features.py (the vectors).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from javis.errors import UsageError


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of feature vectors, float64, and how many there were."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Mean and unbiased covariance of feature vectors [N, D].

        Raises:
            UsageError: not more vectors than dimensions: their covariance has no full rank, and a distance from it
                says more about the number of clips than about the clips.
            ValueError: another shape, or values that are not finite.
        """
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] < 1:
            raise ValueError(f"features have shape {values.shape}, expected [clips, dimensions]")
        count, width = values.shape
        if count <= width:
            raise UsageError(
                f"{count} clips give no Frechet distance on {width} features; expected more than {width}: measure more "
                "clips (--count)"
            )
        if not np.isfinite(values).all():
            raise ValueError("features hold NaN or infinite values, expected finite numbers")
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(mean, centred.T @ centred / (count - 1), count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson and Landau 1982, eq. 4), float64.

    The squared distance, as in Heusel et al. 2017 (arXiv 1706.08500, eq. 6). The product is made symmetric before its
    root is taken, so that the eigenvalues are real and those below zero are rounding errors, which are set to zero.

    Raises:
        ValueError: the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions; expected the same")
    root = _root(a.covariance)
    product = root @ b.covariance @ root
    shared = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * shared
    return max(0.0, float(distance))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T)
