"""Solvers against a flow whose solution is known, against diffusers, and what they do with masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.flow import timesteps
from javis.sample import sample, sample_in_order
from javis.sample.solvers import adams_bashforth_weights, dpmpp_weights, evaluations, intervals, make
from javis.sampler_options import SOLVERS, TWO_STAGES

from .test_euler import AUDIO, VIDEO, FakeModel, condition, draw, wavy

MULTISTEP = [name for name in SOLVERS if name not in (*TWO_STAGES, "euler")]
VALUES = ([0.7, -1.3, 0.2], [0.5, 0.3, 0.8], [1.1, -0.6, 0.9])
MEAN, SPREAD, START = (torch.tensor(value, dtype=torch.float64)[None, None] for value in VALUES)


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[data - noise | x_s] for data N(mean, spread^2): with v = (1-s)^2 spread^2 + s^2 the variance of x_s,

    E[data | x] = mean + (1-s) spread^2 r / v and E[noise | x] = s r / v, where r = x - (1-s) mean.
    """
    s = t / 1000
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return MEAN + ((1 - s) * SPREAD**2 - s) * (x - (1 - s) * MEAN) / variance


def solve(name: str, times: list[float], count: int | None = None) -> Tensor:
    solver, z = make(name, times, count), START.clone()
    for t, _, _ in evaluations(name, times, count):
        z = solver.update(z, gaussian_velocity(z, t))
    return z


def smooth(n: int) -> list[float]:
    """Timesteps that are dense at both ends, so that first-order steps there do not hide the order between them."""
    return [1000 * (1 - (3 * u**2 - 2 * u**3)) for u in (i / n for i in range(n))]


def uniform(n: int) -> list[float]:
    return [1000 * (1 - i / n) for i in range(n)]


def order_of(name: str, grid: Any, sizes: tuple[int, int]) -> float:
    """Slope of the error over a doubling of the intervals; the flow takes noise z to mean + spread * z."""
    errors = [float((solve(name, grid(n)) - (MEAN + SPREAD * START)).abs().max()) for n in sizes]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("midpoint", 3), ("ab2", 2)])
def test_order_on_even_timesteps(name: str, order: int) -> None:
    """The midpoint rule's error of second order vanishes on this flow; see the next test but one."""
    assert order_of(name, uniform, (128, 256)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("heun", 2), ("midpoint", 3), ("ab2", 2), ("ab3", 3), ("dpmpp2m", 2), ("dpmpp3m", 3), ("unipc", 3)],
)
def test_order_where_the_first_and_last_steps_are_short(name: str, order: int) -> None:
    assert order_of(name, smooth, (128, 256)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", TWO_STAGES)
@pytest.mark.parametrize("steps", [1, 2, 6, 20])
def test_two_stages_are_of_second_order(name: str, steps: int) -> None:
    """On dz = z over a length of 1 every interval multiplies by 1 + h + h^2/2, whatever the rule."""
    solver, z, times = make(name, uniform(steps)), START.clone(), uniform(steps)
    for _ in evaluations(name, times):
        z = solver.update(z, z)
    h = 1 / steps
    torch.testing.assert_close(z, START * (1 + h + h * h / 2) ** steps, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "euler"])
def test_at_eight_evaluations_all_are_better_than_euler(name: str) -> None:
    exact = MEAN + SPREAD * START
    euler, other = (float((solve(n, uniform(intervals(n, 8)), 8) - exact).abs().max()) for n in ("euler", name))
    assert other < euler


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=15, deadline=None)
@given(steps=st.integers(1, 12), ratio=st.floats(0.3, 5.0))
def test_a_straight_path_is_exact_in_any_number_of_evaluations(name: str, steps: int, ratio: float) -> None:
    """All data at one point: the data prediction is that point, and the velocity constant."""
    times = timesteps(intervals(name, steps), ratio).double().tolist()
    solver, z, seen = make(name, times, steps), START.clone(), 0
    for t, _, _ in evaluations(name, times, steps):
        z, seen = solver.update(z, (MEAN - z) / (t / 1000)), seen + 1
    assert seen == steps
    torch.testing.assert_close(z, MEAN, rtol=1e-9, atol=1e-9)


def test_no_solver_evaluates_at_the_end() -> None:
    for name in SOLVERS:
        for steps in range(1, 10):
            plan = evaluations(name, uniform(intervals(name, steps)), steps)
            assert len(plan) == steps and plan[0].t == 1000 and plan[-1].after == 0
            assert min(e.t for e in plan) > 0


def test_an_odd_number_of_evaluations_ends_with_an_euler_step() -> None:
    plan = evaluations("heun", [1000.0, 600.0, 200.0], 5)
    assert [e.t for e in plan] == [1000, 600, 600, 200, 200]
    assert [e.t for e in evaluations("heun", [1000.0, 600.0, 200.0])] == [1000, 600, 600, 200, 200, 100]
    assert [e.t for e in evaluations("midpoint", [1000.0, 600.0])] == [1000, 800, 600, 300]


