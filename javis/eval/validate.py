"""How often scores of synchrony rank a clip above a damaged one: real clips of the world, and damage to them.

Scores see picture and sound alone. That the damaged clip is the worse one is planted, not detected: a score is right
about a pair if it is lower for the damaged clip, half right if it is equal (or undefined for either).

JavisScore's network is no part of this: its arithmetic is given features that need no download, so its figures here say
what the arithmetic can see with them, not how good JavisScore is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from javis.data.negatives_clip import Clip
from javis.data.negatives_world import draw_scene, world_clip, world_negatives
from javis.eval.damage import DAMAGES, NoDamage
from javis.eval.extractors.builtin import Builtin
from javis.eval.metrics import audio_peaks, av_align, javis_score, segment_windows, video_peaks
from javis.eval.onsets import HOP
from javis.eval.optical_flow import flow_trajectory
from javis.eval.stats import Ratio
from javis.eval.sync_score import Evidence, event_agreement, score_of
from javis.world import Scene, WorldConfig

LEVELS = (0.05, 0.1, 0.3, 1.0)
FINE, WIDE = (0.5, 0.0), (2.0, 1.5)  # window and overlap of JavisScore, seconds; the paper's figures use the latter


@dataclass(frozen=True)
class Stream:
    """Picture or sound of a clip with all that the scores read from it, made once."""

    clip: Clip

    @cached_property
    def seen(self) -> Evidence:
        """The evidence of the picture, beside silence."""
        return Evidence.of(self.clip.video, np.zeros(len(self.clip.waveform)), self.clip.fps, self.clip.rate)

    @cached_property
    def heard(self) -> Evidence:
        """The evidence of the sound, beside two grey frames."""
        return Evidence.of(np.zeros((2, 8, 8, 3), np.uint8), self.clip.waveform, self.clip.fps, self.clip.rate)

    @cached_property
    def flow_peaks(self) -> list[float]:
        return video_peaks(flow_trajectory(self.clip.video), self.clip.fps)

    @cached_property
    def onset_peaks(self) -> list[float]:
        return audio_peaks(self.clip.waveform, self.clip.rate)

    @cached_property
    def frame_features(self) -> np.ndarray:
        """The builtin picture features of every frame and the one before it, [T, 24]."""
        video, one = self.clip.video, Builtin()
        pairs = [np.stack([video[max(0, k - 1)], video[k]]) for k in range(len(video))]
        return np.concatenate([one.embed_video(pair, 16.0) for pair in pairs])

    @cached_property
    def sound_features(self) -> dict[tuple[float, float], np.ndarray]:
        """The builtin sound features of every window, [W, 24], by kind of window."""
        one, wave, rate = Builtin(), self.clip.waveform, self.clip.rate
        return {
            kind: np.concatenate([one.embed_audio(wave[a:b], rate) for a, b in windows(self.clip, kind)[1]])
            for kind in (FINE, WIDE)
        }


def windows(clip: Clip, kind: tuple[float, float]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges of frames and of samples of JavisScore's windows."""
    found = segment_windows(
        len(clip.video), len(clip.waveform), clip.fps, seconds=kind[0], overlap=kind[1], rate=clip.rate
    )
    return found.video, found.audio


def scores(picture: Stream, sound: Stream) -> dict[str, float]:
    """Every score of the picture of one clip with the sound of another, by name; NaN where it is undefined."""
    clip, a, b = picture.clip, picture.seen, sound.heard
    evidence = Evidence(
        a.seen, b.heard, a.motion, a.restless, b.onset, clip.fps, a.video_seconds, b.audio_seconds
    )  # fmt: skip
    found = {"sync_score": score_of(evidence), "event_agreement": event_agreement(evidence.seen, evidence.heard)}
    for protocol in ("corrected", "official"):
        found[f"av_align_{protocol}"] = av_align(
            picture.flow_peaks, sound.onset_peaks, clip.fps, protocol=protocol  # type: ignore[arg-type]
        )  # fmt: skip
    for name, kind in (("fine", FINE), ("wide", WIDE)):
        frames = [picture.frame_features[a:b] for a, b in windows(clip, kind)[0]]
        found[f"javis_score_builtin_{name}"] = javis_score(frames, sound.sound_features[kind])
    found["javis_score_energy_fine"] = javis_score(*_energy_vectors(evidence, clip, FINE))
    return found


def _energy_vectors(evidence: Evidence, clip: Clip, kind: tuple[float, float]) -> tuple[list[np.ndarray], np.ndarray]:
    """Two-dimensional features in one space: how much moves at a frame, how much begins to sound in a window.

    A share x of the clip's largest value is the vector (cos, sin) of x quarter turns.
    """
    motion = np.concatenate([evidence.motion[:1], evidence.motion])
    frames = _on_circle(motion / max(float(motion.max(initial=0.0)), 1e-9))
    video, audio = windows(clip, kind)
    onset = [float(evidence.onset[_hops(a, clip) : _hops(b, clip)].max(initial=0.0)) for a, b in audio]
    levels = np.array(onset) / max(float(evidence.onset.max(initial=0.0)), 1e-9)
    return [frames[a:b] for a, b in video], _on_circle(levels)


