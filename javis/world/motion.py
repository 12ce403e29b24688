"""Trajectories with exact contact times, as closed forms of time.

Lengths are in frame sides (x to the right, y downwards, both 0..1), times in seconds, angles in radians. A contact is
an instantaneous reversal of velocity, so the position is exact at any time and an event is a time, not a frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

FLOOR = 0.90  # y of the top of the floor
SQUASH_SECONDS = 0.045  # half width of the squash pulse, centred on the contact so that arcs stay symmetric in time
SQUASH = 0.08  # relative shortening at full strength
GLOW_SECONDS = 0.12  # decay constant of a flash
SETTLE_SECONDS = 0.27  # a ball whose next hop would be shorter stays on the floor


class Pose(NamedTuple):
    """State of one object at given times; every field is float64 [T]."""

    x: Array  # centre
    y: Array
    angle: Array  # rotation; positive swings the lower end to the right
    scale_x: Array  # squash, 1 = undeformed
    scale_y: Array
    glow: Array  # brightness above the resting level, 0..1


class Extents(NamedTuple):
    """Distances from the centre of an undeformed, unrotated object to its silhouette."""

    side: float
    top: float
    bottom: float


def extents(shape: str, radius: float) -> Extents:
    """Silhouette of ``shape`` with nominal ``radius``; the corners drawn by ``render`` follow the same numbers."""
    if shape == "ball":
        return Extents(radius, radius, radius)
    if shape == "box":
        return Extents(0.88 * radius, 0.88 * radius, 0.88 * radius)
    if shape == "triangle":
        return Extents(radius, radius, 0.8 * radius)
    if shape == "star":
        tip = STAR_TIP * radius
        return Extents(tip * math.sin(math.radians(72)), tip, tip * math.cos(math.radians(36)))
    raise ValueError(f"shape {shape!r}: expected ball, box, triangle or star")


STAR_TIP = 1.05
STAR_NOTCH = 0.5


def _pulse(t: Array, times: tuple[float, ...], amounts: tuple[float, ...]) -> Array:
    total = np.zeros_like(t)
    for time, amount in zip(times, amounts, strict=True):
        total += amount * np.maximum(0.0, 1.0 - np.abs(t - time) / SQUASH_SECONDS)
    return total


def _last(t: Array, times: tuple[float, ...]) -> tuple[NDArray[np.intp], Array]:
    """Index of the last contact at or before each time (-1 before the first), and the time since it."""
    contacts = np.asarray(times, dtype=np.float64)
    index = np.searchsorted(contacts, t, side="right") - 1
    return index, t - contacts[np.maximum(index, 0)]


@dataclass(frozen=True)
class Bounce:
    """Dropped from rest at ``height``, then ballistic arcs between contacts with the floor."""

    x: float
    ground: float  # y of the centre at contact
    bottom: float  # centre to contact edge
    gravity: float
    times: tuple[float, ...]
    impacts: tuple[float, ...]  # speed just before each contact
    rebounds: tuple[float, ...]  # speed just after; 0 where it settles
    strengths: tuple[float, ...]

    def pose(self, t: Array) -> Pose:
        """Pose at times ``t`` [T]."""
        index, since = _last(t, self.times)
        fall = np.minimum(-since, self.impacts[0] / self.gravity)  # at rest at the top before it is let go
        before = self.impacts[0] * fall - 0.5 * self.gravity * fall**2
        speed = np.asarray(self.rebounds)[np.maximum(index, 0)]
        after = np.maximum(0.0, speed * since - 0.5 * self.gravity * since**2)
        squash = _pulse(t, self.times, tuple(SQUASH * s for s in self.strengths))
        y = self.ground - np.where(index < 0, before, after) + squash * self.bottom
        zero = np.zeros_like(t)
        return Pose(zero + self.x, y, zero, 1 + squash, 1 - squash, zero)


@dataclass(frozen=True)
class Swing:
    """A pendulum that strikes a post where it hangs straight down, at its greatest speed: half sines in between."""

    pivot: float
    length: float
    direction: int  # +1: the post stands to the right
    side: float  # centre to contact edge
    omega: float
    times: tuple[float, ...]
    first: float  # angle from which it is let go
    angles: tuple[float, ...]  # greatest angle after each contact
    strengths: tuple[float, ...]

    def pose(self, t: Array) -> Pose:
        """Pose at times ``t`` [T]."""
        index, since = _last(t, self.times)
        before = self.first * np.sin(self.omega * np.minimum(-since, 0.5 * math.pi / self.omega))
        amplitude = np.asarray(self.angles)[np.maximum(index, 0)]
        after = np.maximum(0.0, amplitude * np.sin(np.minimum(self.omega * since, math.pi)))
        angle = -self.direction * np.where(index < 0, before, after)
        squash = _pulse(t, self.times, tuple(SQUASH * s for s in self.strengths))
        x = self.pivot + self.length * np.sin(angle) + self.direction * squash * self.side
        return Pose(x, self.length * np.cos(angle), angle, 1 - squash, 1 + squash, np.zeros_like(t))


@dataclass(frozen=True)
class Knock:
    """Rests on a rod, is thrust up against a block with constant acceleration, and returns as it came."""

    x: float
    contact: float  # y of the centre at contact
    top: float  # centre to contact edge
    depth: float  # distance from rest to contact
    times: tuple[float, ...]
    thrusts: tuple[float, ...]  # seconds from rest to contact
    returns: tuple[float, ...]  # seconds from contact to rest
    strengths: tuple[float, ...]

    def pose(self, t: Array) -> Pose:
        """Pose at times ``t`` [T]."""
        gap = np.full_like(t, self.depth)
        for time, thrust, back in zip(self.times, self.thrusts, self.returns, strict=True):
            rising = np.clip((t - time + thrust) / thrust, 0.0, 1.0)
            falling = np.clip((t - time) / back, 0.0, 1.0)
            share = np.where(t < time, 1 - rising**2, falling * (2 - falling))
            gap = np.minimum(gap, self.depth * share)
        squash = _pulse(t, self.times, tuple(SQUASH * s for s in self.strengths))
        zero = np.zeros_like(t)
        return Pose(zero + self.x, self.contact + gap - squash * self.top, zero, 1 + squash, 1 - squash, zero)


@dataclass(frozen=True)
class Flash:
    """Stands still, lights up at once and fades."""

    x: float
    y: float
    times: tuple[float, ...]

    def pose(self, t: Array) -> Pose:
        """Pose at times ``t`` [T]."""
        index, since = _last(t, self.times)
        glow = np.where(index < 0, 0.0, np.exp(-np.maximum(since, 0.0) / GLOW_SECONDS))
        zero = np.zeros_like(t)
        return Pose(zero + self.x, zero + self.y, zero, zero + 1, zero + 1, glow)


@dataclass(frozen=True)
class Float:
    """Drifts on smooth sines, without a sharp turn."""

    x: float
    y: float
    amplitude_x: float
    amplitude_y: float
    period_x: float
    period_y: float
    phase_x: float
    phase_y: float

    def pose(self, t: Array) -> Pose:
        """Pose at times ``t`` [T]."""
        x = self.x + self.amplitude_x * np.sin(2 * math.pi * t / self.period_x + self.phase_x)
        y = self.y + self.amplitude_y * np.sin(2 * math.pi * t / self.period_y + self.phase_y)
        zero = np.zeros_like(t)
        return Pose(x, y, zero, zero + 1, zero + 1, zero)


Motion = Bounce | Swing | Knock | Flash | Float
