"""DeSync: how far apart Synchformer (arXiv 2401.16423) takes picture and sound to be."""

from __future__ import annotations

import numpy as np

from javis.eval.metrics.protocol import MetricProtocol, is_official

CLASSES, LARGEST_OFFSET = 21, 2.0


def class_grid(largest: float = LARGEST_OFFSET, classes: int = CLASSES) -> np.ndarray:
    """Offsets (s) that the classes stand for, float64 [classes]: -2.0, -1.8, .. 2.0."""
    return np.linspace(-largest, largest, classes)


def desync(logits: np.ndarray, grid: np.ndarray | None = None) -> float:
    """Mean absolute offset (s) of the most likely classes of a clip's windows: logits [windows, classes] -> >= 0."""
    values = np.asarray(logits)
    if values.ndim != 2:
        raise ValueError(f"logits have shape {values.shape}, expected [windows, classes]")
    return float(desync_scores(values[:, None], grid)[0])


def desync_scores(
    logits: np.ndarray, grid: np.ndarray | None = None, *, protocol: MetricProtocol = "corrected"
) -> np.ndarray:
    """`desync` of each clip of a batch: logits [windows, clips, classes] -> seconds, float64 [clips].

    ``official`` lays the offsets of window after window in a row and cuts that into clips, so that with more than one
    window clips are mixed; the mean over the batch is the same.

    Raises:
        ValueError: shapes that do not fit, logits that are not finite.
    """
    values = np.asarray(logits, dtype=np.float64)
    offsets = class_grid() if grid is None else np.asarray(grid, dtype=np.float64)
    if values.ndim != 3 or not values.size or values.shape[2:] != offsets.shape:
        raise ValueError(
            f"logits have shape {values.shape} and the grid {offsets.shape}, expected [windows, clips, classes] and "
            "[classes], none of them empty"
        )
    if not np.isfinite(values).all():
        raise ValueError("logits hold NaN or infinite values, expected finite numbers")
    found = np.abs(offsets[values.argmax(axis=2)])
    if is_official(protocol):
        return np.asarray(found.reshape(found.shape[1], found.shape[0]).mean(axis=1))
    return np.asarray(found.mean(axis=0))
