"""Timestep schedules, and timesteps fitted to a flow whose solution is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.flow import timestep_ratio, timesteps
from javis.generation import sampler_of
from javis.model.dit import Velocity
from javis.sample import sample
from javis.sample.euler import StepEnd
from javis.sample.fit import Part, distance, equidistributed, fit_timesteps, solutions
from javis.sample.schedules import schedule_of
from javis.sampler_options import SamplerOptions

CLIP: dict[str, Any] = {"height": 240, "width": 426, "frames": 51, "order": "sound_first"}


def get(sampling: dict[str, Any], counts: tuple[int, ...] = (4, 3), **options: Any) -> list[Tensor]:
    return schedule_of(sampling, SamplerOptions(**options), **CLIP)(counts)


def test_the_checkpoints_own_ratio_or_the_official_one() -> None:
    official = float(timestep_ratio(torch.tensor(240.0), torch.tensor(426.0), torch.tensor(51.0)))
    for sampling, options, ratio in (
        ({"timestep_ratio": 4.0}, {}, 4.0),
        ({}, {}, official),
        ({"timestep_ratio": 4.0}, {"schedule": "official"}, official),
        ({}, {"schedule": "uniform"}, 1.0),
        ({"timestep_ratio": 4.0}, {"timestep_ratio": 2.5}, 2.5),
        ({}, {"timestep_ratio": 2.5}, 2.5),
    ):
        for found, count in zip(get(sampling, **options), (4, 3), strict=True):
            assert torch.equal(found, timesteps(count, ratio))


def test_fitted_timesteps_come_from_the_checkpoint() -> None:
    lists = [[1000.0, 800.0, 500.0, 100.0], [1000, 400.0, 20.0]]
    sampling = {"fitted": {"sound_first": {"4+3": lists}, "together": {"8": [[1000.0]]}}}
    assert [t.tolist() for t in get(sampling, schedule="fitted")] == lists
    with pytest.raises(
        UsageError, match=r"no fitted timesteps for 2\+2 intervals in order 'sound_first'; there are: 4\+3"
    ):
        get(sampling, (2, 2), schedule="fitted")
    with pytest.raises(UsageError, match="there are: none"):
        get({}, schedule="fitted")


def test_a_fit_divides_the_steps_and_may_begin_its_second_part_from_the_draft() -> None:
    lists = {
        "3+1": [[1000.0, 900.0, 750.0], [947.0]],
        "5+3": [[1000.0, 990.0, 950.0, 900.0, 750.0], [947.0, 900.0, 750.0]],
    }
    sampling = {"steps": 4, "order": "sound_first", "schedule": "fitted", "fitted": {"sound_first": lists}}
    for steps, first in ((4, 3), (8, 5), (6, None)):
        assert sampler_of(sampling, {}, steps=steps, order="sound_first").audio_steps == first
    assert sampler_of(sampling, {}, steps=4, order="together").audio_steps is None
    assert sampler_of(sampling, {"audio_steps": 2}, steps=4, order="sound_first").audio_steps == 2
    assert sampler_of(sampling, {"schedule": "uniform"}, steps=4, order="sound_first").audio_steps is None
    assert [t.tolist() for t in get(sampling, (3, 1), schedule="fitted")] == lists["3+1"]
    both = {"fitted": {"sound_first": lists | {"2+2": [[1000.0, 900.0], [1000.0, 900.0]]}}, "schedule": "fitted"}
    assert sampler_of(both, {}, steps=4, order="sound_first").audio_steps is None  # which of the two is not said


def test_redrawing_begins_the_second_part_lower() -> None:
    first, second = get({"timestep_ratio": 9.0}, (2, 2), redraw=900.0)
    assert first.tolist() == pytest.approx([1000, 900])
    assert second.tolist() == pytest.approx([900, 9000 * 0.25 / (1 + 8 * 0.25)])  # 900 is halfway: u = 0.5


def test_a_checkpoint_that_was_fitted_can_be_asked_for_other_steps() -> None:
    sampling = {"steps": 4, "schedule": "fitted", "fitted": {"together": {"4": [[1000.0, 800.0, 500.0, 100.0]]}}}
    assert sampler_of(sampling, {}, steps=4, order="together").schedule == "fitted"
    assert sampler_of(sampling, {}, steps=5, order="together").schedule is None
    assert sampler_of(sampling, {}, steps=4, order="sound_first").schedule is None
    assert sampler_of(sampling, {"schedule": "uniform"}, steps=4, order="together").schedule == "uniform"
    with pytest.raises(UsageError, match="no fitted timesteps for 5 intervals"):
        sampler_of(sampling, {"schedule": "fitted"}, steps=5, order="together")


@pytest.mark.parametrize(
    "wrong",
    [
        [[1000.0, 500.0], [1000.0]],
        [[1000.0, 0.0]],
        [[900.0, 500.0]],
        [[1000.0, "5"]],
        [[1000.0, 1000.0]],
        "x",
        [[1000.0]],
    ],
)
def test_damaged_lists_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="fitted timesteps for 2 intervals are unusable"):
        get({"fitted": {"sound_first": {"2": wrong}}}, (2,), schedule="fitted")


# -- fitting -----------------------------------------------------------------------------------------------------------


def flow(spread: float, start: tuple[Tensor, Tensor], streams: tuple[int, ...] = (0, 1)) -> Part:
    """Data N(0.5, spread^2), see test_solvers.py: with a small spread the path bends near the data only."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        s = float(t[0]) / 1000
        return 0.5 + ((1 - s) * spread**2 - s) * (z - (1 - s) * 0.5) / ((1 - s) ** 2 * spread**2 + s * s)

    model = SimpleNamespace(denoise=lambda v, a, t, *_, **__: Velocity(velocity(v, t), velocity(a, t)))
    told: Any = SimpleNamespace(fps=torch.zeros(len(start[0]), 1))

    def run(times: Tensor, solver: str, count: int, on_step_end: StepEnd | None) -> tuple[Tensor, Tensor]:
        return sample(model, *start, told, times, solver=solver, evaluations=count, on_step_end=on_step_end)  # type: ignore[arg-type]

    return Part(run, start, streams)


