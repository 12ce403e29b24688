"""How long a clip is, in frames and samples, at any frame rate.

What is asked for in seconds becomes ``round(seconds * fps)`` frames and ``round(frames / fps * rate)`` samples: picture
and sound last equally long, to within half a sample. Codecs that work in windows of frames (the official one: 17) make
whole windows, which are cut afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from javis.errors import UsageError
from javis.media import exact_rate, samples_for

MAX_FPS = 120.0


@dataclass(frozen=True)
class ClipLength:
    """Length of a clip, and of what the model makes for it.

    Attributes:
        frames, samples: what the clip has in the end.
        model_frames, model_samples: what the codecs and the model work on: whole windows of frames.
        fps: frames per second. sample_rate: Hz.
    """

    frames: int
    samples: int
    model_frames: int
    model_samples: int
    fps: float
    sample_rate: int

    @property
    def seconds(self) -> float:
        return float(self.frames / exact_rate(self.fps))


def check_fps(fps: float) -> float:
    """A usable frame rate, whole numbers as ``int``. Raises `UsageError` outside 1..120."""
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not math.isfinite(fps) or not 1 <= fps <= MAX_FPS:
        raise UsageError(f"fps must be between 1 and {MAX_FPS:g}, got {fps}")
    return int(fps) if float(fps).is_integer() else float(fps)


def clip_length(
    seconds: float,
    fps: float,
    sample_rate: int,
    *,
    window: int = 1,
    limits: tuple[float, float] = (0.0, math.inf),
) -> ClipLength:
    """Frames and samples of a clip of ``seconds``: ``round(seconds * fps)``, at least one frame.

    Args:
        seconds: above 0 and within ``limits`` (inclusive).
        fps: frames per second, 1 to 120; 23.976 and the like mean 24000/1001.
        sample_rate: Hz.
        window: frames of the video codec's windows; the model makes a multiple of it.

    Raises:
        UsageError: seconds or frame rate out of range.
    """
    fps, (low, high) = check_fps(fps), limits
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if not number or not low <= seconds <= high or seconds <= 0:
        wanted = f"between {low} and {high}" if low > 0 else f"above 0 and at most {high:g}"
        raise UsageError(f"seconds must be {wanted}, got {seconds}")
    frames = max(1, round(seconds * fps))
    whole = -(-frames // window) * window
    return ClipLength(
        frames, samples_for(frames, fps, sample_rate), whole, samples_for(whole, fps, sample_rate), fps, sample_rate
    )
