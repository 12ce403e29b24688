"""Synchrony and faithfulness on the built-in world: the figures that the docs quote.

A set of clips (generated, or rendered by the world itself) is measured with the detectors of this package. The same
detectors on real clips give their ceiling, and sound shuffled among the clips gives the floor that chance reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from javis.errors import UsageError
from javis.eval.attributes import HEARD, SEEN, check_attributes
from javis.eval.matching import EventCounts, count_events, match_events, total_counts
from javis.eval.onsets import Sound, audio_onsets
from javis.eval.stats import bootstrap_interval
from javis.eval.sync import PRIMARY, TOLERANCES, clause_events
from javis.eval.tracking import Picture
from javis.variants import choose_variant, variant_sampling

SHUFFLES = 8


@dataclass(frozen=True)
class Clip:
    """A clip to be measured.

    ``clauses`` are those of its caption (``parse_prompt``); ``truth`` holds the event times (s) of each clause where
    they are known (real clips), else None.
    """

    clauses: Sequence[Mapping[str, Any]]
    video: np.ndarray  # uint8 [T, H, W, 3]
    audio: np.ndarray  # float [N]
    fps: float
    sample_rate: int
    truth: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True)
class Measured:
    """What the detectors say about one clip; small enough to keep for every clip."""

    kind: str  # one_source, two_sources, silent or unseen
    sources: list[tuple[list[float], list[float]]]  # of clauses both seen and heard: times seen, times heard
    truth: list[list[float]] | None  # of the same clauses
    checks: dict[str, list[bool]] = field(default_factory=dict)  # attribute -> one entry per clause that names it
    objects_right: bool = True  # as many objects as the caption names
    onsets: int = 0  # of everything that sounds


def measure(clip: Clip) -> Measured:
    """Run detectors and readers on one clip."""
    clauses = list(clip.clauses)
    both = [k for k, c in enumerate(clauses) if c.get("visible", True) and c.get("audible", True)]
    visible = sum(bool(c.get("visible", True)) for c in clauses)
    audible = sum(bool(c.get("audible", True)) for c in clauses)
    picture, sound = Picture(clip.video), Sound(clip.audio, clip.sample_rate)
    events = clause_events(picture, sound, clip.fps, clip.sample_rate, clauses)
    checks: dict[str, list[bool]] = {}
    for result in check_attributes(picture, sound, clip.fps, clip.sample_rate, clauses):
        for name, right in result.items():
            checks.setdefault(name, []).append(right)
    if not audible:
        kind = "silent"
    elif len(both) < len(clauses):
        kind = "unseen"
    else:
        kind = "one_source" if len(clauses) == 1 else "two_sources"
    return Measured(
        kind=kind,
        sources=[events[k] for k in both],
        truth=None if clip.truth is None else [list(clip.truth[k]) for k in both],
        checks=checks,
        objects_right=len(picture.colours) == visible,
        onsets=len(audio_onsets(sound, clip.sample_rate)),
    )


# --- figures of a set ---------------------------------------------------------------------------------------------


def agreement(clip: Measured, tolerance: float = PRIMARY) -> EventCounts:
    """Counts of one clip, source by source; one without any event counts as one event missed on both sides."""
    counts = []
    for seen, heard in clip.sources:
        counts.append(count_events(seen, heard, tolerance) if seen or heard else EventCounts(0, 1, 1))
    return total_counts(counts)


def shuffled_agreement(
    clips: Sequence[Measured], *, seed: int = 0, shuffles: int = SHUFFLES
) -> list[list[EventCounts]]:
    """Counts of every clip's picture with the sound of another clip: one list for each derangement."""
    order = np.random.default_rng(seed).permutation(len(clips))
    results = []
    for shift in range(1, min(shuffles, len(clips) - 1) + 1):
        other = {int(a): int(b) for a, b in zip(order, np.roll(order, shift), strict=True)}
        results.append(
            [
                total_counts(
                    count_events(seen, heard, PRIMARY)
                    for (seen, _), (_, heard) in zip(clip.sources, clips[other[i]].sources, strict=False)
                )
                for i, clip in enumerate(clips)
            ]
        )
    return results


def summarise(measured: Sequence[Measured], *, seed: int = 0) -> dict[str, Any]:
    """Figures of a set of measured clips as plain json values.

    ``one_source`` and ``two_sources`` hold the event F1 by tolerance in ms (with a 95 % bootstrap interval over clips
    at one frame), offsets of matched events (sound minus picture), the shuffled control, and attribute accuracies;
    ``attributes`` are those of all clips, ``silent`` says how often something is heard where nothing should be. Where
    event times are known, ``video_truth`` and ``audio_truth`` compare each detector with them.
    """
    report: dict[str, Any] = {"clips": len(measured)}
    for kind in ("one_source", "two_sources"):
        chosen = [clip for clip in measured if clip.kind == kind]
        if chosen:
            report[kind] = _summarise_kind(chosen, seed)
    report["attributes"] = _accuracies(measured)
    silent = [clip for clip in measured if clip.kind == "silent"]
    if silent:
        report["silent"] = {
            "clips": len(silent),
            "with_sound": _mean([clip.onsets > 0 for clip in silent]),
            "sounds_per_clip": _mean([clip.onsets for clip in silent]),
        }
    return report


