"""How much of a picture moves, frame by frame, as AV-Align takes it: mean size of Farneback's dense optical flow."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np

FlowMethod = Literal["farneback", "frame_difference"]
# OpenCV's example values, which AV-Align's code uses too: pyramid scale, levels, window, iterations, neighbourhood, its
# deviation, flags.
_FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)


def flow_method() -> FlowMethod:
    """``farneback`` where OpenCV is installed (``pip install 'javis[eval]'``), else ``frame_difference``."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return "frame_difference"
    return "farneback"


def flow_trajectory(video: np.ndarray, method: FlowMethod | None = None) -> np.ndarray:
    """Mean size of the motion that leads to each frame, float64 [T]; the first frame takes that of the second.

    Args:
        video: uint8 [T, H, W, 3].
        method: ``farneback``: pixels a frame, of the optical flow of the grey picture (Farneback 2003), the trajectory
            that AV-Align (arXiv 2309.16429) looks for peaks in. ``frame_difference``: mean absolute difference, in
            levels of 255; it needs no OpenCV, and its peaks are others. None: `flow_method`.

    Raises:
        ValueError: not uint8 [T, H, W, 3].
        ImportError: ``farneback`` without OpenCV.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(f"video is {video.dtype} {list(video.shape)}, expected uint8 [frames, height, width, 3]")
    if len(video) < 2:
        return np.zeros(len(video))
    if (method or flow_method()) == "farneback":
        sizes = _farneback(video)
    else:
        sizes = [float(np.abs(b.astype(np.int16) - a).mean()) for a, b in itertools.pairwise(video)]
    return np.array([sizes[0], *sizes])


def _farneback(video: np.ndarray) -> list[float]:
    import cv2

    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in video]
    sizes = []
    for before, after in itertools.pairwise(grey):
        flow = np.zeros((*before.shape, 2), np.float32)
        flow = np.asarray(cv2.calcOpticalFlowFarneback(before, after, flow, *_FARNEBACK))
        sizes.append(float(np.hypot(flow[..., 0], flow[..., 1]).mean()))
    return sizes
