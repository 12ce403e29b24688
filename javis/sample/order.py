"""In which order picture and sound are made: together, or the sound first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from javis.flow import NUM_TIMESTEPS, add_noise, timesteps
from javis.model.dit import Conditioning
from javis.sample.euler import Denoiser, Step, StepEnd, Tally, sample
from javis.sample.guidance import Guidance, GuidancePlan
from javis.sample.solvers import intervals
from javis.sample.updates import nodes

Order = Literal["together", "sound_first"]
Schedule = Callable[[Sequence[int]], Sequence[Tensor]]


def parts(steps: int, order: Order, audio_steps: int | None = None) -> list[int]:
    """Evaluations of the model in each part of a solution: one, or sound and picture (:func:`sample_in_order`).

    Raises:
        ValueError: an unknown order, fewer than one step, or sound that leaves none for the picture.
    """
    if order not in ("together", "sound_first"):
        raise ValueError(f"order must be 'together' or 'sound_first', got {order!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if audio_steps is not None and audio_steps < 1:
        raise ValueError(f"audio_steps must be at least 1, got {audio_steps}")
    if order == "together":
        return [max(steps, audio_steps or 1)]
    if audio_steps is not None and audio_steps >= steps:
        raise ValueError(f"audio_steps must be fewer than the {steps} steps in order 'sound_first', got {audio_steps}")
    if steps == 1:
        return [1]
    first = (steps + 1) // 2 if audio_steps is None else audio_steps
    return [first, steps - first]


def shifted_timesteps(intervals: Sequence[int], ratio: float, redraw: float | None = None) -> list[Tensor]:
    """Timesteps of each part: even ones, shifted towards noise by ``ratio``; the second part's begin at ``redraw``."""
    starts = [NUM_TIMESTEPS, NUM_TIMESTEPS if redraw is None else redraw]
    return [timesteps(count, ratio, start=start) for count, start in zip(intervals, starts, strict=False)]


def sample_in_order(
    model: Denoiser,
    video: Tensor,
    audio: Tensor,
    condition: Conditioning,
    steps: int,
    *,
    order: Order = "together",
    ratio: float = 1.0,
    guidance: Guidance | float = 1.0,
    callback: Callable[[Step], None] | None = None,
    on_step_end: StepEnd | None = None,
    audio_steps: int | None = None,
    redraw: float | None = None,
    solver: str = "euler",
    schedule: Schedule | None = None,
    plan: GuidancePlan | None = None,
    tally: Tally | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate from noise to latents with ``steps`` evaluations of the model in all.

    "together" denoises both streams side by side. "sound_first" does so for the first half of the steps (rounded up),
    keeps the sound, and makes the picture again from its noise with the clean sound given by a condition mask, which is
    the paper's sound-to-video task (arXiv 2503.23377, section 3.4) as the second half of text-to-both. When things
    happen is then settled before the picture is made. A single step cannot be split: it is done together.

    The second part need not begin from noise alone. Where its timesteps begin below 1000 it begins from the picture
    that the first part has made, with that share of its noise: what is where is kept, when it moves follows the sound.

    Args:
        model, video, audio, condition, guidance: as in :func:`javis.sample.sample`, without masks.
        steps: evaluations of the model, both parts together.
        order: "together" or "sound_first".
        ratio: shift of the timesteps towards noise (:func:`javis.flow.timesteps`), for each part.
        callback: sees every step before its update; numbers go on through both parts.
        on_step_end: called after every update and may replace the latents, as in :func:`javis.sample.sample`.
        audio_steps: with "sound_first" the evaluations of the first part, fewer than ``steps``. With "together" the
            model is evaluated as often as the stream with more steps asks for; the other takes as many of these
            velocities as it has steps, evenly spread, and goes in straight lines between them.
        redraw: with "sound_first" the timestep from which the picture is made again; None: 1000, from noise.
        solver: see :mod:`javis.sample.solvers`.
        schedule: gives the timesteps of all parts from their numbers of intervals, instead of ``ratio`` and ``redraw``
            (:mod:`javis.sample.schedules`).
        plan, tally: as in :func:`javis.sample.sample`.

    Raises:
        ValueError: an unknown order or solver, fewer than one step, or steps that do not fit together.
    """
    counts = parts(steps, order, audio_steps)
    between = [intervals(solver, count) for count in counts]
    times = shifted_timesteps(between, ratio, redraw) if schedule is None else schedule(between)
    held = None
    if order == "together" and audio_steps is not None and audio_steps != steps:
        held = (nodes(steps, counts[0]), nodes(audio_steps, counts[0]))
    made = sample(
        model,
        video,
        audio,
        condition,
        times[0],
        guidance=guidance,
        callback=callback,
        on_step_end=on_step_end,
        solver=solver,
        evaluations=counts[0],
        held=held,
        plan=plan,
        tally=tally,
    )
    if len(counts) == 1:
        return made
    first, begin = counts[0], times[1][0]
    if float(begin) < NUM_TIMESTEPS:
        video = add_noise(made[0], video, begin.to(video.device).expand(len(video)))
    return sample(
        model,
        video,
        made[1],
        condition,
        times[1],
        guidance=guidance,
        audio_mask=audio.new_zeros(len(audio), audio.shape[2]),
        draw_noise=torch.zeros_like,  # no frame becomes active on the way, so none is used
        callback=None if callback is None else lambda step: callback(step._replace(number=first + step.number)),
        on_step_end=None if on_step_end is None else lambda i, *rest: on_step_end(first + i, *rest),
        solver=solver,
        evaluations=counts[1],
        plan=plan,
        tally=tally,
    )
