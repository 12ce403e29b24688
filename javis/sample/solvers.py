"""Solvers of the rectified flow ``dx/ds = -v`` on ``x_s = (1 - s) x + s n``, s = t/1000: from noise to data.

>>> solver = make("ab2", times)                          # of one stream: video or audio
>>> for number, (t, _) in enumerate(evaluations("ab2", times)):
...     z = solver.update(z, velocity(z, t))             # the latents at which the next evaluation is made

One stream of evaluations: the loop evaluates where :func:`evaluations` says, on the latents that ``update`` returned;
the last update returns the result, at t = 0. Velocities are those of javis.flow, ``data - noise``, guidance applied.

- "euler": first order, one evaluation an interval.
- "heun", "midpoint": Runge-Kutta of second order, two evaluations an interval. A predicted sample says nothing about
  the velocity at t = 0, so Heun's last interval is the midpoint rule's. An odd number of evaluations leaves one for the
  last interval: an Euler step, as in EDM (Karras et al., arXiv 2206.00364, algorithm 1).
- "ab2", "ab3": Adams-Bashforth with variable steps: the integral of the polynomial through the last velocities.
- "dpmpp2m", "dpmpp3m": DPM-Solver++ multistep (Lu et al., arXiv 2211.01095, section 4), in the data prediction
  ``D = x_s + s v`` and ``lambda = log((1 - s) / s)``: ``x_t = (t/s) x_s + t * integral of D over r = 1/s``. With D
  constant that is Euler's step. D is a polynomial of lambda; "2m" takes the paper's shorter form of the first degree.
  For the second degree its code has half of the second difference, which leaves the order at 2; "3m" has all of it.
- "unipc": UniPC of order 2 with B(h) = e^h - 1 (Zhao et al., arXiv 2302.04867): the predictor is dpmpp2m's; a corrector
  then moves the point it arrived at, with the evaluation made there anyway.

Multistep solvers start with first order, and end with it ("lower order final"): lambda is infinite at t = 0 and 1000.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from javis.flow import NUM_TIMESTEPS, _spread
from javis.sampler_options import SOLVERS, TWO_STAGES, SolverName


class Evaluation(NamedTuple):
    """Where the model is evaluated: timestep, where the next evaluation is (0 at last), first of an interval or not."""

    t: float
    after: float
    first: bool = True


def intervals(name: str, count: int) -> int:
    """Intervals that a solver crosses with ``count`` evaluations of the model."""
    return (count + 1) // 2 if name in TWO_STAGES else count


def evaluations(name: str, times: Sequence[float], count: int | None = None) -> list[Evaluation]:
    """All evaluations of a solver.

    Args:
        name: one of :data:`javis.sampler_options.SOLVERS`.
        times: decreasing timesteps at which intervals begin; the last one ends at 0.
        count: evaluations in all; None: as many as the intervals take. Of two stages, the last may be left out.

    Raises:
        ValueError: an unknown solver, timesteps that do not decrease, or a count that does not fit them.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; expected one of {', '.join(SOLVERS)}")
    ends = [*times[1:], 0.0]
    if not times or not all(a > b for a, b in zip(times, ends, strict=True)):
        raise ValueError(f"timesteps must decrease and be above 0, got {list(times)}")
    if name not in TWO_STAGES:
        points = [(t, True) for t in times]
    else:
        points = []
        for i, (t, end) in enumerate(zip(times, ends, strict=True)):
            last = i == len(times) - 1
            points.append((t, True))
            if last and count == 2 * len(times) - 1:
                continue
            points.append(((t + end) / 2 if last or name == "midpoint" else end, False))
    if count is not None and count != len(points):
        raise ValueError(f"{count} evaluations do not fit the {len(times)} intervals of {name!r}")
    after = [t for t, _ in points[1:]] + [0.0]
    return [Evaluation(t, end, first) for (t, first), end in zip(points, after, strict=True)]


