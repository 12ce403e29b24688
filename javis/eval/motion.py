"""Event times from pixels: contacts of moving objects, flashes of still ones.

An object is followed by its colour (tracking.py). A contact is where its distance from what it strikes has a cusp: the
velocity reverses (or stops) within one instant. Around each candidate the motion before and after is fitted with the
instant itself as a free parameter, so that the time comes out between the frames. A smooth turn of the same height
leaves no cusp and is not an event. A flash is a jump in brightness that then fades; how far it has faded in the first
lit frame says when, between the frames, it began.

Frame i shows the instant i / fps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.eval.tracking import Picture, Track
from javis.world.motion import GLOW_SECONDS
from javis.world.render import BLOOM, COLOURS, DIM

MIN_RISE = 0.022  # frame sides: smallest excursion that counts as a motion, about 1.4 of 64 pixels
# Frame sides per second: smallest velocity jump that counts as a contact, about half of the world's smallest.
MIN_CUSP = {"bounces": 0.4, "knocks": 1.5, "swings": 0.25}
# A cusp must leave at most this share of the misfit of a smooth turn. Swings are slow, so that blur in time hides much
# of their cusp (the smooth turn at their far end gives 1.6 and more); but nothing else moves to and fro.
SMOOTH_RATIO = {"bounces": 0.8, "knocks": 0.8, "swings": 1.2}
LAST_FRAMES = 0.4  # frames: a contact so close to the last frame would show on one side only
MIN_FLASH = 0.25  # of the full brightening
LATE_SHARE = 0.5  # how much a jump that is late by a frame counts in the size of a flash
WINDOW_SECONDS = 0.20  # motion fitted on either side of a contact
ALIKE = 0.004  # seconds: weight of the prior that the speeds before and after a contact are alike
MIN_GAP = 0.15  # seconds between two events of one object


@dataclass(frozen=True)
class VideoEvent:
    """A contact or flash that was seen."""

    time: float  # seconds
    colour: str
    kind: str  # bounces, knocks, swings or flashes: the motion that the fit assumed
    strength: float  # velocity jump in frame sides per second, or share of the full brightening
    x: float  # where, in frame sides
    y: float


@dataclass(frozen=True)
class _Cusp:
    time: float
    jump: float
    error: float


def video_events(video: np.ndarray | Picture, fps: float, clause: Mapping[str, Any] | None = None) -> list[VideoEvent]:
    """Events that the picture shows, in order of time.

    Args:
        video: uint8 (or float in 0..1) [T, H, W, 3], or a ``Picture`` of it.
        fps: frames per second.
        clause: attributes as ``javis.world.parse_prompt`` gives them; its ``colour`` and ``motion``, where not None,
            say which object to look at and how it is meant to move. Without a clause every colour that is there is
            looked at, and the motion is read from the track. What the clause calls unseen or silent shows no events.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}, expected a number > 0")
    told = clause or {}
    if told.get("visible") is False or told.get("audible") is False:
        return []
    picture = Picture.of(video)
    found: list[VideoEvent] = []
    for colour in [told["colour"]] if told.get("colour") else picture.colours:
        found += track_events(picture.frames, picture.track(colour), fps, told.get("motion"))
    return sorted(found, key=lambda event: event.time)


def track_events(frames: np.ndarray, track: Track, fps: float, motion: str | None = None) -> list[VideoEvent]:
    """Events of one object that was followed; ``motion`` None reads the kind of motion from the track."""
    kind = motion if motion in ("bounces", "knocks", "swings", "flashes") else read_motion(frames, track, fps)
    if kind == "flashes":
        found = _flashes(flash_curve(frames, track), fps)
    elif kind in ("bounces", "knocks", "swings"):
        found = max((_contacts(signal, fps, kind) for signal in _directions(track, kind)), key=_plausibility)
    else:
        return []
    times = np.arange(len(frames)) / fps
    return [
        VideoEvent(
            c.time, track.colour, kind, c.jump, *(float(np.interp(c.time, times, p)) for p in (track.x, track.y))
        )
        for c in found
    ]


def read_motion(frames: np.ndarray, track: Track, fps: float) -> str:
    """Kind of motion of a track: bounces, knocks, swings, flashes, floats, or rests."""
    spread_x, spread_y = (float(np.ptp(np.quantile(p, [0.03, 0.97]))) for p in (track.x, track.y))
    spread = max(spread_x, spread_y)
    if spread < 0.06 and _flashes(flash_curve(frames, track), fps):
        return "flashes"
    if spread < 0.035:
        return "rests"
    kinds = ("swings",) if spread_x > 1.5 * spread_y else ("bounces", "knocks")
    options = {
        kind: max((_contacts(s, fps, kind) for s in _directions(track, kind)), key=_plausibility) for kind in kinds
    }
    best = max(options, key=lambda kind: _plausibility(options[kind]))
    return best if options[best] else "floats"