def noise(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 2, 3, 2, 2, generator=g), torch.randn(4, 2, 5, 3, generator=g)


@pytest.mark.parametrize(
    ("spread", "solver", "steps", "share"),
    [(0.15, "euler", 5, 0.7), (0.15, "ab2", 6, 0.7), (0.15, "heun", 6, 0.7), (0.6, "euler", 5, 0.95)],
)
def test_fitted_timesteps_are_nearer_to_the_exact_solution_on_other_noise(
    spread: float, solver: str, steps: int, share: float
) -> None:
    """Fitted against the many-step solution; judged against the closed form, 0.5 + spread * noise.

    The wider the data, the straighter the paths, and the less is to be gained over even timesteps.
    """
    made = fit_timesteps(flow(spread, noise(1)), steps, solver, fine=256)
    other = noise(2)
    exact = [0.5 + spread * z for z in other]
    part, count = flow(spread, other), len(made.times)
    errors = {
        name: distance(part.made(torch.as_tensor(times), solver, steps), exact)
        for name, times in (("fitted", made.times), ("uniform", timesteps(count)), ("shift", timesteps(count, 3.0)))
    }
    assert errors["fitted"] < share * errors["uniform"], errors
    assert errors["fitted"] < errors["shift"] * 1.02, errors
    assert made.error <= made.best_ratio[1] <= made.uniform
    assert made.times[0] == 1000 and all(a > b for a, b in zip(made.times, [*made.times[1:], 0.0], strict=True))


def test_fitting_is_deterministic_and_counts_what_it_does() -> None:
    done: list[int] = []
    first, again = (
        fit_timesteps(flow(0.2, noise(1)), 4, fine=32, rounds=2, progress=lambda: done.append(0)) for _ in range(2)
    )
    assert first == again
    assert len(done) == 2 * solutions(4, rounds=2)


def test_only_the_streams_that_count_are_judged() -> None:
    start = noise(1)
    straight = Part(lambda t, _s, _n, _e: (start[0] * len(t), start[1]), start, (1,))
    assert [x.shape for x in straight.made(torch.ones(3), "euler", 3)] == [start[1].shape]
    with pytest.raises(ValueError, match="fewer than the reference's 8, got 8"):
        fit_timesteps(straight, 8, fine=8)


def test_equal_shares_of_the_local_error() -> None:
    """x = s^4 has |dv/ds| = 12 s^2, so the density is s, its integral s^2 / 2, and the timesteps sqrt(1 - i/n)."""
    times = timesteps(512).tolist()
    path = [torch.full((1, 1), s**4, dtype=torch.float64) for s in (*(t / 1000 for t in times), 0.0)]
    found = equidistributed(times, [path], 4)
    assert found == pytest.approx([1000 * (1 - i / 4) ** 0.5 for i in range(4)], rel=0.02)