class Solver(Protocol):
    """What crosses the intervals of one stream."""

    def update(
        self, z: Tensor, velocity: Tensor, active: Tensor | None = None, starting: Tensor | None = None
    ) -> Tensor:
        """Latents at which the next evaluation is made.

        Args:
            z: [B, C, T, ...], what the last call returned (at first: the noise).
            velocity: at ``z``, the same shape; any floating-point dtype. Sums are made in float32, or float64 for
                float64 latents.
            active: bool [B, T], the frames that move; None: all.
            starting: bool [B, T], those that move for the first time in this evaluation, whose velocity belongs to
                other latents (noise was added in the model's input only): they have no history.
        """
        ...

    def moved(self, change: Tensor) -> None:
        """The latents were changed from outside by so much: earlier evaluations belong to another path."""
        ...


def make(name: SolverName | str, times: Sequence[float], count: int | None = None) -> Solver:
    """A solver for the evaluations that :func:`evaluations` lists for the same arguments."""
    plan = evaluations(name, times, count)
    if name in TWO_STAGES:
        return _TwoStages(plan, times)
    order = {"euler": 1, "ab2": 2, "ab3": 3, "dpmpp2m": 2, "dpmpp3m": 3, "unipc": 2}[name]
    kind = {"dpmpp2m": _DPMSolverPP, "dpmpp3m": _DPMSolverPP, "unipc": _UniPC}.get(name, _AdamsBashforth)
    return kind([e.t / NUM_TIMESTEPS for e in plan] + [0.0], order)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _where(mask: Tensor | None, moved: Tensor, z: Tensor) -> Tensor:
    """``moved`` in the dtype of ``z`` where the mask [B, T] is True."""
    moved = moved.to(z.dtype)
    return moved if mask is None else torch.where(_spread(mask, z), moved, z)


# -- two evaluations an interval --------------------------------------------------------------------------------------


class _TwoStages:
    """Heun's and the midpoint rule; which of them is seen from where the second evaluation is."""

    def __init__(self, plan: Sequence[Evaluation], times: Sequence[float]) -> None:
        self._plan, self._number = plan, 0
        self._ends = dict(zip(times, [*times[1:], 0.0], strict=True))
        self._base: Tensor | None = None
        self._first: Tensor | None = None
        self._start = 0.0

    def update(
        self, z: Tensor, velocity: Tensor, active: Tensor | None = None, starting: Tensor | None = None
    ) -> Tensor:
        now, self._number = self._plan[self._number], self._number + 1
        wide = _wide(z)
        v = velocity.to(wide)
        if now.first:
            self._base, self._first, self._start = z, v, now.t
            return _where(active, z.to(wide) + (now.t - now.after) / NUM_TIMESTEPS * v, z)
        assert self._base is not None and self._first is not None
        end = self._ends[self._start]
        step = (self._start - end) / NUM_TIMESTEPS
        if now.t == end:  # Heun
            v = (self._first + v) / 2
        base, self._base, self._first = self._base, None, None
        return _where(active, base.to(wide) + step * v, base)

    def moved(self, change: Tensor) -> None:
        if self._base is not None:
            self._base = self._base + change.to(self._base)


# -- one evaluation an interval ---------------------------------------------------------------------------------------


