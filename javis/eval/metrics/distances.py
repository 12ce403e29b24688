"""Distances between two sets of embeddings: Frechet (FVD, FAD) and kernel (KVD)."""

from __future__ import annotations

import numpy as np

from javis.eval import frechet
from javis.eval.metrics.protocol import MetricProtocol, as_vectors, is_official, same_width

FAD_UNIT = 1e4  # JavisBench prints Frechet audio distances times this
_ROOT_FLOOR = 1e-10  # below it the official square root keeps a singular value as it is


def frechet_distance(a: np.ndarray, b: np.ndarray, *, protocol: MetricProtocol = "corrected") -> float:
    """Frechet distance of embeddings [N, D] and [M, D], each set taken as a Gaussian (arXiv 1706.08500, eq. 6).

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)``, covariances unbiased. With I3D features of clips it
    is the FVD (arXiv 1812.01717). Depends on N: compare distances of equally many clips only.

    ``corrected`` computes in float64. ``official`` computes in float32 with roots by singular values, which for
    N <= D adds what rounding leaves in the null space of the covariances.

    Raises:
        ValueError: fewer than 2 vectors in a set, different widths, values that are not finite.
    """
    x, y = as_vectors(a, "embeddings", 2), as_vectors(b, "embeddings", 2)
    same_width(x, y)
    if is_official(protocol):
        return _official_frechet(x.astype(np.float32), y.astype(np.float32))
    return frechet.frechet_distance(_gaussian(x), _gaussian(y))


def frechet_audio_distance(a: np.ndarray, b: np.ndarray, *, protocol: MetricProtocol = "corrected") -> float:
    """`frechet_distance` of audio embeddings [N, D] and [M, D] times 10,000, the unit of JavisBench's tables."""
    return FAD_UNIT * frechet_distance(a, b, protocol=protocol)


def kernel_distance(a: np.ndarray, b: np.ndarray, *, protocol: MetricProtocol = "corrected") -> float:
    """Squared maximum mean discrepancy of [N, D] and [M, D] with the kernel ``(x.y / D + 1)^3`` (arXiv 1801.01401).

    The unbiased estimate over all vectors, without the diagonals; it may be negative. With I3D features it is the KVD.
    ``official`` takes each set less its own mean, so that sets that differ by a shift alone have distance zero (there,
    the covariance of the Frechet distance changes its argument in place).

    Raises:
        ValueError: fewer than 2 vectors in a set, different widths, values that are not finite.
    """
    x, y = as_vectors(a, "embeddings", 2), as_vectors(b, "embeddings", 2)
    same_width(x, y)
    if is_official(protocol):
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return _mean_off_diagonal(_kernel(x, x)) + _mean_off_diagonal(_kernel(y, y)) - 2.0 * float(_kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def _mean_off_diagonal(square: np.ndarray) -> float:
    count = len(square)
    return float((square.sum() - np.trace(square)) / (count * (count - 1)))


def _gaussian(x: np.ndarray) -> frechet.Gaussian:
    """Mean and covariance also of fewer vectors than dimensions, which `frechet.Gaussian.of` refuses."""
    centred = x - x.mean(axis=0)
    return frechet.Gaussian(x.mean(axis=0), centred.T @ centred / (len(x) - 1), len(x))


def _official_frechet(x: np.ndarray, y: np.ndarray) -> float:
    difference = x.mean(axis=0) - y.mean(axis=0)
    a, b = _official_covariance(x), _official_covariance(y)
    root = _root_by_svd(a)
    shared = np.trace(_root_by_svd(root @ (b @ root)))
    return float(np.trace(a + b) - np.float32(2.0) * shared + np.sum(difference**2))


def _official_covariance(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=0)
    return np.asarray(np.float32(1.0 / (len(x) - 1)) * (centred.T @ centred))


def _root_by_svd(matrix: np.ndarray) -> np.ndarray:
    u, values, v = np.linalg.svd(matrix)
    roots = np.where(values < _ROOT_FLOOR, values, np.sqrt(values))
    return np.asarray((u * roots) @ v)
