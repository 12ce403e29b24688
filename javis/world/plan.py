"""Random motions: draws event times and physical constants for one source.

Each ``plan_*`` returns None when the draw breaks an event rule; the caller draws again. The rules: no event closer to
the ends than ``EventRules.margin``, events of one source at least ``MIN_GAP`` apart, as many events as the rules allow.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from javis.world import motion as m

SIDE_CENTRES = {"left": 0.19, "middle": 0.5, "right": 0.81}
# A swing needs more width than a third; the centre of the object keeps to its third.
SWING_CENTRES = {"left": 0.235, "middle": 0.5, "right": 0.765}
SWING_HALF_WIDTH = 0.215
POST_WIDTH = 0.035
MIN_GAP = 0.25
MIN_CROSS_GAP = 0.12
SPEED_AT_FULL_STRENGTH = {"bounces": 2.8, "swings": 1.3, "knocks": 3.0}


@dataclass(frozen=True)
class EventRules:
    """How many events a source has, and how far from the ends (seconds)."""

    seconds: float
    least: int
    most: int
    margin: float

    @staticmethod
    def of(seconds: float, sources: int) -> EventRules:
        """2 to 4 events a source in 2 s alone, 1 to 3 with a second source; in proportion for other lengths."""
        if sources == 1:
            least, most = (2 if seconds >= 1.5 else 1), max(1, math.floor(2 * seconds))
        else:
            least, most = 1, max(1, math.floor(1.5 * seconds))
        return EventRules(seconds, least, most, 0.12 if seconds >= 1 else 0.08)

    def allow(self, times: list[float]) -> bool:
        """True if the times obey the rules."""
        if not self.least <= len(times) <= self.most:
            return False
        if times[0] < self.margin or times[-1] > self.seconds - self.margin:
            return False
        return all(b - a >= MIN_GAP for a, b in itertools.pairwise(times))


def strength(kind: str, speed: float) -> float:
    """Impact strength in [0.2, 1], proportional to the impact speed (frame sides per second)."""
    return min(1.0, max(0.2, speed / SPEED_AT_FULL_STRENGTH[kind]))


def _first_time(rng: np.random.Generator, rules: EventRules, share: float) -> float:
    latest = max(rules.margin, rules.margin + share * (rules.seconds - 2 * rules.margin))
    return float(rng.uniform(rules.margin, latest))


def plan_bounce(rng: np.random.Generator, rules: EventRules, side: str, shape: str, radius: float) -> m.Bounce | None:
    """Gravity, height, restitution and first contact are random; the later contacts follow from them."""
    size = m.extents(shape, radius)
    fall, restitution = rng.uniform(0.25, 0.44), rng.uniform(0.72, 0.92)
    highest = min(0.46, m.FLOOR - size.bottom - size.top - 0.05)
    height = rng.uniform(0.30, highest)
    gravity = 2 * height / fall**2
    times, impacts, rebounds = [_first_time(rng, rules, 0.65)], [gravity * fall], []
    while True:
        hop = 2 * restitution * impacts[-1] / gravity
        if hop < m.SETTLE_SECONDS:
            rebounds.append(0.0)
            break
        rebounds.append(restitution * impacts[-1])
        if times[-1] + hop >= rules.seconds + 0.02:
            break
        times.append(times[-1] + hop)
        impacts.append(rebounds[-1])
    if not rules.allow(times):
        return None
    return m.Bounce(
        x=SIDE_CENTRES[side] + rng.uniform(-0.01, 0.01),
        ground=m.FLOOR - size.bottom,
        bottom=size.bottom,
        gravity=gravity,
        times=tuple(times),
        impacts=tuple(impacts),
        rebounds=tuple(rebounds),
        strengths=tuple(strength("bounces", v) for v in impacts),
    )


def plan_swing(rng: np.random.Generator, rules: EventRules, side: str, shape: str, radius: float) -> m.Swing | None:
    """Period, width, restitution, side of the post and first contact are random; contacts are half a period apart."""
    size = m.extents(shape, radius)
    half_period, restitution = rng.uniform(0.34, 0.85), rng.uniform(0.82, 0.95)
    start = _first_time(rng, rules, 0.65)
    times = [start]
    while times[-1] + half_period < rules.seconds + 0.02:
        times.append(times[-1] + half_period)
    if not rules.allow(times):
        return None
    direction = 1 if rng.random() < 0.5 else -1
    length = rng.uniform(0.48, 0.60)
    centre = SWING_CENTRES[side]
    pivot = centre + direction * (SWING_HALF_WIDTH - POST_WIDTH - size.side)
    # The far end of the swing leaves room for the silhouette, also turned by the angle of the string; turning moves the
    # wide base of a triangle outwards the most.
    turned, spare = (1.2, 0.025) if shape == "triangle" else (1.12, 0.01)
    room = direction * (pivot - centre) + SWING_HALF_WIDTH - turned * max(size.side, radius) - spare
    reach = min(0.18, room) * rng.uniform(0.8, 1.0)
    first = math.asin(reach / length)
    omega = math.pi / half_period
    angles = tuple(first * restitution ** (k + 1) for k in range(len(times)))
    speeds = [length * omega * a for a in (first, *angles[:-1])]
    return m.Swing(
        pivot=pivot,
        length=length,
        direction=direction,
        side=size.side,
        omega=omega,
        times=tuple(times),
        first=first,
        angles=angles,
        strengths=tuple(strength("swings", v) for v in speeds),
    )


def _random_times(rng: np.random.Generator, rules: EventRules, gap: float) -> list[float] | None:
    count = int(rng.integers(rules.least, rules.most + 1))
    free = rules.seconds - 2 * rules.margin - (count - 1) * gap
    if free < 0:
        return None
    # Sorted uniform points in the free time, spread apart by the gap: uniform over all allowed patterns.
    points = np.sort(rng.uniform(0.0, free, count))
    return [float(rules.margin + p + k * gap) for k, p in enumerate(points)]


def plan_knock(rng: np.random.Generator, rules: EventRules, side: str, shape: str, radius: float) -> m.Knock | None:
    """Each thrust has its own random speed, and its time is random."""
    size = m.extents(shape, radius)
    restitution = rng.uniform(0.8, 1.0)
    times = _random_times(rng, rules, 0.44)
    if times is None:
        return None
    thrusts = [float(v) for v in rng.uniform(0.16, 0.24, len(times))]
    returns = [thrust / restitution for thrust in thrusts]
    if any(a + back + thrust > b for a, b, back, thrust in zip(times, times[1:], returns, thrusts[1:], strict=False)):
        return None
    depth = rng.uniform(0.20, 0.26)
    contact = rng.uniform(0.22, 0.34) + size.top
    return m.Knock(
        x=SIDE_CENTRES[side] + rng.uniform(-0.01, 0.01),
        contact=contact,
        top=size.top,
        depth=depth,
        times=tuple(times),
        thrusts=tuple(thrusts),
        returns=tuple(returns),
        strengths=tuple(strength("knocks", 2 * depth / thrust) for thrust in thrusts),
    )


def plan_flash(rng: np.random.Generator, rules: EventRules, side: str, shape: str, radius: float) -> m.Flash | None:
    """Place and times are random."""
    times = _random_times(rng, rules, MIN_GAP + 0.03)
    if times is None:
        return None
    y = rng.uniform(0.30, 0.62)
    return m.Flash(SIDE_CENTRES[side] + rng.uniform(-0.01, 0.01), y, tuple(times))


def plan_float(rng: np.random.Generator, side: str, radius: float) -> m.Float:
    """Always possible: it has no events."""
    amplitude = rng.uniform(0.09, 0.17)
    reach = amplitude + 1.15 * radius + 0.04
    return m.Float(
        x=SIDE_CENTRES[side],
        y=rng.uniform(reach, m.FLOOR - reach),
        amplitude_x=rng.uniform(0.004, 0.012),
        amplitude_y=amplitude,
        period_x=rng.uniform(1.4, 2.6),
        period_y=rng.uniform(1.3, 2.4),
        phase_x=rng.uniform(0, 2 * math.pi),
        phase_y=rng.uniform(0, 2 * math.pi),
    )


def plan_rings(rng: np.random.Generator, rules: EventRules) -> tuple[float, ...] | None:
    """Times of an unseen bell."""
    times = _random_times(rng, rules, MIN_GAP + 0.03)
    return None if times is None else tuple(times)