class _Multistep(ABC):
    """Sums over the last evaluations. Each frame has the order that its own history allows."""

    def __init__(self, points: Sequence[float], order: int) -> None:
        self._points, self._order, self._number = list(points), order, 0
        self._history: deque[tuple[float, Tensor]] = deque(maxlen=order)  # newest first: share of noise, value
        self._age: Tensor | None = None  # with masks: usable evaluations of each frame, [B, T]

    def update(
        self, z: Tensor, velocity: Tensor, active: Tensor | None = None, starting: Tensor | None = None
    ) -> Tensor:
        s, t = self._points[self._number : self._number + 2]
        left = len(self._points) - 1 - self._number
        self._number += 1
        wide = _wide(z)
        exact, v = z.to(wide), velocity.to(wide)
        value = self._value(exact, v, s)
        exact = self._correct(exact, value, s, active, starting)
        self._history.appendleft((s, value))
        most = min(self._order, left, len(self._history))
        if active is None:
            made = self._predict(exact, t, most)
        else:
            age = torch.zeros_like(active, dtype=torch.long) if self._age is None else self._age
            age = torch.where(active, age + 1, 0)
            orders = age.clamp(1, most)
            # The value of a starting frame belongs to latents that the held ones do not continue.
            self._age = age if starting is None or self._number == 1 else torch.where(starting, 0, age)
            made = self._predict(exact, t, 1)
            for order in range(2, most + 1):
                made = torch.where(_spread(orders == order, z), self._predict(exact, t, order), made)
        self._keep(exact, most, active)
        return _where(active, made, z)

    def moved(self, change: Tensor) -> None:
        self._history.clear()
        self._age = None

    def _nodes(self, order: int) -> tuple[list[float], list[Tensor]]:
        points, values = zip(*list(self._history)[:order], strict=True)
        return list(points), list(values)

    @abstractmethod
    def _value(self, z: Tensor, v: Tensor, s: float) -> Tensor:
        """What is kept of an evaluation."""

    @abstractmethod
    def _predict(self, z: Tensor, t: float, order: int) -> Tensor:
        """From the newest evaluation, at ``z``, to t."""

    def _correct(self, z: Tensor, value: Tensor, s: float, active: Tensor | None, starting: Tensor | None) -> Tensor:
        return z

    def _keep(self, z: Tensor, order: int, active: Tensor | None) -> None:  # noqa: B027 - a hook: what has no corrector keeps nothing
        """What the corrector will want of this step."""


class _AdamsBashforth(_Multistep):
    def _value(self, z: Tensor, v: Tensor, s: float) -> Tensor:
        return v

    def _predict(self, z: Tensor, t: float, order: int) -> Tensor:
        points, values = self._nodes(order)
        for weight, v in zip(adams_bashforth_weights(points, t), values, strict=True):
            z = z + weight * v
        return z


class _DPMSolverPP(_Multistep):
    def _value(self, z: Tensor, v: Tensor, s: float) -> Tensor:
        return z + s * v

    def _predict(self, z: Tensor, t: float, order: int) -> Tensor:
        points, values = self._nodes(order)
        z = t / points[0] * z
        for weight, data in zip(dpmpp_weights(points, t), values, strict=True):
            z = z + weight * data
        return z


class _UniPC(_DPMSolverPP):
    _from: tuple[Tensor, int, Tensor | None, Tensor | None] | None = None

    def _keep(self, z: Tensor, order: int, active: Tensor | None) -> None:
        self._from = (z, order, active, self._age)

    def moved(self, change: Tensor) -> None:
        super().moved(change)
        self._from = None

    def _correct(self, z: Tensor, value: Tensor, s: float, active: Tensor | None, starting: Tensor | None) -> Tensor:
        if self._from is None:
            return z
        start, most, was_active, age = self._from
        if active is None or was_active is None or age is None:
            return self._corrected(start, value, s, most)
        orders = torch.where(active & was_active, age, 0).clamp(0, most)
        made = z
        for order in range(1, most + 1):
            made = torch.where(_spread(orders == order, z), self._corrected(start, value, s, order), made)
        return made

    def _corrected(self, start: Tensor, value: Tensor, s: float, order: int) -> Tensor:
        """The step that led to ``s`` once more, with the evaluation ``value`` that was made there."""
        points, values = self._nodes(order)
        z = s / points[0] * start
        for weight, data in zip(unipc_corrector_weights(points, s), [*values, value], strict=True):
            z = z + weight * data
        return z


# -- weights, in float64 ----------------------------------------------------------------------------------------------


