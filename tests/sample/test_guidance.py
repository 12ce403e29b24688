"""When there is guidance, what it costs, and the formulas, against numbers worked out by hand in float64."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from javis.flow import timesteps
from javis.model.dit import Conditioning, Velocity
from javis.sample import Guidance, GuidancePlan, Tally, sample, sample_in_order
from javis.sample.guidance import combine, conditional_half

from ..model.small import check_equal, make_inputs, pick, small_model
from .test_euler import AUDIO, VIDEO, FakeModel, draw, wavy


def condition(samples: int = 4) -> Conditioning:
    """Conditioning without any layer."""
    values: dict[str, Any] = {f.name: None for f in fields(Conditioning)}
    empty = torch.zeros(samples, 1)
    return Conditioning(**values | {"layers": [], "fps": empty, "video_positions": empty, "with_bidirectional": True})


def run(model: Any, steps: int = 4, samples: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    return sample(model, draw(VIDEO), draw(AUDIO, 1), condition(samples), timesteps(steps), **options)


def halves(name: str, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """What `wavy` answers to the two halves of a guided batch."""
    both = wavy(name, torch.cat((z, z)), torch.full((2 * len(z),), t, dtype=z.dtype))
    return both[: len(z)], both[len(z) :]


# -- interval ----------------------------------------------------------------------------------------------------------


def test_outside_the_interval_only_the_conditional_half_is_evaluated() -> None:
    """Timesteps 1000, 800, ... 200; both ends of the interval belong to it."""
    model, tally = FakeModel(wavy), Tally()
    scales = Guidance(3.0, 5.0)
    plan = GuidancePlan(interval=(400.0, 800.0))
    video, audio = run(model, 5, guidance=scales, plan=plan, tally=tally)
    assert [len(call.video) for call in model.calls] == [2, 4, 4, 4, 2]
    assert [len(call.condition.fps) for call in model.calls] == [2, 4, 4, 4, 2]
    assert tally.forwards == 1 + 2 + 2 + 2 + 1
    for name, start, made, scale in zip(
        ("video", "audio"), (draw(VIDEO), draw(AUDIO, 1)), (video, audio), scales, strict=True
    ):
        z = start
        for t in (1000.0, 800.0, 600.0, 400.0, 200.0):
            c, u = halves(name, z, t)
            z = z + 0.2 * (u + scale * (c - u) if 400 <= t <= 800 else c)
        torch.testing.assert_close(made, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "unipc"])
def test_an_interval_over_everything_changes_no_bit(solver: str) -> None:
    options = {"guidance": Guidance(3.0, 5.0), "solver": solver}
    plain = run(FakeModel(wavy), **options)
    for a, b in zip(run(FakeModel(wavy), plan=GuidancePlan(interval=(0, 1000)), **options), plain, strict=True):
        assert torch.equal(a, b)


def test_an_interval_without_any_step_is_the_conditional_model() -> None:
    out = run(FakeModel(wavy), guidance=3.0, plan=GuidancePlan(interval=(990, 995)))
    for a, b in zip(out, run(FakeModel(wavy), samples=2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["cross_attn", "modulate"])
def test_the_conditional_half_of_a_conditioning_is_that_of_the_model(mode: str) -> None:
    model = small_model(prior_mode=mode)
    noisy, told = make_inputs(model.config, batch=4)
    first = slice(0, 2)
    with torch.no_grad():
        whole = model.condition(**told)
        check_equal(
            model.denoise(**pick(noisy, first), condition=conditional_half(whole)),
            type(model.denoise(**noisy, condition=whole))(*(x[first] for x in model.denoise(**noisy, condition=whole))),
        )


# -- rescale -----------------------------------------------------------------------------------------------------------


def test_rescale_is_that_of_the_paper() -> None:
    """arXiv 2305.08891, eq. 14-16, with numpy's standard deviation of each sample."""
    c, u = draw((2, 3, 4, 2, 2), 3).double(), draw((2, 3, 4, 2, 2), 4).double()
    made = combine(torch.cat((c, u)), 4.0, 2, 3, rescale=0.7)
    for i in range(2):
        guided = u[i].numpy() + 4.0 * (c[i].numpy() - u[i].numpy())
        rescaled = guided * np.std(c[i].numpy(), ddof=1) / np.std(guided, ddof=1)
        np.testing.assert_allclose(made[i].numpy(), 0.7 * rescaled + 0.3 * guided, rtol=1e-12)


def test_a_full_rescale_gives_the_frames_that_move_the_conditional_spread() -> None:
    c, u = draw((2, 3, 4, 2, 2), 3).double(), draw((2, 3, 4, 2, 2), 4).double()
    c[:, :, 0] = 1e6  # a given frame: whatever is predicted for it must not count
    mask = torch.tensor([[False, True, True, True], [False, False, False, False]])
    made = combine(torch.cat((c, u)), 4.0, 2, 3, rescale=1.0, mask=mask)
    assert float(made[0, :, 1:].std()) == pytest.approx(float(c[0, :, 1:].std()))
    assert torch.equal(made[1], u[1] + 4.0 * (c[1] - u[1]))  # nothing moves, nothing to rescale


