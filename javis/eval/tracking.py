"""Find a coloured object in every frame: soft masks by hue, centroids to a fraction of a pixel, brightness.

Only pixels are used. Nothing here assumes that the object is drawn well: masks are soft, the centroid is that of a
window which follows the object, and frames in which it is missing are bridged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from javis.world.render import COLOURS

WINDOW_RADIUS = 0.20  # frame sides; a large object reaches 0.13 from its centre


def as_frames(video: np.ndarray) -> np.ndarray:
    """Check a clip and return it as float32 [T, H, W, 3] in 0..1; accepts uint8 or float in 0..1."""
    frames = np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"video has shape {frames.shape}, expected [frames, height, width, 3]")
    if frames.dtype == np.uint8:
        return frames.astype(np.float32) / 255.0
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"video has dtype {frames.dtype}, expected uint8 or floats in 0..1")
    if not np.isfinite(frames).all():
        raise ValueError("video holds NaN or infinite values, expected finite numbers")
    return frames.astype(np.float32)


@lru_cache(maxsize=1)
def _hues() -> tuple[tuple[str, ...], np.ndarray]:
    """Names and chroma vectors [5, 3] of the colours that have a hue (white has none)."""
    names = tuple(name for name in COLOURS if name != "white")
    rgb = np.array([COLOURS[name] for name in names], dtype=np.float32) / 255.0
    return names, rgb - rgb.mean(axis=1, keepdims=True)


def colour_coverage(frames: np.ndarray) -> dict[str, np.ndarray]:
    """How much of each pixel each colour of the world covers: name -> float32 [T, H, W] in 0..1.

    A coloured pixel goes to the hue nearest in angle, with its saturation relative to the full colour; grey props have
    no hue and fall out. White is what all three channels have in common, above the level of the props.
    """
    background = np.median(frames.reshape(-1, 3)[:: max(1, frames.size // 600_000)], axis=0)
    above = frames - background
    chroma = above - above.mean(axis=-1, keepdims=True)
    names, hues = _hues()
    size = np.linalg.norm(hues, axis=1)
    along = chroma @ (hues / size[:, None]).T
    cosine = along / np.maximum(np.linalg.norm(chroma, axis=-1, keepdims=True), 1e-6)
    nearest = cosine.argmax(axis=-1)
    coverage = {}
    for index, name in enumerate(names):
        share = np.where(nearest == index, along[..., index] / size[index], 0.0)
        coverage[name] = np.clip((share - 0.18) / 0.5, 0.0, 1.0).astype(np.float32)
    common = above.min(axis=-1) / (COLOURS["white"][0] / 255.0 - background.mean())
    coverage["white"] = np.clip((common - 0.45) / 0.35, 0.0, 1.0).astype(np.float32)
    return coverage


@dataclass(frozen=True)
class Track:
    """One object over time; lengths are in frame sides (the longer one), x to the right, y down; arrays are [T]."""

    colour: str
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray  # covered area, frame sides squared
    coverage: np.ndarray  # float32 [T, H, W]

    @property
    def found(self) -> bool:
        """True if there is an object of this colour at all: at least a dozen pixels of 64 x 64 in the usual frame."""
        return bool(np.median(self.area) > 0.003 or np.mean(self.area > 0.006) > 0.2)


def _box_sums(maps: np.ndarray, half: int) -> np.ndarray:
    """Sums of [T, H, W] over squares of side ``2 half + 1`` around every pixel, cut off at the borders."""
    for axis in (1, 2):
        total = np.cumsum(maps, axis=axis)
        length = maps.shape[axis]
        high = np.minimum(np.arange(length) + half, length - 1)
        low: np.ndarray = np.arange(length) - half - 1
        below = np.take(total, np.maximum(low, 0), axis=axis)
        shape = [1, 1, 1]
        shape[axis] = length
        maps = np.take(total, high, axis=axis) - np.where((low >= 0).reshape(shape), below, 0.0)
    return maps


def track_colour(frames: np.ndarray, colour: str, coverage: np.ndarray | None = None) -> Track:
    """Follow the object of one colour.

    Args:
        frames: float32 [T, H, W, 3] in 0..1.
        colour: one of the world's colours.
        coverage: result of ``colour_coverage`` for this colour, if known.
    """
    count, height, width = frames.shape[:3]
    side = max(height, width)
    cover = colour_coverage(frames)[colour] if coverage is None else coverage
    sums = _box_sums(cover.astype(np.float64), max(1, round(0.07 * side)))
    flat = sums.reshape(count, -1)
    start = np.stack(np.unravel_index(flat.argmax(axis=1), (height, width)), axis=1)
    y, x = start[:, 0] + 0.5, start[:, 1] + 0.5
    missing = flat.max(axis=1) < 0.25 * np.quantile(flat.max(axis=1), 0.95) + 1e-6
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    radius = WINDOW_RADIUS * side
    for _ in range(5):
        distance = np.hypot(rows[None, :, None] - y[:, None, None], columns[None, None, :] - x[:, None, None])
        weight = cover * np.clip(radius - distance, 0.0, 1.0)
        total = weight.sum(axis=(1, 2))
        safe = np.maximum(total, 1e-6)
        y = np.where(total > 1e-6, (weight.sum(axis=2) @ rows) / safe, y)
        x = np.where(total > 1e-6, (weight.sum(axis=1) @ columns) / safe, x)
    if missing.any() and not missing.all():
        known = np.flatnonzero(~missing)
        x, y = (np.interp(np.arange(count), known, values[known]) for values in (x, y))
    return Track(colour, x / side, y / side, total / side**2, cover)
