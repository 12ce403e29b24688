"""From checked arguments to clips, batch by batch and stage by stage: what `JavisPipeline.__call__` does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from javis.clip_batch import ClipBatch
from javis.clip_stages import STAGES
from javis.console import progress_bar
from javis.decode import decode_frames
from javis.durations import ClipLength
from javis.errors import FailedError, UsageError
from javis.generation import Settings, clip_noise
from javis.model.dit import Conditioning
from javis.sample import Tally, parts, sample_in_order
from javis.sample.cache import CachedDenoiser
from javis.sample.cache import why_not as why_no_cache
from javis.sample.euler import Denoiser, StepEnd
from javis.sample.schedules import schedule_of
from javis.student import component_of, takes_scales, variant_denoiser
from javis.variants import variant_sampling

if TYPE_CHECKING:
    from javis.decode.stream import TakeFrames
    from javis.pipeline import JavisPipeline, StepCallback

TIMED = tuple(name for name in STAGES if name != "mux")


def generate(
    pipe: JavisPipeline,
    captions: list[str],
    seeds: list[int],
    asked: Settings,
    progress: Callable[[int, int], None] | None = None,
    callback: StepCallback | None = None,
    *,
    negatives: list[str] | None = None,
    audio_negatives: list[str] | None = None,
    audio_seeds: list[int] | None = None,
) -> ClipBatch:
    """Clips of all captions, ``asked.batch_size`` at a time.

    Args:
        captions, seeds, negatives: one of each per clip; no negatives: the null caption.
        audio_negatives, audio_seeds: those of the sound, if they are others.
        progress, callback: as in :meth:`javis.pipeline.JavisPipeline.__call__`.
    """
    pictures, sounds = [], []
    spent = dict.fromkeys(TIMED, 0.0)
    starts = range(0, len(captions), asked.batch_size)
    evaluations = sum(parts(asked.steps, asked.order, asked.sampler.audio_steps))
    total, tally, caches = len(starts) * evaluations, Tally(), list[dict[str, Any]]()
    if not asked.sampler.cache.exact:
        reason = why_no_cache(variant_denoiser(pipe, asked.choice.variant))
        if reason is not None:
            raise UsageError(f"cache {asked.sampler.cache.kind}: {reason}")
    with _bar(pipe, progress, total) as report:
        for number, start in enumerate(starts):
            part = slice(start, start + asked.batch_size)
            video, audio = _latents(
                pipe,
                captions[part],
                seeds[part],
                asked,
                spent,
                _step_end(pipe, number * evaluations, total, report, callback),
                tally,
                caches,
                negatives=None if negatives is None else negatives[part],
                audio_negatives=None if audio_negatives is None else audio_negatives[part],
                audio_seeds=(audio_seeds or seeds)[part],
            )
            picture, sound = decode(pipe, video, audio, (audio_seeds or seeds)[part], asked.length, spent)
            pictures.append(picture)
            sounds.append(sound)
    return ClipBatch(
        video=np.concatenate(pictures),
        audio=np.concatenate(sounds),
        fps=asked.length.fps,
        sample_rate=pipe.sample_rate,
        prompts=captions,
        seeds=seeds,
        steps=asked.steps,
        guidance=asked.guidance.video,
        audio_guidance=asked.guidance.audio,
        order=asked.order,
        forwards=tally.forwards // len(starts),
        options=asked.sampler.changed(),
        caches=caches or None,
        audio_seeds=audio_seeds,
        seconds_per_stage={name: round(value, 4) for name, value in spent.items()},
        random_weights=pipe.random_weights,
        choice=asked.choice,
    )


@torch.no_grad()
def prepared(
    pipe: JavisPipeline,
    captions: list[str],
    seeds: list[int],
    asked: Settings,
    spent: dict[str, float] | None = None,
    *,
    negatives: list[str] | None = None,
    audio_negatives: list[str] | None = None,
    audio_seeds: list[int] | None = None,
) -> tuple[Conditioning, Tensor, Tensor]:
    """What a batch is denoised from: conditioning, and noise of video [B, Cv, T, H, W] and audio [B, Ca, Ta, M]."""
    spent = dict.fromkeys(TIMED, 0.0) if spent is None else spent
    length, size = asked.length, asked.size
    model = pipe.model_of(asked.choice.variant)
    # A model that takes the scales as input has them in its velocity: there is no unconditional half to add.
    told_scales = takes_scales(model)
    texts = [*captions, *(negatives or ()), *(audio_negatives or ())]
    with stage(pipe, "text", spent, _kept(pipe, "text_encoder", texts)):
        text, mask = pipe.encode_text(captions)
        negative = None if negatives is None else pipe.encode_text(negatives)
        audio_negative = None if audio_negatives is None else pipe.encode_text(audio_negatives)
    with stage(pipe, "prior", spent, _kept(pipe, "prior_text_encoder", captions)):
        told = text if pipe.prior_text_encoder is None else pipe.encode_text(captions, for_prior=True)[0]
        priors = pipe.estimate_priors(told, seeds, zero_prior="prior" in asked.ablate)
    with stage(pipe, "condition", spent, model=component_of(pipe, asked.choice.variant)):
        condition = pipe.condition(
            text,
            mask,
            priors,
            frames=length.model_frames,
            samples=length.model_samples,
            guided=asked.guidance != (1, 1) and not told_scales,
            negative=negative,
            audio_negative=audio_negative,
            with_bidirectional="bidirectional" not in asked.ablate,
            size=size,
            fps=length.fps,
            model=model,
            scales=asked.guidance if told_scales else None,
        )
        config = model.config
        video = clip_noise((config.video_channels, *condition.video_sizes), seeds, 1, pipe.device)
        audio = clip_noise((config.audio_channels, *condition.audio_sizes), audio_seeds or seeds, 2, pipe.device)
    return condition, video, audio


def _denoiser(pipe: JavisPipeline, asked: Settings, clips: int) -> Denoiser:
    """What predicts the velocities of a batch: the model, what stands in for it, or the model with a cache."""
    variant = asked.choice.variant
    if asked.sampler.cache.exact:
        return variant_denoiser(pipe, variant)
    return CachedDenoiser(pipe.model_of(variant), asked.sampler.cache, clips=clips)


@torch.no_grad()
def _latents(
    pipe: JavisPipeline,
    captions: list[str],
    seeds: list[int],
    asked: Settings,
    spent: dict[str, float],
    on_step_end: StepEnd,
    tally: Tally,
    caches: list[dict[str, Any]],
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Latents of one batch: video [B, Cv, T, H, W] and audio [B, Ca, Ta, M], float32; arguments as of `prepared`.

    ``caches`` gets a report for each clip, if there is a cache.
    """
    variant = asked.choice.variant
    condition, video, audio = prepared(pipe, captions, seeds, asked, spent, **others)
    with stage(pipe, "denoise", spent, model=component_of(pipe, variant)):
        denoiser = _denoiser(pipe, asked, len(captions))
        video, audio = sample_in_order(
            denoiser,
            video,
            audio,
            condition,
            asked.steps,
            order=asked.order,
            guidance=1.0 if takes_scales(pipe.model_of(variant)) else asked.guidance,
            on_step_end=on_step_end,
            audio_steps=asked.sampler.audio_steps,
            solver=asked.sampler.solver,
            schedule=schedule_of(
                variant_sampling(pipe.description, variant), asked.sampler, height=asked.size.height,
                width=asked.size.width, frames=asked.length.model_frames, order=asked.order,
            ),
            plan=asked.plan,
            tally=tally,
        )  # fmt: skip
        if isinstance(denoiser, CachedDenoiser):
            caches += [denoiser.report(clip) for clip in range(len(captions))]
        if not bool(torch.isfinite(video).all() and torch.isfinite(audio).all()):
            raise FailedError("the model produced values that are not finite; check the checkpoint")
    return video, audio