def _summarise_kind(clips: Sequence[Measured], seed: int) -> dict[str, Any]:
    def f1(some: Sequence[Measured], tolerance: float = PRIMARY) -> float | None:
        return total_counts(agreement(clip, tolerance) for clip in some).f1

    offsets = [1000 * o for clip in clips for seen, heard in clip.sources for o in _offsets(seen, heard)]
    shuffled = [counts for derangement in shuffled_agreement(clips, seed=seed) for counts in derangement]
    interval = bootstrap_interval(clips, f1, seed=seed)
    result: dict[str, Any] = {
        "clips": len(clips),
        "f1": {f"{1000 * tolerance:g}": _rounded(f1(clips, tolerance)) for tolerance in TOLERANCES},
        "f1_interval": None if interval is None else [_rounded(end) for end in interval],
        "shuffled_f1": _rounded(total_counts(shuffled).f1),
        "mean_abs_offset_ms": _mean(np.abs(offsets), 2),
        "mean_offset_ms": _mean(offsets, 2),
        "events_seen": sum(len(seen) for clip in clips for seen, _ in clip.sources),
        "events_heard": sum(len(heard) for clip in clips for _, heard in clip.sources),
        "sources_without_events": sum(not (seen or heard) for clip in clips for seen, heard in clip.sources),
        "objects_right": _mean([clip.objects_right for clip in clips]),
        "attributes": _accuracies(clips),
    }
    if all(clip.truth is not None for clip in clips):
        for name, side in (("video_truth", 0), ("audio_truth", 1)):
            pairs = [
                (truth, source[side])
                for clip in clips
                for truth, source in zip(clip.truth or [], clip.sources, strict=True)
            ]
            errors = [1000 * o for truth, found in pairs for o in _offsets(truth, found)]
            result[name] = {
                "f1": _rounded(total_counts(count_events(truth, found, PRIMARY) for truth, found in pairs).f1),
                "bias_ms": _mean(errors, 2),
                "mean_abs_error_ms": _mean(np.abs(errors), 2),
            }
    return result


def _offsets(reference: Sequence[float], other: Sequence[float]) -> list[float]:
    return [other[j] - reference[i] for i, j in match_events(reference, other, PRIMARY)]


def _accuracies(clips: Iterable[Measured]) -> dict[str, float | None]:
    found: dict[str, list[bool]] = {name: [] for name in (*SEEN, *HEARD)}
    for clip in clips:
        for name, rights in clip.checks.items():
            found[name] += rights
    return {name: _mean(rights) for name, rights in found.items() if rights}


def _mean(values: Sequence[float] | np.ndarray, digits: int = 4) -> float | None:
    return round(float(np.mean(values)), digits) if len(values) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# --- sets of clips ------------------------------------------------------------------------------------------------


