"""Frames as the networks want them: sizes, crops, ranges, and which frames of a clip."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def as_rgb(frames: np.ndarray) -> np.ndarray:
    """Check uint8 [T, H, W, 3], T >= 1.

    Raises:
        ValueError: another shape or dtype.
    """
    values = np.asarray(frames)
    if values.ndim != 4 or values.shape[-1] != 3 or values.dtype != np.uint8 or not values.size:
        raise ValueError(f"frames are {values.dtype} {values.shape}, expected uint8 [frames, height, width, 3]")
    return values


def spread(count: int, wanted: int) -> np.ndarray:
    """Indices of ``wanted`` of ``count`` frames, evenly from the first to the last; repeated if there are fewer."""
    return np.asarray(torch.linspace(0, count - 1, wanted).round().long())


def nearest_frames(count: int, fps: float, to: float) -> np.ndarray:
    """Indices that show ``count`` frames at ``fps`` at another rate: frame k shows the instant k / rate."""
    wanted = max(1, round(count * to / fps))
    return np.minimum((np.arange(wanted) * fps / to + 1e-6).astype(int), count - 1)


def normalised(pixels: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Pixels in 0..1 [..., 3, H, W] less a mean, over a deviation, by channel."""
    shape = (3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def as_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [T, 3, H, W] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255.0


def clip_frames(
    frames: np.ndarray,
    size: int = 224,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """CLIP's preprocessing: short side to ``size`` (bicubic, by Pillow), the middle, normalised: [T, 3, size, size]."""
    from PIL import Image

    height, width = frames.shape[1:3]
    short = min(height, width)
    scaled = (int(size * width / short), int(size * height / short))  # width, height
    left, top = (round((side - size) / 2) for side in scaled)
    resized = (np.asarray(Image.fromarray(frame).resize(scaled, Image.Resampling.BICUBIC)) for frame in frames)
    return normalised(
        as_pixels(np.stack([frame[top : top + size, left : left + size] for frame in resized])), mean, std
    )


def short_side(pixels: Tensor, size: int) -> Tensor:
    """[T, 3, H, W] scaled (bilinear) so that the short side is ``size``; the long one rounded down."""
    height, width = pixels.shape[-2:]
    if width < height:
        target = (math.floor(height / width * size), size)
    else:
        target = (size, math.floor(width / height * size))
    return F.interpolate(pixels, target, mode="bilinear", align_corners=False)


def letterboxed(pixels: Tensor, size: int) -> Tensor:
    """[T, 3, H, W] scaled (bilinear, antialiased) into a black square of ``size``."""
    height, width = pixels.shape[-2:]
    longest = max(height, width)
    target = (max(1, int(size * height / longest)), max(1, int(size * width / longest)))
    made = F.interpolate(pixels, target, mode="bilinear", align_corners=False, antialias=True)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return F.pad(made, (left, size - target[1] - left, top, size - target[0] - top))
