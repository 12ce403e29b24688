"""The metric in which silhouettes are compared: directions in which a codec distorts every shape count less.

Through the built-in model's linear codec a ball looks a little like a box and a star a little like a ball. Those
residuals are few and alike, so they are learned from real clips sent through the codec, whose shapes are known, and
divided out (a whitened matched filter): with residuals of covariance S,

    distance(r) = r^T (S + a I)^-1 r, up to a factor  =  |r|^2 - sum over k of g_k (u_k . r)^2,    g_k = s_k / (s_k + a)

No generated clip enters. ``python -m javis.eval.fit_shape_metric`` fits it again.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("shape_metric.safetensors")
FLOOR = 3.0  # a, in mean variances of the residuals
LEAST = 0.05  # directions with a smaller g are left out


@lru_cache(maxsize=1)
def directions() -> tuple[np.ndarray, np.ndarray]:
    """Unit directions u [K, pixels] and their g [K], float32."""
    from safetensors.numpy import load_file

    stored = load_file(PATH)
    return stored["directions"].astype(np.float32), stored["shares"].astype(np.float32)


def distances(residuals: np.ndarray) -> np.ndarray:
    """Squared lengths of residuals [N, pixels] in the learned metric, [N]."""
    unit, shares = directions()
    return np.asarray((residuals**2).sum(axis=1) - ((residuals @ unit.T) ** 2) @ shares)


def fit(residuals: np.ndarray) -> dict[str, np.ndarray]:
    """``directions`` and ``shares`` of residuals [N, pixels] of right shapes, in float16 and float32."""
    variances, vectors = np.linalg.eigh(residuals.T @ residuals / len(residuals))
    shares = variances / (variances + FLOOR * variances.mean())
    kept = np.flatnonzero(shares > LEAST)[::-1]
    return {"directions": vectors[:, kept].T.astype(np.float16), "shares": shares[kept].astype(np.float32)}