def held_out_scenes(count: int, seed: int, *, split: str = "held_out", config: Any = None) -> list[Any]:
    """Scenes whose captions are evaluated: ``count`` with one source, ``count`` with two, and an eighth silent ones.

    Raises:
        UsageError: ``count`` is not positive or ``seed`` is negative.
    """
    from javis.world import WorldConfig, sample_scene

    if count < 1 or seed < 0:
        raise UsageError(f"count is {count} and seed is {seed}; expected at least 1 clip and a seed >= 0")
    form = config or WorldConfig()
    scenes = [sample_scene(seed + i, form, sources=n, split=split) for n in (1, 2) for i in range(count)]  # type: ignore[arg-type]
    silent: list[Any] = []
    trial = seed + count
    while len(silent) < max(1, count // 8):
        scene = sample_scene(trial, form, split=split)  # type: ignore[arg-type]
        trial += 1
        if not any(source.audible for source in scene.sources):
            silent.append(scene)
    return scenes + silent


Codec = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def real_clips(scenes: Iterable[Any], codec: Codec | None = None) -> Iterable[Clip]:
    """The world's own rendering of scenes, with its true event times.

    ``codec`` maps (video uint8 [T,H,W,3], audio float32 [N]) to the same after a round trip, to see what codecs cost.
    """
    from javis.world import render_audio, render_video

    for scene in scenes:
        video, audio = render_video(scene), render_audio(scene)
        if codec is not None:
            video, audio = codec(video, audio)
        truth = [[event.time for event in source.events] for source in scene.sources]
        clauses = [dict(source.clause) for source in scene.sources]
        yield Clip(clauses, video, audio, scene.config.fps, scene.config.sample_rate, truth)


def pipeline_codec(pipe: Any) -> Codec:
    """Round trip through the codecs of a ``JavisPipeline``."""
    import torch

    def round_trip(video: np.ndarray, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            frames = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            pictures = pipe.video_codec.decode(pipe.video_codec.encode(frames), frames.shape[2])
            wave = torch.from_numpy(audio)[None].float()
            sound = pipe.audio_codec.decode(pipe.audio_codec.encode(wave), wave.shape[1])
        back = ((pictures[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
        return back.to(torch.uint8).numpy(), sound[0].numpy()

    return round_trip


def generated_clips(
    pipe: Any,
    scenes: Sequence[Any],
    *,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    audio_guidance: float | None = None,
    order: str | None = None,
    variant: str | None = None,
    ablate: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterable[Clip]:
    """Clips that a pipeline makes from the captions of ``scenes``; the scenes' event times are not used."""
    from javis.world import caption

    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        batch = pipe(
            [caption(scene) for scene in part],
            seed=[seed + start + i for i in range(len(part))],
            steps=steps,
            guidance=guidance,
            audio_guidance=audio_guidance,
            order=order,
            variant=variant,
            ablate=tuple(ablate),
            batch_size=batch_size,
        )
        for i, scene in enumerate(part):
            clauses = [dict(source.clause) for source in scene.sources]
            yield Clip(clauses, batch.video[i], batch.audio[i], batch.fps, batch.sample_rate)
        if progress is not None:
            progress(start + len(part), len(scenes))


def evaluate(clips: Iterable[Clip], *, seed: int = 0) -> dict[str, Any]:
    """``summarise`` of ``measure`` of every clip."""
    return summarise([measure(clip) for clip in clips], seed=seed)


def run(
    pipe: Any,
    *,
    count: int = 64,
    seed: int = 1_000_000,
    steps: int | None = None,
    guidance: float | None = None,
    audio_guidance: float | None = None,
    order: str | None = None,
    variant: str | None = None,
    ablate: Sequence[str] = (),
    ceiling: bool = True,
    split: str = "held_out",
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a pipeline on captions and seeds that its training never saw.

    Args:
        pipe: a ``JavisPipeline``.
        count: clips with one source, as many with two, and an eighth of it with a silent object.
        seed: of the first scene and clip.
        steps, guidance, audio_guidance, order: of the sampling; None takes the checkpoint's own.
        variant: "teacher", "student", or None: the one that a call with these arguments takes.
        ablate: "prior" and/or "bidirectional", as the pipeline understands them.
        ceiling: also measure the same scenes rendered by the world, plain and after a round trip through the codecs.
        split: "held_out", "train" or "any".
        batch_size: clips denoised together.
        progress: called with (clips done, clips in all).

    Returns:
        Plain json values: the settings, ``generated`` and, with ``ceiling``, ``real`` and ``codec`` (``summarise``).

    Raises:
        UsageError: unusable arguments.
    """
    from javis.world import WorldConfig

    unknown = [name for name in ablate if name not in ("prior", "bidirectional")]
    if unknown:
        raise UsageError(f"cannot ablate {unknown[0]!r}; expected prior or bidirectional")
    form = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    scenes = held_out_scenes(count, seed, split=split, config=form)
    given = {"steps": steps, "guidance": guidance, "audio_guidance": audio_guidance, "order": order}
    variant = choose_variant(pipe.description, variant, given).variant
    usual = variant_sampling(pipe.description, variant)
    if audio_guidance is None:
        audio_guidance = usual.get("audio_guidance", usual["guidance"]) if guidance is None else guidance
    report: dict[str, Any] = {
        "kind": "eval_world",
        "count": count,
        "seed": seed,
        "steps": steps if steps is not None else usual["steps"],
        "guidance": guidance if guidance is not None else usual["guidance"],
        "audio_guidance": audio_guidance,
        "order": order if order is not None else usual.get("order", "together"),
        "ablate": sorted(ablate),
        "split": split,
    }
    if "student" in pipe.description:
        report["variant"] = variant
    clips = generated_clips(
        pipe,
        scenes,
        seed=seed,
        steps=steps,
        guidance=guidance,
        audio_guidance=audio_guidance,
        order=order,
        variant=variant,
        ablate=ablate,
        batch_size=batch_size,
        progress=progress,
    )
    report["generated"] = evaluate(clips, seed=seed)
    if ceiling:
        report["real"] = evaluate(real_clips(scenes), seed=seed)
        report["codec"] = evaluate(real_clips(scenes, pipeline_codec(pipe)), seed=seed)
    return report
