"""Timesteps fitted to a model: those with which N intervals come nearest to a solution of many.

The start is the best of two kinds: even timesteps shifted by some ratios, and timesteps that share out the local error
of Euler's step, ``h^2 / 2 |dv/dt|`` on the many-step path, evenly: density ``sqrt(|dv/dt|)``. Then each timestep is
moved between its neighbours as long as that brings the result nearer. Nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from javis.flow import NUM_TIMESTEPS, timesteps
from javis.sample.euler import StepEnd
from javis.sample.solvers import intervals

RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
FLOOR = 0.05  # of the mean density: no stretch is left without timesteps


@dataclass(frozen=True)
class Part:
    """A solution that can be made again and again, from the same noise.

    Attributes:
        run: (timesteps, solver, evaluations, on_step_end) -> latents of video and audio.
        start: the noise of video and audio.
        streams: which of the two count: 0 video, 1 audio.
    """

    run: Callable[[Tensor, str, int, StepEnd | None], tuple[Tensor, Tensor]]
    start: tuple[Tensor, Tensor]
    streams: tuple[int, ...] = (0, 1)

    def made(self, times: Tensor, solver: str, evaluations: int) -> list[Tensor]:
        """The latents that count."""
        out = self.run(times, solver, evaluations, None)
        return [out[i] for i in self.streams]

    def path(self, times: Tensor) -> list[list[Tensor]]:
        """Euler's solution: for each stream that counts its latents at every timestep and at the end."""
        passed = [self.start]
        self.run(times, "euler", len(times), lambda _i, _t, video, audio: passed.append((video, audio)))
        return [[latents[i] for latents in passed] for i in self.streams]


@dataclass(frozen=True)
class Fit:
    """Fitted timesteps, decreasing from 1000.

    Attributes:
        times: where the intervals begin.
        error: distance to the many-step solution with them (:func:`distance`).
        uniform: the same with even timesteps without a shift. best_ratio: (ratio, distance) of the best shift.
    """

    times: list[float]
    error: float
    uniform: float
    best_ratio: tuple[float, float]


def distance(made: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square difference relative to that of ``exact``, the mean over the streams."""
    ratios = [
        float((a.double() - e.double()).square().mean().sqrt() / e.double().square().mean().sqrt())
        for a, e in zip(made, exact, strict=True)
    ]
    return sum(ratios) / len(ratios)


def equidistributed(times: Sequence[float], paths: Sequence[Sequence[Tensor]], count: int) -> list[float]:
    """Timesteps of ``count`` intervals with equal shares of Euler's local error.

    Args:
        times: of the fine solution, decreasing from 1000; it ends at 0.
        paths: for each stream its latents at ``times`` and at 0, one more than there are times.
        count: intervals.
    """
    points = np.array([*times, 0.0]) / NUM_TIMESTEPS
    lengths = -np.diff(points)
    bend = np.zeros(len(times) - 1)  # |dv/dt| around the inner points, all streams together
    for path in paths:
        speeds = [(b.double() - a.double()) / h for a, b, h in zip(path, path[1:], lengths, strict=False)]
        size = float(path[-1].double().square().mean().sqrt()) or 1.0
        change = np.array([float((b - a).square().mean().sqrt()) for a, b in pairwise(speeds)])
        bend += (change / size / ((lengths[:-1] + lengths[1:]) / 2)) ** 2
    density = np.interp(lengths / 2 - points[:-1], -points[1:-1], bend**0.25)  # at the middles of the intervals
    density = np.maximum(density, FLOOR * density.mean()) if density.max() > 0 else np.ones_like(density)
    share = np.concatenate(([0.0], np.cumsum(density * lengths)))
    found = np.interp(np.arange(count) / count, share / share[-1], points) * NUM_TIMESTEPS
    return [NUM_TIMESTEPS, *map(float, found[1:])]


def fit_timesteps(
    part: Part,
    evaluations: int,
    solver: str = "euler",
    *,
    fine: int = 64,
    rounds: int = 4,
    progress: Callable[[], None] | None = None,
) -> Fit:
    """Choose the timesteps of a solution.

    Args:
        part: what is solved.
        evaluations, solver: of the solutions to choose for.
        fine: steps of the reference, which is Euler's with even timesteps shifted by 2.
        rounds: of moving each timestep, by less and less.
        progress: called after every solution (:func:`solutions` of them).

    Raises:
        ValueError: fewer than one evaluation, or a reference that is not finer.
    """
    if not 1 <= evaluations < fine:
        raise ValueError(f"expected at least 1 evaluation, and fewer than the reference's {fine}, got {evaluations}")
    count, reference = intervals(solver, evaluations), timesteps(fine, 2.0)
    paths = part.path(reference)
    exact = [path[-1] for path in paths]

    def error(times: Sequence[float]) -> float:
        found = distance(part.made(torch.tensor(times, dtype=torch.float32), solver, evaluations), exact)
        if progress is not None:
            progress()
        return found

    shifted = {ratio: [float(t) for t in timesteps(count, ratio)] for ratio in RATIOS}
    errors = {ratio: error(times) for ratio, times in shifted.items()}
    ratio = min(errors, key=errors.__getitem__)
    best, least = shifted[ratio], errors[ratio]
    even = equidistributed(reference.tolist(), paths, count)
    if (found := error(even)) < least:
        best, least = even, found
    move = 0.4
    for _ in range(rounds):
        for i in range(1, count):
            for towards in (-1, 1):
                neighbour = [*best, 0.0][i + towards]
                tried = [*best]
                tried[i] += move * (neighbour - best[i])
                if (found := error(tried)) < least:
                    best, least = tried, found
        move /= 2
    times = [round(t, 3) for t in best]
    return Fit(times, round(error(times), 6), round(errors[1.0], 6), (ratio, round(errors[ratio], 6)))


def solutions(evaluations: int, solver: str = "euler", rounds: int = 4) -> int:
    """How many solutions :func:`fit_timesteps` makes beside the reference."""
    return len(RATIOS) + 2 + rounds * 2 * (intervals(solver, evaluations) - 1)