@given(
    points=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3, unique_by=lambda s: round(s, 1)),
    length=st.floats(0.01, 0.05),
)
def test_adams_bashforth_integrates_polynomials(points: list[float], length: float) -> None:
    points.sort()  # newest first: the least share of noise
    t = points[0] - length
    for degree in range(len(points)):
        found = sum(w * s**degree for w, s in zip(adams_bashforth_weights(points, t), points, strict=True))
        exact = np.polynomial.Polynomial([0] * degree + [1]).integ()
        assert found == pytest.approx(exact(points[0]) - exact(t), rel=1e-6, abs=1e-9)


@given(
    lambdas=st.lists(st.floats(-3, 1), min_size=1, max_size=3, unique_by=lambda x: round(2 * x)),
    length=st.floats(0.1, 1.0),
    degree=st.integers(0, 2),
)
@settings(deadline=None)
def test_dpm_solver_integrates_polynomials_of_lambda(lambdas: list[float], length: float, degree: int) -> None:
    """x_t - (t/s) x_s = t * integral of e^lambda D(lambda), by Gauss-Legendre; 2M is exact for constants only."""
    lambdas.sort(reverse=True)
    if degree >= len(lambdas) or (degree == 1 and len(lambdas) == 2):
        return
    points, end = [1 / (1 + math.exp(x)) for x in lambdas], lambdas[0] + length
    t = 1 / (1 + math.exp(end))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    inside = lambdas[0] + length * (nodes + 1) / 2
    exact = t * length / 2 * float(np.sum(weights * np.exp(inside) * inside**degree))
    found = sum(w * x**degree for w, x in zip(dpmpp_weights(points, t), lambdas, strict=True))
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("name", "steps"), [("dpmpp2m", 8), ("dpmpp2m", 3), ("unipc", 8), ("unipc", 3)])
def test_they_are_those_of_diffusers(name: str, steps: int) -> None:
    """On the timesteps of its schedulers, which begin at t = 999, in float32, with a velocity far from any path."""
    diffusers = pytest.importorskip("diffusers")
    common = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    if name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **common)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2, **common
        )
    scheduler.set_timesteps(steps)
    times = [1000 * float(sigma) for sigma in scheduler.sigmas[:-1]]
    weights = draw((5, 5), 7) / 2
    z = theirs = draw((1, 5, 2, 1, 3), 1)
    solver = make(name, times)

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.sin(torch.einsum("ij,bj...->bi...", weights, x)) + math.cos(t / 300)

    for t, step in zip(times, scheduler.timesteps, strict=True):
        z = solver.update(z, velocity(z, t))
        theirs = scheduler.step(-velocity(theirs, t), step, theirs).prev_sample  # theirs is noise - data
        torch.testing.assert_close(z, theirs, rtol=2e-4, atol=2e-4)


# -- in the loop -------------------------------------------------------------------------------------------------------


