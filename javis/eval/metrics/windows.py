"""Which frames and samples a window of JavisScore takes, and which segments a window of DeSync."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from javis.eval.metrics.protocol import MetricProtocol, is_official

JAVIS_SECONDS, JAVIS_OVERLAP = 2.0, 1.5  # of the figures of JavisBench (arXiv 2503.23377)
IMAGEBIND_RATE = 16000  # Hz

SYNC_SEGMENTS = 14  # of one window of Synchformer (4.8 s)
SYNC_FPS, SYNC_RATE = 25, 16000
SEGMENT_FRAMES, SEGMENT_FRAME_STRIDE = 16, 8  # 0.64 s at 25 fps
SEGMENT_SAMPLES, SEGMENT_SAMPLE_STRIDE = 10240, 5120  # 0.64 s at 16 kHz


class Windows(NamedTuple):
    """Half-open ranges [start, end) of frames and of samples, window by window; equally many."""

    video: list[tuple[int, int]]
    audio: list[tuple[int, int]]


def segment_windows(
    n_frames: int,
    n_samples: int,
    fps: float,
    *,
    seconds: float = JAVIS_SECONDS,
    overlap: float = JAVIS_OVERLAP,
    rate: int = IMAGEBIND_RATE,
    protocol: MetricProtocol = "corrected",
) -> Windows:
    """Windows of ``seconds`` with ``overlap`` over a clip; the last is shifted back to fit.

    ``corrected`` cuts picture and sound at the same instants. ``official`` truncates sizes and strides to whole frames
    and samples once, so that at 23.976 fps windows of 0.5 s of picture and sound drift apart by 41 ms each; the shorter
    list decides the number of windows. A picture or a sound not longer than a window gives one window over everything.

    Raises:
        ValueError: an empty clip, ``fps`` or ``rate`` not positive, an overlap that leaves no stride of at least one
            frame.
    """
    if n_frames < 1 or n_samples < 1:
        raise ValueError(f"the clip has {n_frames} frames and {n_samples} samples, expected at least one of each")
    if not (fps > 0 and rate > 0):
        raise ValueError(f"fps is {fps} and rate is {rate}, expected positive numbers")
    if not (
        overlap >= 0 and int(seconds * fps) - int(overlap * fps) >= 1 and int(seconds * rate) > int(overlap * rate)
    ):
        raise ValueError(
            f"windows of {seconds} s with an overlap of {overlap} s move by less than a frame at {fps} fps; expected "
            "a longer window or a smaller overlap"
        )
    if is_official(protocol):
        return _official_windows(n_frames, n_samples, fps, seconds, overlap, rate)
    duration = min(n_frames / fps, n_samples / rate)
    if duration <= seconds + 1e-9:
        return Windows([(0, n_frames)], [(0, n_samples)])
    starts: list[float] = np.arange(0.0, duration - seconds + 1e-9, seconds - overlap).tolist()
    if starts[-1] + seconds < duration - 1e-6:
        starts.append(duration - seconds)
    return Windows(_cut(starts, seconds, fps, n_frames), _cut(starts, seconds, rate, n_samples))


def _cut(starts: list[float], seconds: float, rate: float, length: int) -> list[tuple[int, int]]:
    """Ranges of one size, begun at the grid point nearest to each start."""
    size = min(max(1, round(seconds * rate)), length)
    begins = [min(round(start * rate), length - size) for start in starts]
    return [(begin, begin + size) for begin in begins]


def _official_windows(n_frames: int, n_samples: int, fps: float, seconds: float, overlap: float, rate: int) -> Windows:
    size = int(seconds * fps), int(seconds * rate)
    if n_frames <= size[0] or n_samples <= size[1]:
        return Windows([(0, n_frames)], [(0, n_samples)])
    video = _strided(n_frames, size[0], size[0] - int(overlap * fps))
    audio = _strided(n_samples, size[1], size[1] - int(overlap * rate))
    count = min(len(video), len(audio))
    return Windows(video[:count], audio[:count])


def _strided(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    starts = list(range(0, length - size + 1, stride))
    if starts[-1] + size < length:
        starts.append(length - size)
    return [(start, start + size) for start in starts]


def desync_segments(video_frames: int, audio_samples: int) -> int:
    """Number of segments of 0.64 s, every 0.32 s, in a clip at 25 fps and 16 kHz; the shorter stream decides."""
    frames = 1 + (video_frames - SEGMENT_FRAMES) // SEGMENT_FRAME_STRIDE
    samples = 1 + (audio_samples - SEGMENT_SAMPLES) // SEGMENT_SAMPLE_STRIDE
    return max(0, min(frames, samples))


def desync_windows(n_segments: int, size: int = SYNC_SEGMENTS) -> list[list[int]]:
    """Indices of the segments of each window: blocks of ``size``.

    A short last block is replaced by the last ``size`` segments; fewer segments than a block are repeated from the
    first until it is full.

    Raises:
        ValueError: no segment.
    """
    if n_segments < 1 or size < 1:
        raise ValueError(f"{n_segments} segments in windows of {size}, expected at least one of each")
    if n_segments < size:
        return [[index % n_segments for index in range(size)]]
    return [list(range(start, end)) for start, end in _strided(n_segments, size, size)]
