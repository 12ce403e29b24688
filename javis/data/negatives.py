"""Asynchronous twins of clips for the contrastive stage of HiST-Sypo (JavisDiT, arXiv 2503.23377, section 3.3).

A positive is a clip, a negative the same clip with its picture or its sound changed so that the two no longer belong
together: out of place (axis "spatial") or out of time (axis "temporal"). Here are the kinds and those of the picture,
in negatives_sound.py those of the sound. Functions work on raw clips, video uint8 [T, H, W, 3] and waveform float32
[samples], and draw from a numpy ``Generator``: same generator, same negative.

| kind | axis | what it does |
|---|---|---|
| video_grid_mask | spatial | blacks out cells of a grid that hide most of what moves |
| video_masklet | spatial | pastes a cut-out moving object of another clip |
| video_shift | temporal | frames earlier or later; the edge frame is held |
| video_stall | temporal | one frame is held, everything after it comes late |
| audio_add | spatial | adds the sound of another clip |
| audio_delete | spatial | takes one source out; needs the sources apart |
| audio_volume | spatial | a smooth gain curve that changes the level of most events by at least 12 dB |
| audio_shift | temporal | sound earlier or later, silence at the edge |
| audio_mute | temporal | silences a stretch that holds events |
| audio_repeat | temporal | a stretch sounds twice, everything after it comes late |
| audio_speed | temporal | faster or slower, pitch included |

No negative is one by name only: a temporal one is returned only if seen and heard events agree to an event F1 of at
most ``MAX_F1`` within ``TOLERANCE`` (a shift by a period of a periodic clip is refused), a spatial one only if what it
promises is the case. Where no draw of ``ATTEMPTS`` satisfies that, :class:`NoNegative` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from javis.eval.matching import count_events

Axis = Literal["spatial", "temporal"]
Modality = Literal["video", "audio"]
Video: TypeAlias = NDArray[np.uint8]  # [T, H, W, 3]
Waveform: TypeAlias = NDArray[np.float32]  # [samples]

TOLERANCE = 0.1  # seconds within which a seen and a heard event are one
MIN_SHIFT = 0.2  # seconds; beyond the 185 ms (sound late) that ITU-R BT.1359-1 calls the limit of acceptability
MAX_F1 = 2 / 3  # of seen against heard events in a temporal negative
MIN_GAIN_DB = 12.0  # by which audio_volume changes the level of at least half of the events
MIN_HIDDEN = 0.5  # share of what moves, or of the given points, that video_grid_mask hides
MIN_MASKLET = 0.05  # share of the picture that a pasted masklet changes, averaged over time
MAX_MASKLET = 0.2  # share of the picture that it is made to cover, at most
MOVING = 24  # levels (of 255) by which a pixel must differ to count as changed
ATTEMPTS = 60  # draws before a kind is given up
RAMP = 0.004  # seconds over which cuts in the sound are faded
DECAY = 0.15  # seconds of an event's sound that a mute must cover at least


@dataclass(frozen=True)
class Kind:
    """What a kind of negative changes and on which axis it is contrasted."""

    axis: Axis
    modality: Modality


KINDS: dict[str, Kind] = {
    "video_grid_mask": Kind("spatial", "video"),
    "video_masklet": Kind("spatial", "video"),
    "video_shift": Kind("temporal", "video"),
    "video_stall": Kind("temporal", "video"),
    "audio_add": Kind("spatial", "audio"),
    "audio_delete": Kind("spatial", "audio"),
    "audio_volume": Kind("spatial", "audio"),
    "audio_shift": Kind("temporal", "audio"),
    "audio_mute": Kind("temporal", "audio"),
    "audio_repeat": Kind("temporal", "audio"),
    "audio_speed": Kind("temporal", "audio"),
}


class NoNegative(ValueError):
    """The clip has no negative of this kind; the message says why."""


@dataclass(frozen=True)
class Negative:
    """A changed stream: ``video`` or ``waveform``, the other is None; ``changes`` says what was done (plain values)."""

    kind: str
    video: Video | None = None
    waveform: Waveform | None = None
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Masklet:
    """An object cut out of a clip."""

    frames: Video  # [T, h, w, 3]
    alpha: NDArray[np.float32]  # [T, h, w], 0..1


def agreement(seen: Sequence[float], heard: Sequence[float]) -> float:
    """Event F1 of two lists of times (seconds) within ``TOLERANCE``, matched one to one; 1 without any event."""
    f1 = count_events(seen, heard, TOLERANCE).f1
    return 1.0 if f1 is None else f1


# -- picture ----------------------------------------------------------------------------------------------------------


def video_grid_mask(video: Video, rng: np.random.Generator, *, points: NDArray[np.float64] | None = None) -> Negative:
    """Black out 40 to 70 % of the cells of a 4x4 to 8x8 grid, the same in all frames.

    Args:
        video: [T, H, W, 3].
        rng: source of the draw.
        points: places that matter, (x, y) in pixels, [N, 2]: where things are when they sound. None: what moves counts.

    Raises:
        NoNegative: no draw hid ``MIN_HIDDEN`` of the points (of the motion).
    """
    height, width = video.shape[1:3]
    weight = _motion(video) if points is None else None
    if weight is not None and not weight.any():
        raise NoNegative("video_grid_mask: nothing moves in the picture")
    for _ in range(ATTEMPTS):
        cells = int(rng.integers(4, 9))
        masked: NDArray[np.bool_] = np.zeros(cells * cells, dtype=bool)
        masked[rng.permutation(cells * cells)[: round(cells * cells * rng.uniform(0.4, 0.7))]] = True
        rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
        hidden = masked.reshape(cells, cells)[rows[:, None], columns[None, :]]
        if weight is not None:
            share = float(weight[hidden].sum() / weight.sum())
        else:
            assert points is not None
            x = np.clip(points[:, 0].astype(int), 0, width - 1)
            y = np.clip(points[:, 1].astype(int), 0, height - 1)
            share = float(hidden[y, x].mean())
        if share >= MIN_HIDDEN:
            changed = np.where(hidden[None, :, :, None], np.uint8(0), video)
            return Negative("video_grid_mask", video=changed, changes={"cells": cells, "hidden": round(share, 3)})
    raise NoNegative(f"video_grid_mask: no grid hid {MIN_HIDDEN:.0%} of what matters")


def video_masklet(video: Video, rng: np.random.Generator, *, masklet: Masklet) -> Negative:
    """Paste an object of another clip at a random place, so large that it covers 5 to 20 % of the picture.

    Args:
        video: [T, H, W, 3].
        rng: source of the draw.
        masklet: of any size and length; its last frame is held.

    Raises:
        NoNegative: the object changes less than ``MIN_MASKLET`` of the picture wherever it was put.
    """
    frames, height, width = video.shape[:3]
    box = _bounds(masklet.alpha)
    if box is None:
        raise NoNegative("video_masklet: the masklet is empty")
    (top, bottom), (left, right) = box
    time = np.minimum(np.arange(frames), len(masklet.frames) - 1)
    object_height, object_width = masklet.alpha.shape[1:]
    area = float(masklet.alpha.mean())
    for _ in range(ATTEMPTS):
        scale = float(np.clip(np.sqrt(rng.uniform(MIN_MASKLET, MAX_MASKLET) / area), 0.5, 4.0))
        # Picture pixel -> masklet pixel: scaled about the middle of where the object is, then moved.
        at_y, at_x = rng.uniform(0.1, 0.9) * height, rng.uniform(0.1, 0.9) * width
        y = (np.arange(height) + 0.5 - at_y) * (object_height / height / scale) + (top + bottom) / 2
        x = (np.arange(width) + 0.5 - at_x) * (object_width / width / scale) + (left + right) / 2
        rows, columns = np.flatnonzero((y >= 0) & (y < object_height)), np.flatnonzero((x >= 0) & (x < object_width))
        index = np.ix_(time, y[rows].astype(int), x[columns].astype(int))
        alpha, pasted = masklet.alpha[index][..., None], masklet.frames[index].astype(np.float32)
        window: tuple[Any, ...] = np.ix_(np.arange(frames), rows, columns)
        under = video[window].astype(np.float32)
        mixed = np.round(under + alpha * (pasted - under))
        share = float((np.abs(mixed - under).max(axis=3) >= MOVING).sum()) / (frames * height * width)
        if share >= MIN_MASKLET:
            changed = video.copy()
            changed[window] = mixed.astype(np.uint8)
            changes = {"x": round(at_x, 2), "y": round(at_y, 2), "scale": round(scale, 3), "share": round(share, 4)}
            return Negative("video_masklet", video=changed, changes=changes)
    raise NoNegative(f"video_masklet: the object changes less than {MIN_MASKLET:.0%} of the picture")


def video_shift(video: Video, rng: np.random.Generator, *, fps: float, events: Sequence[float]) -> Negative:
    """Move the picture by ``MIN_SHIFT`` to 40 % of the clip, later or earlier; the edge frame is held.

    Args:
        video: [T, H, W, 3].
        rng: source of the draw.
        fps: frames per second.
        events: times of what is seen and heard, seconds.

    Raises:
        NoNegative: there are no events, or events agree whatever the shift.
    """
    total = len(video)

    def draw() -> tuple[list[float], Callable[[], Negative]]:
        shift = draw_shift(rng, total / fps)
        frames = int(np.sign(shift) * max(np.ceil(MIN_SHIFT * fps), round(abs(shift) * fps)))
        seen = [e + frames / fps for e in events if 0 <= e + frames / fps < total / fps]
        index = np.clip(np.arange(total) - frames, 0, total - 1)
        return seen, lambda: Negative("video_shift", video=video[index], changes={"seconds": frames / fps})

    return until_asynchronous("video_shift", draw, events)


def video_stall(video: Video, rng: np.random.Generator, *, fps: float, events: Sequence[float]) -> Negative:
    """Hold one frame for ``MIN_SHIFT`` to half of the clip; what follows comes that much later, the end is cut.

    Arguments and errors as in :func:`video_shift`.
    """
    total = len(video)

    def draw() -> tuple[list[float], Callable[[], Negative]]:
        least = int(np.ceil(MIN_SHIFT * fps))
        held = int(rng.integers(least, max(least + 1, total // 2 + 1)))
        at = int(rng.integers(0, max(1, total - held)))
        seen = [t for t in (e if e <= at / fps else e + held / fps for e in events) if t < total / fps]
        index = np.concatenate([np.arange(at), np.full(held, at), np.arange(at, total)])[:total]
        changes = {"at": at / fps, "seconds": held / fps}
        return seen, lambda: Negative("video_stall", video=video[index], changes=changes)

    return until_asynchronous("video_stall", draw, events)


# -- helpers ----------------------------------------------------------------------------------------------------------


def until_asynchronous(
    kind: str, draw: Callable[[], tuple[list[float], Callable[[], Negative]]], events: Sequence[float]
) -> Negative:
    """Draw until the events of the changed stream disagree with ``events``, the times of the other stream."""
    if not events:
        raise NoNegative(f"{kind}: no events are seen and heard, so nothing can be out of time")
    for _ in range(ATTEMPTS):
        moved, make = draw()
        if agreement(events, moved) <= MAX_F1:
            return make()
    raise NoNegative(f"{kind}: {ATTEMPTS} draws left the events in agreement (F1 above {MAX_F1:.2f})")


def draw_shift(rng: np.random.Generator, duration: float) -> float:
    size = rng.uniform(MIN_SHIFT, max(MIN_SHIFT, 0.4 * duration))
    return float(size if rng.random() < 0.5 else -size)


def _motion(video: Video) -> NDArray[np.float64]:
    """Mean absolute change from frame to frame, [H, W]."""
    return np.abs(np.diff(video.astype(np.int16), axis=0)).mean(axis=(0, 3)) if len(video) > 1 else np.zeros((1, 1))


def _bounds(alpha: NDArray[np.float32]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Rows and columns (first, last + 1) where anything is, over all frames; None for an empty mask."""
    there = alpha.max(axis=0) > 0.5
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    if not len(rows):
        return None
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)
