"""What all metrics share: the choice of the protocol, and the checks of their arguments."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

MetricProtocol = Literal["corrected", "official"]


def is_official(protocol: MetricProtocol) -> bool:
    """Whether the official numbers are asked for.

    Raises:
        ValueError: an unknown protocol.
    """
    if protocol not in get_args(MetricProtocol):
        raise ValueError(f"protocol is {protocol!r}, expected one of {', '.join(get_args(MetricProtocol))}")
    return protocol == "official"


def as_vectors(values: np.ndarray, what: str, least: int = 1) -> np.ndarray:
    """``values`` as float64 [N, D], N >= ``least``.

    Raises:
        ValueError: another shape, too few vectors, or values that are not finite.
    """
    vectors = np.asarray(values, dtype=np.float64)
    if vectors.ndim != 2 or vectors.shape[1] < 1:
        raise ValueError(f"{what} have shape {vectors.shape}, expected [vectors, dimensions]")
    if len(vectors) < least:
        raise ValueError(f"{what}: {len(vectors)} vectors, expected at least {least}")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{what} hold NaN or infinite values, expected finite numbers")
    return vectors


def same_width(a: np.ndarray, b: np.ndarray) -> None:
    """Raise `ValueError` unless both [N, D] and [M, D] have the same D."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"embeddings of {a.shape[-1]} and {b.shape[-1]} dimensions, expected the same")