def _kept(pipe: JavisPipeline, encoder: str, captions: Sequence[str]) -> set[str]:
    """{``encoder``} if the cache has all of these captions, so that this text encoder is not needed; else empty."""
    cached = pipe._cached.get(encoder)
    return {encoder} if cached is not None and cached.read(captions) else set()


@torch.no_grad()
def decode(
    pipe: JavisPipeline,
    video: Tensor,
    audio: Tensor,
    seeds: Sequence[int],
    length: ClipLength,
    spent: dict[str, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents of a batch -> pictures uint8 [B, frames, H, W, 3] and sound float32 [B, samples], both cut to length.

    The sound comes first, so that ``pipe.frames_to`` has it beside the frames.
    """
    spent = dict.fromkeys(TIMED, 0.0) if spent is None else spent
    with stage(pipe, "audio_decode", spent):
        latents = audio.to(component_dtype(pipe.audio_codec))
        sound = pipe.audio_codec.decode(latents, length.samples, seeds=[s % 2**62 for s in seeds])
        waves = sound.float().cpu().numpy()
    with stage(pipe, "video_decode", spent):
        latents = video.to(component_dtype(pipe.video_codec))
        take = None if pipe.frames_to is None else partial(_take, pipe.frames_to, waves, length, pipe.sample_rate)
        picture = decode_frames(pipe.video_codec, latents, length.model_frames, length.frames, take=take)
    return picture, waves


def _take(
    to: TakeFrames, waves: np.ndarray, length: ClipLength, sample_rate: int, number: int, chunks: Iterable[Tensor]
) -> np.ndarray:
    return to(number, chunks, waves[number], frames=length.frames, fps=length.fps, sample_rate=sample_rate)


@contextlib.contextmanager
def stage(
    pipe: JavisPipeline, name: str, spent: dict[str, float], idle: Collection[str] = (), *, model: str = "model"
) -> Iterator[None]:
    """Run a stage with its components but the ``idle`` ones on the device, and add its seconds to ``spent``.

    ``model`` is the component that stands for the model (:func:`javis.student.component_of`).
    """
    started = time.perf_counter()
    with pipe.residency.stage(name, [model if c == "model" else c for c in STAGES[name] if c not in idle]):
        yield
    spent[name] += time.perf_counter() - started


def _step_end(
    pipe: JavisPipeline,
    before: int,
    total: int,
    report: Callable[[int, int], None] | None,
    callback: StepCallback | None,
) -> StepEnd:
    def after_step(number: int, timestep: float, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor] | None:
        replaced = None
        if callback is not None:
            latents = {"video_latents": video, "audio_latents": audio}
            given = callback(pipe, number, timestep, dict(latents))
            if given is not None:
                latents |= given
                replaced = (latents["video_latents"], latents["audio_latents"])
        if report is not None:
            report(before + number + 1, total)
        return replaced

    return after_step


@contextlib.contextmanager
def _bar(
    pipe: JavisPipeline, progress: Callable[[int, int], None] | None, total: int
) -> Iterator[Callable[[int, int], None] | None]:
    """``progress`` if it is given, else a bar on a terminal, unless the pipeline was told to show none."""
    if progress is not None or not pipe.shows_progress:
        yield progress
        return
    with progress_bar("denoising", total) as advance:
        yield lambda done, _: advance(done)


def component_dtype(component: Any) -> torch.dtype:
    """Dtype of the floating-point weights (or buffers) of a component; float32 if it has none."""
    if isinstance(component, nn.Module):
        for tensor in (*component.parameters(), *component.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32
