"""What one call of the pipeline is asked for, checked: steps, guidance, seeds, length and size of the clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch

from javis.durations import ClipLength, clip_length
from javis.errors import UsageError
from javis.frame_size import FrameSize, frame_size
from javis.model.codecs import VideoCodec
from javis.requests import MAX_PROMPT, MAX_STEPS
from javis.sample import Guidance, GuidancePlan, Order, parts
from javis.sample.schedules import FITTED, fitted_first_part, fitted_timesteps, has_fit
from javis.sample.solvers import intervals
from javis.sampler_options import SamplerKeywords, SamplerOptions, check_sampler
from javis.variants import TEACHER, Choice, choose_variant, variant_sampling

Ablation = Literal["prior", "bidirectional"]
SECONDS_RANGE = (0.25, 4.0)  # of the small model, trained on 2 s
FULL_SECONDS_RANGE = (0.0, 60.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of a call in which nothing is left to be chosen."""

    steps: int
    guidance: Guidance
    order: Order
    length: ClipLength
    size: FrameSize
    ablate: frozenset[str]
    batch_size: int
    choice: Choice = TEACHER
    sampler: SamplerOptions = field(default_factory=SamplerOptions)

    @property
    def plan(self) -> GuidancePlan:
        """When there is guidance, and how."""
        own = self.sampler
        return GuidancePlan(interval=own.guidance_interval, rescale=own.guidance_rescale, every=own.uncond_every)


def check_settings(
    description: Mapping[str, Any],
    *,
    grid: tuple[int, int],
    seconds: float | None,
    fps: float | None,
    resolution: str | None,
    ratio: str | None,
    steps: int | None,
    guidance: float | None,
    audio_guidance: float | None,
    order: str | None,
    ablate: Sequence[str],
    batch_size: int,
    sampler: Mapping[str, Any] | None = None,
    variant: str | None = "teacher",
    negative_prompt: object = None,
    why_no_student: str | None = None,
) -> Settings:
    """Fill in what was not given with the checkpoint's defaults, and refuse what cannot be done.

    Args:
        description: of the checkpoint, with "clip" and "sampling".
        grid: of the video codec (:func:`codec_grid`).
        sampler: of :class:`javis.sampler_options.SamplerKeywords`.
        variant: "teacher", "student", or None to choose (:func:`javis.variants.choose_variant`).
        why_no_student: a reason why its student cannot make the clips.
        seconds and the rest: as in :meth:`javis.pipeline.JavisPipeline.__call__`.

    Raises:
        UsageError: an unusable argument.
    """
    given = dict(sampler or {})
    named: dict[str, Any] = {"steps": steps, "order": order, "negative_prompt": negative_prompt}
    named |= {"guidance": guidance, "audio_guidance": audio_guidance}
    choice = choose_variant(description, variant, given | named, why_no_student=why_no_student)
    defaults = variant_sampling(description, choice.variant)
    steps = defaults["steps"] if steps is None else steps
    if audio_guidance is None:
        audio_guidance = defaults.get("audio_guidance", defaults["guidance"]) if guidance is None else guidance
    scales = Guidance(float(defaults["guidance"] if guidance is None else guidance), float(audio_guidance))
    if unknown_names := sorted(set(given) - set(SamplerKeywords.__annotations__)):
        raise TypeError(f"unexpected keyword argument {unknown_names[0]!r}")
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"steps must be a whole number from 1 to {MAX_STEPS}, got {steps}")
    for name, scale in (("guidance", scales.video), ("audio_guidance", scales.audio)):
        if not math.isfinite(scale) or not 0 <= scale <= 100:
            raise UsageError(f"{name} must be between 0 and 100 (1 = none), got {scale}")
    order = defaults.get("order", "together") if order is None else order
    if order not in get_args(Order):
        raise UsageError(f"unknown order {order!r}; expected one of {', '.join(get_args(Order))}")
    if batch_size < 1:
        raise UsageError(f"batch size must be at least 1, got {batch_size}")
    ablations = frozenset({ablate} if isinstance(ablate, str) else ablate)
    if unknown := sorted(ablations - set(get_args(Ablation))):
        raise UsageError(f"unknown ablation {', '.join(map(repr, unknown))}; expected prior, bidirectional")
    clip = description["clip"]
    window, multiple = grid
    size = clip_size(clip, resolution, ratio, multiple=multiple)
    if "size" in clip and fps is not None and fps != clip["fps"]:
        raise UsageError(f"this checkpoint makes {clip['fps']} frames a second, so fps cannot be {fps}")
    length = clip_length(
        clip["seconds"] if seconds is None else seconds,
        clip["fps"] if fps is None else fps,
        int(clip["sample_rate"]),
        window=window,
        limits=seconds_range(description),
    )
    return Settings(
        steps=steps,
        guidance=scales,
        order=cast(Order, order),
        length=length,
        size=size,
        ablate=ablations,
        batch_size=batch_size,
        choice=choice,
        sampler=sampler_of(defaults, given, steps=steps, order=cast(Order, order)),
    )


