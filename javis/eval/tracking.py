"""Find a coloured object in every frame: soft masks by hue, centroids to a fraction of a pixel, brightness.

Only pixels are used. Nothing here assumes that the object is drawn well: masks are soft, the centroid is that of a
window which follows the object, and frames in which it is missing are bridged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from javis.world.render import COLOURS

WORKING_SIDE = 64  # pixels; larger frames are averaged down to between this and its double
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


def shrink(frames: np.ndarray) -> np.ndarray:
    """Average squares of pixels until the longer side is below twice ``WORKING_SIDE``; a remainder is cut off."""
    count, height, width, channels = frames.shape
    factor = min(max(height, width) // WORKING_SIDE, height, width)
    if factor < 2:
        return frames
    rows, columns = height // factor, width // factor
    cut = frames[:, : rows * factor, : columns * factor]
    return cut.reshape(count, rows, factor, columns, factor, channels).mean(axis=(2, 4), dtype=np.float32)


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
        coverage[name] = np.where(nearest == index, np.clip(along[..., index] / size[index], 0.0, 1.0), 0.0)
    common = above.min(axis=-1) / (COLOURS["white"][0] / 255.0 - background.mean())
    coverage["white"] = np.clip((common - 0.4) / 0.6, 0.0, 1.0).astype(np.float32)
    return coverage


def sharpened(colour: str, coverage: np.ndarray) -> np.ndarray:
    """Coverage with faint pixels (noise, halos) set to 0 and well covered ones to 1, for finding the object."""
    low, high = (0.08, 0.66) if colour == "white" else (0.18, 0.68)
    return np.clip((coverage - low) / (high - low), 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Track:
    """One object over time; lengths are in frame sides (the longer one), x to the right, y down; arrays are [T]."""

    colour: str
    x: np.ndarray
    y: np.ndarray
    area: np.ndarray  # covered area, frame sides squared
    coverage: np.ndarray  # sharpened, float32 [T, H, W]
    shares: np.ndarray  # coverage as it is, float32 [T, H, W]


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


def track_colour(colour: str, shares: np.ndarray) -> Track:
    """Follow the object of one colour, given the result [T, H, W] of ``colour_coverage`` for it."""
    cover = sharpened(colour, shares)
    count, height, width = cover.shape
    side = max(height, width)
    sums = _box_sums(cover.astype(np.float64), max(1, round(0.07 * side)))
    flat = sums.reshape(count, -1)
    start = np.stack(np.unravel_index(flat.argmax(axis=1), (height, width)), axis=1)
    y, x = start[:, 0] + 0.5, start[:, 1] + 0.5
    missing = flat.max(axis=1) < 0.25 * np.quantile(flat.max(axis=1), 0.95) + 1e-6
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    radius = WINDOW_RADIUS * side
    for _ in range(4):
        distance = np.hypot(rows[None, :, None] - y[:, None, None], columns[None, None, :] - x[:, None, None])
        weight = cover * np.clip(radius - distance, 0.0, 1.0)
        total = weight.sum(axis=(1, 2))
        safe = np.maximum(total, 1e-6)
        y = np.where(total > 1e-6, (weight.sum(axis=2) @ rows) / safe, y)
        x = np.where(total > 1e-6, (weight.sum(axis=1) @ columns) / safe, x)
    if missing.any() and not missing.all():
        known = np.flatnonzero(~missing)
        x, y = (np.interp(np.arange(count), known, values[known]) for values in (x, y))
    return Track(colour, x / side, y / side, total / side**2, cover, shares)


class Picture:
    """The frames of a clip with what has been found in them, so that readers of one clip share the work."""

    def __init__(self, video: np.ndarray) -> None:
        self.frames = shrink(as_frames(video))
        self._tracks: dict[str, Track] = {}

    @classmethod
    def of(cls, video: np.ndarray | Picture) -> Picture:
        """``video`` itself if it is a Picture, else a new one."""
        return video if isinstance(video, Picture) else cls(video)

    @cached_property
    def coverage(self) -> dict[str, np.ndarray]:
        """``colour_coverage`` of the frames."""
        return colour_coverage(self.frames)

    @cached_property
    def colours(self) -> list[str]:
        """Colours that cover a connected area large enough for an object, the largest first, at most two."""
        areas = {name: _object_area(sharpened(name, maps)) for name, maps in self.coverage.items()}
        least = max(0.0025, 0.08 * max(areas.values()))
        return sorted((name for name, area in areas.items() if area > least), key=lambda name: -areas[name])[:2]

    def track(self, colour: str) -> Track:
        """``track_colour`` of one colour."""
        if colour not in self._tracks:
            self._tracks[colour] = track_colour(colour, self.coverage[colour])
        return self._tracks[colour]


def _object_area(maps: np.ndarray) -> float:
    """Area (frame sides squared) that is solidly covered in the two best frames, so that one flash is enough."""
    solid = maps[:, 1:-1, 1:-1] + maps[:, :-2, 1:-1] + maps[:, 2:, 1:-1] + maps[:, 1:-1, :-2] + maps[:, 1:-1, 2:]
    per_frame = (solid > 2.2).sum(axis=(1, 2)) / max(maps.shape[1:]) ** 2
    return float(np.sort(per_frame)[-2:].mean())
