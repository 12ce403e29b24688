"""In which order picture and sound are made: together, or the sound first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from javis.flow import timesteps
from javis.model.dit import Conditioning
from javis.sample.euler import Denoiser, Guidance, Step, StepEnd, sample

Order = Literal["together", "sound_first"]


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
) -> tuple[Tensor, Tensor]:
    """Integrate from noise to latents with ``steps`` evaluations of the model in all.

    "together" denoises both streams side by side. "sound_first" does so for the first half of the steps (rounded up),
    keeps the sound, and makes the picture again from its noise with the clean sound given by a condition mask, which is
    the paper's sound-to-video task (arXiv 2503.23377, section 3.4) as the second half of text-to-both. When things
    happen is then settled before the picture is made. A single step cannot be split: it is done together.

    Args:
        model, video, audio, condition, guidance: as in :func:`javis.sample.sample`, without masks.
        steps: evaluations of the model, both parts together.
        order: "together" or "sound_first".
        ratio: shift of the timesteps towards noise (:func:`javis.flow.timesteps`), for each part.
        callback: sees every step before its update; numbers go on through both parts.
        on_step_end: called after every update and may replace the latents, as in :func:`javis.sample.sample`.

    Raises:
        ValueError: an unknown order, or fewer than one step.
    """
    if order not in ("together", "sound_first"):
        raise ValueError(f"order must be 'together' or 'sound_first', got {order!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    first = steps if order == "together" or steps == 1 else (steps + 1) // 2
    made = sample(
        model,
        video,
        audio,
        condition,
        timesteps(first, ratio),
        guidance=guidance,
        callback=callback,
        on_step_end=on_step_end,
    )
    if first == steps:
        return made
    return sample(
        model,
        video,
        made[1],
        condition,
        timesteps(steps - first, ratio),
        guidance=guidance,
        audio_mask=audio.new_zeros(len(audio), audio.shape[2]),
        draw_noise=torch.zeros_like,  # no frame becomes active on the way, so none is used
        callback=None if callback is None else lambda step: callback(step._replace(number=first + step.number)),
        on_step_end=None if on_step_end is None else lambda i, *rest: on_step_end(first + i, *rest),
    )