def _hops(sample: int, clip: Clip) -> int:
    return round(sample / clip.rate / HOP)


def _on_circle(shares: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(0.5 * math.pi * shares), np.sin(0.5 * math.pi * shares)], axis=1)


# -- pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What the scores said of one damaged clip: 1 right, 0.5 equal, 0 wrong, by score."""

    clip: int
    kind: str
    level: float | None
    right: dict[str, float]


def verdicts(whole: dict[str, float], damaged: dict[str, float]) -> dict[str, float]:
    """1 where the damaged clip has the lower score, 0 where it has the higher one, else 0.5."""
    return {
        name: 1.0 if damaged[name] < value else 0.0 if damaged[name] > value else 0.5 for name, value in whole.items()
    }


def rank_clips(
    scenes: Sequence[Scene],
    *,
    seed: int,
    levels: Sequence[float] | None = None,
    kinds: Sequence[str] = tuple(DAMAGES),
    twins: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[Pair]:
    """Pairs of every scene's clip with damage of every kind and level that it allows, and with its asynchronous twins.

    Damage that changes nothing (a swap of two silences) makes no pair. ``progress`` is told the clips done.
    """
    clips = [world_clip(scene) for scene in scenes]
    found: list[Pair] = []
    for index, (scene, clip) in enumerate(zip(scenes, clips, strict=True)):
        whole = Stream(clip)
        right = scores(whole, whole)

        def compare(kind: str, level: float | None, video: np.ndarray, waveform: np.ndarray) -> None:
            same = np.array_equal(video, clip.video), np.array_equal(waveform, clip.waveform)  # noqa: B023
            if all(same):
                return
            changed = Stream(Clip(video, waveform, clip.fps, clip.rate, ()))  # noqa: B023
            picture, sound = (whole if kept else changed for kept in same)  # noqa: B023
            found.append(Pair(index, kind, level, verdicts(right, scores(picture, sound))))  # noqa: B023

        other = clips[(index + 1) % len(clips)]
        for kind in kinds:
            for level in LEVELS if levels is None else levels:
                rng = np.random.default_rng([seed, index, zlib.crc32(kind.encode()), round(1000 * level)])
                try:
                    streams = DAMAGES[kind](
                        clip.video, clip.waveform, clip.fps, clip.rate, rng, level,
                        events=clip.events, other=(other.video, other.waveform),
                    )  # fmt: skip
                except NoDamage:
                    continue
                compare(kind, level, *streams)
        if twins:
            made = world_negatives(scene, clip, np.random.default_rng([seed, index]), split="any")
            for kind, twin in made.items():
                video = clip.video if twin.video is None else twin.video
                compare(kind, None, video, clip.waveform if twin.waveform is None else twin.waveform)
        if progress is not None:
            progress(index + 1)
    return found


def scenes_of(count: int, seed: int, config: WorldConfig | None = None) -> list[Scene]:
    """``count`` scenes in which everything that sounds is seen, one and two sources as the world mixes them."""
    return [draw_scene(seed + index, config or WorldConfig(), split="any") for index in range(count)]


def ranking_report(pairs: Sequence[Pair], clips: int) -> dict[str, Any]:
    """Share of pairs ranked right by each score, with 95 % bootstrap intervals over clips: json values.

    ``all`` is over every pair of damage, ``kinds`` and ``levels`` are parts of it, ``cells`` both at once; ``twins`` is
    over the asynchronous twins, which have no level.
    """
    twins = [pair for pair in pairs if pair.level is None]
    damaged = [pair for pair in pairs if pair.level is not None]
    report: dict[str, Any] = {"pairs": len(damaged), "twin_pairs": len(twins), "scores": {}}
    for name in pairs[0].right if pairs else ():
        cells = _means(damaged, name, lambda pair: f"{pair.kind} {pair.level:g}")
        report["scores"][name] = {
            "all": _share(damaged, name, clips),
            "twins": _share(twins, name, clips),
            "kinds": _means(damaged, name, lambda pair: pair.kind),
            "levels": _means(damaged, name, lambda pair: f"{pair.level:g}"),
            "cells": cells,
            "twin_kinds": _means(twins, name, lambda pair: pair.kind),
        }
    return report


def _share(pairs: Sequence[Pair], name: str, clips: int) -> dict[str, float] | None:
    right, total = np.zeros(clips), np.zeros(clips)
    for pair in pairs:
        right[pair.clip] += pair.right[name]
        total[pair.clip] += 1
    ratio = Ratio(right, total)
    ends = ratio.interval()
    if ratio.value is None or ends is None:
        return None
    return {"value": round(ratio.value, 4), "low": round(ends[0], 4), "high": round(ends[1], 4)}


def _means(pairs: Sequence[Pair], name: str, key: Callable[[Pair], str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for pair in pairs:
        found.setdefault(key(pair), []).append(pair.right[name])
    return {part: round(float(np.mean(values)), 4) for part, values in found.items()}