def test_rescale_reaches_both_modalities_of_a_solution() -> None:
    scales = Guidance(3.0, 5.0)
    out = run(FakeModel(wavy), 1, guidance=scales, plan=GuidancePlan(rescale=0.5))
    for name, start, made, scale in zip(("video", "audio"), (draw(VIDEO), draw(AUDIO, 1)), out, scales, strict=True):
        c, u = halves(name, start, 1000.0)
        guided = u + scale * (c - u)
        factor = torch.stack([c[i].std() / guided[i].std() for i in range(2)]).view(2, *[1] * (start.ndim - 1))
        torch.testing.assert_close(made, start + guided * (0.5 * factor + 0.5), rtol=1e-5, atol=1e-5)


# -- the unconditional half used again ---------------------------------------------------------------------------------


def test_the_last_difference_is_used_with_the_fresh_conditional_velocity() -> None:
    model, tally = FakeModel(wavy), Tally()
    scales = Guidance(3.0, 5.0)
    starts = (draw(VIDEO).double(), draw(AUDIO, 1).double())
    plan = GuidancePlan(every=3)
    out = sample(model, *starts, condition(), timesteps(5), guidance=scales, plan=plan, tally=tally)
    assert [len(call.video) for call in model.calls] == [4, 2, 2, 4, 2]
    assert tally.forwards == 2 + 1 + 1 + 2 + 1
    for name, start, made, scale in zip(("video", "audio"), starts, out, scales, strict=True):
        z, difference = start, torch.zeros(())
        for i, t in enumerate(timesteps(5).double().tolist()):
            c, u = halves(name, z, t)
            difference = c - u if i % 3 == 0 else difference
            z = z + 0.2 * (c + (scale - 1) * difference)
        torch.testing.assert_close(made, z, rtol=1e-5, atol=1e-5)


def test_the_difference_is_a_better_thing_to_hold_than_the_unconditional_velocity() -> None:
    """Data of two Gaussians, conditional and not, whose velocities are known (see test_solvers.py)."""
    mean, spread = (0.8, 0.1), (0.3, 0.7)  # conditional, unconditional

    def velocity(which: int, z: Tensor, s: float) -> Tensor:
        variance = ((1 - s) * spread[which]) ** 2 + s * s
        return mean[which] + ((1 - s) * spread[which] ** 2 - s) * (z - (1 - s) * mean[which]) / variance

    def solve(hold: str, every: int) -> Tensor:
        z, n = draw((64,), 1).double(), 24
        for i in range(n):
            s = 1 - i / n
            c = velocity(0, z, s)
            if i % every == 0:
                u = velocity(1, z, s)
                difference = c - u
            if hold == "difference":
                u = c - difference
            z = z + (u + 3.0 * (c - u)) / n
        return z

    exact = solve("difference", 1)
    errors = {hold: float((solve(hold, 3) - exact).square().mean().sqrt()) for hold in ("difference", "velocity")}
    assert errors["difference"] < 0.6 * errors["velocity"], errors


def test_a_new_part_begins_with_both_halves() -> None:
    model = FakeModel(wavy)
    sample_in_order(
        model,
        draw(VIDEO),
        draw(AUDIO, 1),
        condition(),
        6,
        order="sound_first",
        guidance=2.0,
        plan=GuidancePlan(every=2),
    )
    assert [len(call.video) for call in model.calls] == [4, 2, 4, 4, 2, 4]


def test_frames_that_begin_to_move_have_no_difference_to_use_again() -> None:
    """A frame with mask 0.5 starts at t = 400 of 1000, 800, ... 200."""
    model = FakeModel(wavy)
    mask = torch.ones(2, 6)
    mask[:, 2] = 0.5
    run(model, 5, guidance=2.0, audio_mask=mask, draw_noise=torch.zeros_like, plan=GuidancePlan(every=5))
    assert [len(call.video) for call in model.calls] == [4, 2, 2, 4, 2]


# -- what is counted, and told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "scale", "forwards"), [(4, 2.0, 6), (4, 1.0, 6), (2, 1.0, 3)])
def test_forwards_are_counted_per_clip(samples: int, scale: float, forwards: int) -> None:
    tally = Tally()
    run(FakeModel(wavy), 3, samples, guidance=scale, tally=tally)
    assert tally.forwards == forwards


def test_a_model_that_asks_for_it_is_told_where_the_step_ends() -> None:
    """A model that knows the average velocity of a step is exact in any number of steps; here dz/ds = z."""

    class Average:
        config = SimpleNamespace(step_input=True)

        def __init__(self) -> None:
            self.ends: list[Tensor] = []

        def denoise(self, video: Tensor, audio: Tensor, t: Tensor, told: Any, *, end: Tensor, **_: Any) -> Any:
            self.ends.append(end)
            share = (t - end) / 1000
            mean = torch.expm1(share) / share
            return Velocity(*(z * mean.view(-1, *[1] * (z.ndim - 1)) for z in (video, audio)))

    model = Average()
    for out, start in zip(run(model, 2, 2), (draw(VIDEO), draw(AUDIO, 1)), strict=True):
        torch.testing.assert_close(out, start * np.e, rtol=1e-4, atol=1e-4)
    assert [end.tolist() for end in model.ends] == [[500.0, 500.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="step_input.*'euler' alone"):
        run(model, 2, 2, solver="ab2")
    run(FakeModel(wavy), 2, 2)  # which takes no ``end``: it would be in its masks
    guided = Average()
    run(guided, 2, 4, guidance=2.0)
    assert guided.ends[0].shape == (4,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": (600, 300)},
        {"interval": (-1, 300)},
        {"interval": (0, float("nan"))},
        {"rescale": 1.1},
        {"every": 0},
    ],
)
def test_a_plan_that_means_nothing_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="guidance|unconditional"):
        GuidancePlan(**wrong)