def adams_bashforth_weights(points: Sequence[float], t: float) -> list[float]:
    """Integrals from t to ``points[0]`` of the Lagrange polynomials through ``points``, newest first (at most 3)."""
    h = points[0] - t
    if len(points) == 1:
        return [h]
    a = points[1] - points[0]
    if len(points) == 2:  # with u the time since points[0], in 0..h, the older one is at -a
        return [h + h * h / (2 * a), -h * h / (2 * a)]
    b = points[2] - points[0]
    square, cube = h * h / 2, h**3 / 3
    return [
        h + square * (a + b) / (a * b) + cube / (a * b),
        (square * b + cube) / (a * (a - b)),
        (square * a + cube) / (b * (b - a)),
    ]


def _half_log_snr(s: float) -> float:
    return math.inf if s <= 0 else -math.inf if s >= 1 else math.log((1 - s) / s)


def _finite(points: Sequence[float], t: float) -> int:
    """How many of the points can be used: the polynomial is one of lambda, infinite at s = 1 and at t = 0.

    The difference quotient to a point at infinity is 0, so that it only lowers the order.
    """
    if t <= 0:
        return 1
    return max(1, sum(s < 1 for s in points))


def dpmpp_weights(points: Sequence[float], t: float) -> list[float]:
    """Weights of the data predictions at ``points``, newest first (at most 3), in x_t - (t / points[0]) x."""
    used = min(len(points), _finite(points, t))
    rest = [0.0] * (len(points) - used)
    k = 1 - t / points[0]  # alpha_t (1 - e^-h)
    if used == 1:
        return [k, *rest]
    lam = [_half_log_snr(s) for s in points[:used]]
    h = _half_log_snr(t) - lam[0]
    r0 = (lam[0] - lam[1]) / h
    if used == 2:
        return [k + k / (2 * r0), -k / (2 * r0), *rest]
    r1, alpha = (lam[1] - lam[2]) / h, 1 - t
    first = alpha - k / h  # of the first difference, alpha_t ((e^-h - 1) / h + 1)
    second = 2 * (k - alpha * h) / h**2 + alpha  # of the second, -2 alpha_t ((e^-h - 1 + h) / h^2 - 1/2)
    # d0 = (D0 - D1) / r0, d1 = (D1 - D2) / r1; first * (d0 + r0 (d0 - d1) / (r0 + r1)) + second * (d0 - d1) / (r0 + r1)
    of_d0 = first * (1 + r0 / (r0 + r1)) + second / (r0 + r1)
    of_d1 = -(first * r0 + second) / (r0 + r1)
    return [k + of_d0 / r0, -of_d0 / r0 + of_d1 / r1, -of_d1 / r1, *rest]


def unipc_corrector_weights(points: Sequence[float], t: float) -> list[float]:
    """Weights of the data predictions at ``points``, newest first (at most 2), and at t (the last weight).

    UniC with B(h) = e^h - 1: order p has p + 1 evaluations.
    """
    used = min(len(points), _finite(points, t))
    rest = [0.0] * (len(points) - used)
    k = 1 - t / points[0]
    if used == 1:
        return [k / 2, *rest, k / 2]
    lam = [_half_log_snr(s) for s in points[:used]]
    h = _half_log_snr(t) - lam[0]
    r = (lam[1] - lam[0]) / h  # negative
    # With hh = -h, phi_1 = e^hh - 1: b_1 = (phi_1 / hh - 1) / phi_1, b_2 = 2 ((phi_1 / hh - 1) / hh - 1/2) / phi_1;
    # the weights of the differences solve [[1, 1], [r, 1]] rho = b.
    hh = -h
    phi = math.expm1(hh)
    b1 = (phi / hh - 1) / phi
    b2 = 2 * ((phi / hh - 1) / hh - 0.5) / phi
    of_old = (b1 - b2) / (1 - r)
    of_new = b1 - of_old
    return [k * (1 - of_old / r - of_new), k * of_old / r, *rest, k * of_new]


__all__ = ["Evaluation", "Solver", "evaluations", "intervals", "make"]
