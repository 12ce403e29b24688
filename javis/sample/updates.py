"""From one evaluation to the latents of the next, for both streams."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from javis.flow import NUM_TIMESTEPS
from javis.kernels.ops.flow_update.api import flow_update
from javis.model.dit import Velocity
from javis.sample.guidance import Guidance, combine
from javis.sample.solvers import Solver, evaluations, make


class Streams(NamedTuple):
    """Something of video and audio each; for masks None means all frames."""

    video: Tensor | None
    audio: Tensor | None


class Update(Protocol):
    """How a solution goes on. ``points``: timestep, where the step ends, and whether an interval begins there."""

    points: list[tuple[Tensor, Tensor, bool]]

    def __call__(
        self, number: int, video: Tensor, audio: Tensor, out: Velocity, scales: Guidance, on: Streams, new: Streams
    ) -> tuple[Tensor, Tensor]:
        """Latents after evaluation ``number``, where ``out`` was predicted.

        ``on`` are the frames that move, ``new`` those of them that begin to: bool [B, T], [B, Ta] or None.
        """
        ...

    def moved(self, video: Tensor, audio: Tensor) -> None:
        """The latents were changed from outside by so much."""
        ...


class EulerUpdate:
    """Euler's steps with guidance, in one launch."""

    def __init__(self, timesteps: Tensor) -> None:
        ends = [*timesteps[1:], torch.zeros_like(timesteps[0])]
        self.points = [(now, end, True) for now, end in zip(timesteps, ends, strict=True)]

    def __call__(
        self, number: int, video: Tensor, audio: Tensor, out: Velocity, scales: Guidance, on: Streams, new: Streams
    ) -> tuple[Tensor, Tensor]:
        now, after, _ = self.points[number]
        dt = (now - after).to(video) / NUM_TIMESTEPS
        return flow_update(
            video, audio, out.video, out.audio, dt, scales.video, scales.audio, video_mask=on.video, audio_mask=on.audio
        )

    def moved(self, video: Tensor, audio: Tensor) -> None:
        pass


class SolverUpdate:
    """Any solver, one of its own for each stream.

    Args:
        name, timesteps, count: as for :func:`javis.sample.solvers.evaluations`.
        held: for video and audio the intervals at which the stream takes a velocity; None: at all.
    """

    def __init__(
        self, name: str, timesteps: Tensor, count: int | None, held: tuple[Sequence[int], Sequence[int]] | None
    ) -> None:
        times = [float(t) for t in timesteps]
        wide = torch.promote_types(timesteps.dtype, torch.float32)
        self.points = [
            (torch.tensor(e.t, dtype=wide), torch.tensor(e.after, dtype=wide), e.first)
            for e in evaluations(name, times, count)
        ]
        self._solvers: tuple[Solver, ...]
        if held is None:
            self._solvers = tuple(make(name, times, count) for _ in range(2))
        else:
            if len(self.points) != len(times):
                raise ValueError(f"solver {name!r} evaluates twice an interval; streams cannot have steps of their own")
            self._solvers = tuple(Held(name, times, nodes) for nodes in held)

    def __call__(
        self, number: int, video: Tensor, audio: Tensor, out: Velocity, scales: Guidance, on: Streams, new: Streams
    ) -> tuple[Tensor, Tensor]:
        made = []
        for z, v, scale, solver, active, starting in zip(
            (video, audio), out, scales, self._solvers, on, new, strict=True
        ):
            made.append(solver.update(z, combine(v, scale, len(z), z.shape[1]), active, starting))
        return made[0], made[1]

    def moved(self, video: Tensor, audio: Tensor) -> None:
        for solver, change in zip(self._solvers, (video, audio), strict=True):
            solver.moved(change)


class Held:
    """A stream with fewer steps than there are evaluations: it takes the velocity at some of them only.

    Between these its latents are on the straight line to where its step ends, which is how the flow's paths run if they
    are straight; so both streams are at the same timestep whenever the model sees them.

    Args:
        name: a solver of one evaluation an interval. times: of all evaluations.
        nodes: numbers of those at which this stream's intervals begin; increasing from 0.
    """

    def __init__(self, name: str, times: Sequence[float], nodes: Sequence[int]) -> None:
        if not nodes or nodes[0] != 0 or any(a >= b for a, b in pairwise(nodes)):
            raise ValueError(f"a stream's steps must be increasing numbers of evaluations from 0, got {list(nodes)}")
        if nodes[-1] >= len(times):
            raise ValueError(f"evaluation {nodes[-1]} is none of the {len(times)}")
        self._times, self._number = [*times, 0.0], 0
        self._solver = make(name, [times[i] for i in nodes])
        self._ends = dict(zip(nodes, [*nodes[1:], len(times)], strict=True))
        self._line: tuple[Tensor, Tensor] | None = None
        self._from = self._to = 0

    def update(
        self, z: Tensor, velocity: Tensor, active: Tensor | None = None, starting: Tensor | None = None
    ) -> Tensor:
        number, self._number = self._number, self._number + 1
        if number in self._ends:
            self._line = (z, self._solver.update(z, velocity))
            self._from, self._to = number, self._ends[number]
        assert self._line is not None
        start, end = self._line
        if number + 1 == self._to:
            return end
        t0, t1, t = (self._times[i] for i in (self._from, self._to, number + 1))
        wide = torch.promote_types(z.dtype, torch.float32)
        return torch.lerp(start.to(wide), end.to(wide), (t0 - t) / (t0 - t1)).to(z.dtype)

    def moved(self, change: Tensor) -> None:
        self._solver.moved(change)
        if self._line is not None:
            self._line = (self._line[0] + change, self._line[1] + change)


def nodes(count: int, of: int) -> list[int]:
    """Of ``of`` evaluations those at which a stream of ``count`` steps takes a velocity, spread evenly."""
    return [i * of // count for i in range(count)]