def _plausibility(cusps: list[_Cusp]) -> float:
    """Of two readings the one with the stronger cusps, less the misfit, is right: a smooth turn has next to none."""
    return sum(c.jump for c in cusps) - 40.0 * sum(c.error for c in cusps) if cusps else 0.0


def _directions(track: Track, kind: str) -> list[np.ndarray]:
    """Signals that are largest at a contact; a swing may strike on either side."""
    if kind == "bounces":
        return [track.y]
    return [-track.y] if kind == "knocks" else [track.x, -track.x]


# --- contacts -----------------------------------------------------------------------------------------------------


def _contacts(signal: np.ndarray, fps: float, kind: str) -> list[_Cusp]:
    """Cusps of ``signal`` [T] that point upwards."""
    candidates = _arrivals(signal)
    found: list[_Cusp] = []
    for k, index in enumerate(candidates):
        before = candidates[k - 1] if k else -math.inf
        after = candidates[k + 1] if k + 1 < len(candidates) else math.inf
        cusp = _fit_cusp(signal, index, fps, kind, before, after)
        if cusp is not None and (not found or cusp.time - found[-1].time >= MIN_GAP):
            found.append(cusp)
    return found


def _arrivals(signal: np.ndarray) -> list[int]:
    """Frames at which ``signal`` has risen by ``MIN_RISE`` and then falls by as much, or stays where it is."""
    found: list[int] = []
    rise = max(MIN_RISE, 0.1 * float(np.ptp(signal)))
    lowest, highest, rising = 0, 0, False  # frames of the last valley and of the peak after it
    for i, value in enumerate(signal):
        if rising:
            if value > signal[highest]:
                highest = i
            elif value < signal[highest] - rise:
                found.append(highest)
                rising, lowest = False, i
        else:
            lowest = i if value < signal[lowest] else lowest
            if value > signal[lowest] + rise:
                rising, highest = True, i
    if rising:
        # Settled: the first frame that is about as high as the highest one, not the highest by noise.
        first = next(i for i in range(lowest, highest + 1) if signal[i] > signal[highest] - 0.012)
        if first < len(signal) - 1:
            found.append(first)
    return found


def _fit_cusp(signal: np.ndarray, index: int, fps: float, kind: str, before: float, after: float) -> _Cusp | None:
    """Fit the motion on both sides of a contact near frame ``index``; None if there is no cusp."""
    reach = WINDOW_SECONDS * fps
    low = max(0, math.ceil(max(index - reach - 0.5, before + 0.75)))
    high = min(len(signal) - 1, math.floor(min(index + reach + 0.5, after - 0.75)))
    frames = np.arange(low, high + 1)
    if len(frames) < 5:
        return None
    times, values = frames / fps, signal[frames]
    grid = np.arange(index - 1.3, index + 1.3001, 0.05) / fps
    grid = grid[(grid > times[0]) & (grid < times[-1])]
    errors = np.full(len(grid), np.inf)
    jumps = np.zeros(len(grid))
    for design, slopes, alike in _designs(times, grid, kind):
        # A weak prior that the speeds before and after are alike decides where one side has too few frames to tell.
        normal = design.transpose(0, 2, 1) @ design + np.outer(alike, alike) + 1e-7 * np.eye(design.shape[2])
        weights = np.linalg.solve(normal, (design.transpose(0, 2, 1) @ values)[..., None])[..., 0]
        error = np.sqrt(((np.einsum("gtk,gk->gt", design, weights) - values) ** 2).sum(axis=1) / len(times))
        jump = weights @ slopes
        # Both sides must come towards the contact; a settling object may stop on the far side.
        error = np.where(jump > 0, error, np.inf)
        better = error < errors
        errors[better], jumps[better] = error[better], jump[better]
    if not np.isfinite(errors).any():
        return None
    k = int(errors.argmin())
    time = float(grid[k])
    if 0 < k < len(grid) - 1 and np.isfinite(errors[k - 1 : k + 2]).all():
        squares = [float(e) ** 2 for e in errors[k - 1 : k + 2]]
        bend = squares[0] - 2 * squares[1] + squares[2]
        if bend > 0:
            time += float(0.5 * (squares[0] - squares[2]) / bend * (grid[1] - grid[0]))
    # With fewer than three frames on a side a cubic bends around anything.
    telling = (times > time).sum() >= 3 and (times < time).sum() >= 3
    if time > (len(signal) - 1 - LAST_FRAMES) / fps:
        return None
    if jumps[k] < MIN_CUSP[kind] or (telling and errors[k] > SMOOTH_RATIO[kind] * _smooth_error(times, values)):
        return None
    return _Cusp(time, float(jumps[k]), float(errors[k]))


def _smooth_error(times: np.ndarray, values: np.ndarray) -> float:
    """Misfit (rms) of a motion without any cusp: a cubic."""
    design = np.vander((times - times.mean()) / max(float(np.ptp(times)), 1e-9), 4)
    residual = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(np.sqrt((residual**2).mean()))