def sampler_of(sampling: Mapping[str, Any], given: Mapping[str, Any], *, steps: int, order: Order) -> SamplerOptions:
    """The sampler's options for so many steps (:func:`javis.sampler_options.check_sampler`).

    A checkpoint whose own schedule is "fitted" has the other one for steps to which none was fitted, and divides its
    steps between sound and picture as they were fitted.

    Raises:
        UsageError: an unusable option, or fitted timesteps were asked for and there are none for these steps.
    """
    options = check_sampler(given, sampling, steps=steps, order=order)
    if options.schedule == FITTED and options.audio_steps is None and options.solver == "euler":
        options = replace(options, audio_steps=fitted_first_part(sampling, order, steps))
    if options.schedule == FITTED:
        counts = [intervals(options.solver, count) for count in parts(steps, order, options.audio_steps)]
        if given.get("schedule") is None and not has_fit(sampling, order, counts):
            return replace(options, schedule=None)
        fitted_timesteps(sampling.get(FITTED), order, counts)
    return options


def codec_grid(codec: VideoCodec) -> tuple[int, int]:
    """Frames that a video codec codes together, and pixels of a latent along each side; (1, 1) if it does not say."""
    return int(getattr(codec, "frame_window", 1)), int(getattr(codec, "space_factor", 1))


def seconds_range(description: Mapping[str, Any]) -> tuple[float, float]:
    """Shortest and longest clip, in seconds."""
    return SECONDS_RANGE if "size" in description["clip"] else FULL_SECONDS_RANGE


def clip_size(clip: Mapping[str, Any], resolution: str | None, ratio: str | None, *, multiple: int) -> FrameSize:
    """Size of the pictures; the small model ("size" in ``clip``) has but one.

    Raises:
        UsageError: a size that this checkpoint cannot make.
    """
    if "size" in clip:
        own = FrameSize(int(clip["size"]), int(clip["size"]))
        if resolution is not None and resolution != str(own):
            raise UsageError(f"this checkpoint makes pictures of {own} only, so resolution cannot be {resolution!r}")
        return own
    return frame_size(
        clip["resolution"] if resolution is None else resolution,
        clip.get("ratio", "9:16") if ratio is None else ratio,
        multiple=multiple,
    )


def full_captions(prompts: Sequence[str], *, negative: bool = False) -> list[str]:
    """Prompts -> captions as the official sampling script makes them (:mod:`javis.model.encoders.preprocess`).

    Args:
        prompts: what the user wrote.
        negative: they say what not to show, and get no aesthetic score.

    Raises:
        UsageError: a prompt that is empty, longer than `MAX_PROMPT` characters, or no text.
    """
    from javis.model.encoders.preprocess import AESTHETIC_SCORE, prepare_prompt

    captions = []
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError("empty prompt; expected a text that says what is seen and heard")
        if len(prompt) > MAX_PROMPT:
            raise UsageError(f"prompt of {len(prompt)} characters; expected at most {MAX_PROMPT}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError("a prompt is not text in UTF-8; expected words, such as 'rain on a tin roof'") from None
        caption = prepare_prompt(prompt, aesthetic_score=None if negative else AESTHETIC_SCORE)
        if not caption:
            raise UsageError(f"nothing is left of the prompt {prompt[:40]!r} after cleaning; expected English words")
        captions.append(caption)
    return captions


def clip_generator(seed: int, stream: int) -> torch.Generator:
    """Independent random stream of a clip: 0 priors, 1 video, 2 audio. On the CPU, so that no device changes it."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def clip_noise(shape: Sequence[int], seeds: Sequence[int], stream: int, device: torch.device) -> torch.Tensor:
    """Standard normal noise [len(seeds), *shape], float32; each sample's from its own seed."""
    return torch.stack([torch.randn(*shape, generator=clip_generator(seed, stream)) for seed in seeds]).to(device)


def choose_seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int]:
    """One seed per clip.

    Raises:
        UsageError: another number of seeds or generators than clips, or a seed out of range.
    """
    if seed is None:
        if generator is None or isinstance(generator, torch.Generator):
            return [int(s) for s in _draw(generator, count)]
        if len(generator) != count:
            raise UsageError(
                f"{len(generator)} generators for {count} prompts; expected one per prompt or a single one"
            )
        return [int(_draw(own, 1)[0]) for own in generator]
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise UsageError(f"{len(seeds)} seeds for {count} prompts; expected one per prompt or a single one")
    if any(not 0 <= s < 2**63 for s in seeds):
        raise UsageError(f"seeds must be between 0 and 2**63 - 1, got {seeds}")
    return seeds


def _draw(generator: torch.Generator | None, count: int) -> torch.Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randint(0, 2**31, (count,), generator=generator, device=device)
