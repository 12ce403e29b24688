"""AV-Align (arXiv 2309.16429): do peaks of the motion and onsets of the sound fall together?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from javis.eval.matching import match_events
from javis.eval.metrics.protocol import MetricProtocol, is_official

_EPS = 1e-6


def video_peaks(flow: np.ndarray, fps: float = 1.0) -> list[float]:
    """Times (s) of the strict local maxima of ``flow``; with ``fps`` 1 the indices of the frames.

    Args:
        flow: mean size of the optical flow at each frame, [T]; the first frame has none and takes that of the second.
        fps: frames per second.
    """
    values = np.asarray(flow, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"flow has shape {values.shape}, expected [frames]")
    if not fps > 0:
        raise ValueError(f"fps is {fps}, expected a positive number")
    inner = values[1:-1]
    return [(int(i) + 1) / fps for i in np.flatnonzero((inner > values[:-2]) & (inner > values[2:]))]


def av_align(
    video_peaks: Sequence[float] | np.ndarray,
    audio_peaks: Sequence[float] | np.ndarray,
    fps: float,
    *,
    protocol: MetricProtocol = "corrected",
) -> float:
    """Intersection over union of peaks (times in s) that lie within one frame of each other; 0 without any peak.

    ``corrected`` pairs peaks one to one, as many as possible, so that the value is in [0, 1]. ``official`` counts every
    audio peak that has a video peak near it, so that many onsets at one peak of the motion give more than 1.

    Raises:
        ValueError: ``fps`` not positive, peaks that are not finite.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps}, expected a positive number")
    video, audio = (np.asarray(peaks, dtype=np.float64).reshape(-1) for peaks in (video_peaks, audio_peaks))
    if not (np.isfinite(video).all() and np.isfinite(audio).all()):
        raise ValueError("peaks hold NaN or infinite times, expected seconds")
    total, reach = len(video) + len(audio), 1.0 / fps
    if is_official(protocol):
        near = (video - reach < audio[:, None]) & (audio[:, None] < video + reach)
        hits = int(near.any(axis=1).sum())
        return hits / (total - hits + _EPS)
    if not total:
        return 0.0
    # Strictly within a frame, as in the paper's code; `match_events` counts a difference of its tolerance as well.
    hits = len(match_events(video.tolist(), audio.tolist(), reach - 1e-6))
    return hits / (total - hits)