def run(model: Any, name: str, steps: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    times = timesteps(intervals(name, steps), 2.0)
    return sample(
        model, draw(VIDEO), draw(AUDIO, 1), condition(), times, solver=name, evaluations=steps,
        draw_noise=torch.zeros_like, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_masks_of_ones_change_nothing(name: str) -> None:
    masked = run(FakeModel(wavy), name, video_mask=torch.ones(2, 4), audio_mask=torch.ones(2, 6))
    for a, b in zip(masked, run(FakeModel(wavy), name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_given_frames_are_kept_and_the_others_do_not_notice(name: str) -> None:
    mask = torch.tensor([[0.0, 1, 0, 1], [1, 1, 1, 0]])
    model = FakeModel(wavy)
    video, audio = run(model, name, video_mask=mask)
    free, free_audio = run(FakeModel(wavy), name)
    keep = (mask == 0)[:, None, :, None, None].expand_as(video)
    assert torch.equal(video[keep], draw(VIDEO)[keep])
    torch.testing.assert_close(video[~keep], free[~keep])  # this model's frames do not see each other
    torch.testing.assert_close(audio, free_audio)
    assert all(torch.equal(call.video[keep], draw(VIDEO)[keep]) for call in model.calls)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_frame_that_starts_has_no_history(name: str) -> None:
    """From its second evaluation on it goes as a clip that starts there; its first is Euler's from the given frame."""
    times = timesteps(8, 2.0)
    mask = torch.ones(2, 6)
    mask[:, 2] = 0.7
    start = int((times <= 700).nonzero()[0])
    given, noise = draw(AUDIO, 1), draw(AUDIO, 9)
    made = sample(
        FakeModel(wavy), draw(VIDEO), given, condition(), times, solver=name, audio_mask=mask,
        draw_noise=lambda z: noise if z.shape == noise.shape else torch.zeros_like(z),
    )[1]  # fmt: skip
    share = times[start] / 1000
    noised = (1 - share) * given + share * noise
    first = given + (times[start] - times[start + 1]) / 1000 * wavy("audio", noised, times[start].expand(2))
    rest = sample(FakeModel(wavy), draw(VIDEO), first, condition(), times[start + 1 :], solver=name)[1]
    torch.testing.assert_close(made[:, :, 2], rest[:, :, 2], rtol=1e-5, atol=1e-5)
    free = sample(FakeModel(wavy), draw(VIDEO), given, condition(), times, solver=name)[1]
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(made[:, :, others], free[:, :, others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MULTISTEP)
def test_latents_from_a_callback_begin_anew(name: str) -> None:
    times = timesteps(6, 2.0)
    other = draw(VIDEO, 21), draw(AUDIO, 22)
    replaced = sample(
        FakeModel(wavy), draw(VIDEO), draw(AUDIO, 1), condition(), times, solver=name,
        on_step_end=lambda i, *_: other if i == 2 else None,
    )  # fmt: skip
    expected = sample(FakeModel(wavy), *other, condition(), times[3:], solver=name)
    for a, b in zip(replaced, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TWO_STAGES)
def test_latents_from_a_callback_within_an_interval_move_where_it_began(name: str) -> None:
    """A constant shift in the middle of an interval is still there at its end, if the velocity does not see it."""
    model = FakeModel(lambda _name, z, t: (t / 1000).view(-1, *[1] * (z.ndim - 1)).expand_as(z))
    shifted = run(model, name, on_step_end=lambda i, _t, v, a: (v + 3, a - 2) if i == 2 else None)
    for a, b, shift in zip(shifted, run(model, name), (3, -2), strict=True):
        torch.testing.assert_close(a, b + shift, rtol=1e-5, atol=1e-5)


# -- steps of their own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "ab2", "dpmpp3m", "unipc"])
def test_a_stream_of_fewer_steps_takes_every_other_velocity(name: str) -> None:
    """Streams that do not see each other: each goes as if it were sampled alone on its own timesteps."""

    def go(steps: int, audio_steps: int | None) -> tuple[Tensor, Tensor]:
        model = FakeModel(wavy)
        out = sample_in_order(
            model, draw(VIDEO), draw(AUDIO, 1), condition(), steps, ratio=2.0, solver=name, audio_steps=audio_steps
        )
        assert len(model.calls) == max(steps, audio_steps or 0)
        return out

    times = timesteps(8, 2.0)
    start = (draw(VIDEO), draw(AUDIO, 1), condition())
    fine, coarse = (sample(FakeModel(wavy), *start, t, solver=name) for t in (times, times[::2]))
    for made, expected in ((go(8, 4), (fine[0], coarse[1])), (go(4, 8), (coarse[0], fine[1])), (go(8, 8), fine)):
        for a, b in zip(made, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_between_its_steps_a_stream_is_on_a_straight_line() -> None:
    model = FakeModel(wavy)
    sample_in_order(model, draw(VIDEO), draw(AUDIO, 1), condition(), 6, audio_steps=2)
    seen = [call.audio for call in model.calls]
    torch.testing.assert_close(seen[1], torch.lerp(seen[0], seen[3], 1 / 3))
    torch.testing.assert_close(seen[2], torch.lerp(seen[0], seen[3], 2 / 3))


@pytest.mark.parametrize(("steps", "audio_steps", "first"), [(6, None, 3), (6, 2, 2), (6, 5, 5)])
def test_the_sound_first_in_as_many_steps_as_asked_for(steps: int, audio_steps: int | None, first: int) -> None:
    model = FakeModel(wavy)
    sample_in_order(
        model, draw(VIDEO), draw(AUDIO, 1), condition(), steps, order="sound_first", audio_steps=audio_steps
    )
    assert [call.audio_mask is None for call in model.calls] == [True] * first + [False] * (steps - first)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown solver 'rk4'; expected one of euler, heun"):
        run(FakeModel(wavy), "rk4")
    with pytest.raises(ValueError, match="must decrease and be above 0"):
        make("ab2", [1000.0, 1000.0])
    with pytest.raises(ValueError, match="3 evaluations do not fit the 4 intervals of 'ab2'"):
        evaluations("ab2", uniform(4), 3)
    with pytest.raises(ValueError, match="twice an interval"):
        sample_in_order(FakeModel(wavy), draw(VIDEO), draw(AUDIO, 1), condition(), 6, audio_steps=2, solver="heun")
    with pytest.raises(ValueError, match="audio_steps must be fewer than the 6 steps"):
        sample_in_order(
            FakeModel(wavy), draw(VIDEO), draw(AUDIO, 1), condition(), 6, order="sound_first", audio_steps=6
        )
    with pytest.raises(ValueError, match="cannot be combined with condition masks"):
        run(FakeModel(wavy), "ab2", video_mask=torch.ones(2, 4), held=([0], [0]))