def _designs(times: np.ndarray, grid: np.ndarray, kind: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Linear models of the motion around each contact time of ``grid``.

    Returns triples of a design [G, T, K] (columns multiply free weights), the vector [K] that turns the weights into
    the velocity jump, and the vector [K] of the row that holds the two speeds together.
    """
    since = times[None, :] - grid[:, None]
    after, before = np.maximum(since, 0.0), np.maximum(-since, 0.0)
    one = np.ones_like(since)
    if kind == "swings":
        # Half sines: s = c - a sin(omega u) on either side, with a quarter period at which it is let go or turns.
        found = []
        for half_period in (0.38, 0.46, 0.56, 0.68, 0.82):
            omega = math.pi / half_period
            columns = [one, -np.sin(omega * np.minimum(before, half_period / 2)), -np.sin(omega * after)]
            found.append(
                (np.stack(columns, axis=2), np.array([0.0, omega, omega]), ALIKE * np.array([0.0, omega, -omega]))
            )
        return found
    if kind == "knocks":
        # Constant acceleration from rest to contact, constant deceleration back to rest.
        found = []
        for thrust in (0.15, 0.17, 0.19, 0.21, 0.23, 0.25):
            for back in (1.0, 1.12, 1.25):
                columns = [one] + [
                    -(1.0 - np.maximum(0.0, 1.0 - u / seconds) ** 2)
                    for u, seconds in ((before, thrust), (after, thrust * back))
                ]
                speeds = np.array([0.0, 2 / thrust, 2 / (thrust * back)])
                found.append((np.stack(columns, axis=2), speeds, ALIKE * speeds * [0, 1, -1]))
        return found
    # Ballistic arcs of one gravity on both sides, or an arc that ends at rest.
    arcs = np.stack([one, -before, -after, before**2 + after**2], axis=2)
    stop = np.stack([one, -before, before**2], axis=2)
    one_sided = np.array([0.0, 1.0, 0.0])
    alike = ALIKE * np.array([0.0, 1.0, -1.0, 0.0])
    return [(arcs, np.array([0.0, 1.0, 1.0, 0.0]), alike), (stop, one_sided, np.zeros(3))]


# --- flashes ------------------------------------------------------------------------------------------------------


def flash_curve(frames: np.ndarray, track: Track) -> np.ndarray:
    """Brightening of a still object over time [T]: 0 at rest, 1 when it has just lit up."""
    mask = track.coverage.max(axis=0)
    # Inner pixels alone: at the edge the background shares the pixel, and the brightening would read too small.
    inner = mask.copy()
    for axis in (0, 1):
        inner = np.minimum(inner, np.minimum(np.roll(mask, 1, axis), np.roll(mask, -1, axis)))
    mask = inner if (inner > 0.5).sum() >= 6 else mask
    mask = mask * (mask > 0.5)
    if mask.sum() < 4.0:
        return np.zeros(len(frames))
    height, width = mask.shape
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    row, column = float(mask.sum(axis=1) @ rows / mask.sum()), float(mask.sum(axis=0) @ columns / mask.sum())
    distance = np.hypot(rows[:, None] - row, columns[None, :] - column)
    mask = np.clip(0.04 * max(height, width) + 0.5 - distance, 0.0, 1.0)
    total = float(mask.sum())
    colour = np.tensordot(frames, mask, axes=([1, 2], [0, 1])) / total
    base = np.array(COLOURS[track.colour]) / 255.0
    lit = (1 - DIM) * base + BLOOM * (1 - base)
    along = colour @ lit / (lit @ lit)
    return np.asarray(along - np.quantile(along, 0.1), dtype=np.float64)


def _flashes(curve: np.ndarray, fps: float) -> list[_Cusp]:
    """Jumps of a brightness curve [T], each followed by the fading of the world's lamps."""
    step = 1.0 / fps
    keep = math.exp(-step / GLOW_SECONDS)
    # What is not explained by the fading of what was there already.
    fresh = np.diff(curve, prepend=curve[0]) + (1 - keep) * np.maximum(np.concatenate([curve[:1], curve[:-1]]), 0.0)
    found: list[_Cusp] = []
    for i in range(1, len(curve)):
        near = fresh[max(0, i - 1) : i + 2]
        if fresh[i] < MIN_FLASH or fresh[i] < near.max():
            continue
        # A lamp starts again from full; a codec may have moved some of the jump into the frame before or after.
        early = max(0.0, fresh[i - 1]) if i > 1 else 0.0
        late = max(0.0, fresh[i + 1]) if i + 1 < len(curve) else 0.0
        amount = min(1.0, max(curve[i] + early + LATE_SHARE * late, MIN_FLASH))
        delay = min(step, -GLOW_SECONDS * math.log(amount))
        time = i * step - delay
        if not found or time - found[-1].time >= MIN_GAP:
            found.append(_Cusp(time, float(fresh[i]), 0.0))
    return found
