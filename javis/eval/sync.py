"""The sync report of one clip: what is seen, what is heard, and how well the two agree.

Neither detector knows the truth: one gets the pixels, the other the waveform. A prompt, if given, tells both what to
look and listen for (colours, motions, timbres), never when.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from javis.eval.matching import count_events, match_events
from javis.eval.motion import video_events
from javis.eval.onsets import Sound, audio_onsets, source_onsets
from javis.eval.tracking import Picture
from javis.world.language import parse_prompt

TOLERANCES = (0.033, 0.050, 0.0625, 0.100)  # seconds
PRIMARY = 0.0625  # one frame at 16 fps

Clause = Mapping[str, Any]


def clause_events(
    video: np.ndarray | Picture, audio: np.ndarray | Sound, fps: float, sample_rate: int, clauses: Sequence[Clause]
) -> list[tuple[list[float], list[float]]]:
    """Times (s) at which each described source is seen and heard: one pair of lists for each clause."""
    picture = Picture.of(video)
    seen = [[event.time for event in video_events(picture, fps, clause)] for clause in clauses]
    heard: list[list[float]] = [[] for _ in clauses]
    for onset in source_onsets(audio, sample_rate, clauses):
        if onset.source is not None:
            heard[onset.source].append(onset.time)
    return list(zip(seen, heard, strict=True))


def sync_report(
    video: np.ndarray,
    audio: np.ndarray,
    fps: float,
    sample_rate: int,
    prompt: str | Sequence[Clause] | None = None,
) -> dict[str, Any]:
    """How well picture and sound of one clip agree.

    Args:
        video: uint8 (or float in 0..1) [T, H, W, 3]; frame i shows the instant i / fps.
        audio: float [N] in [-1, 1], mono.
        fps: frames per second.
        sample_rate: Hz.
        prompt: words of the built-in world (or its parsed clauses). With it events are matched source by source; what
            it calls unseen or silent takes no part. Without it everything seen is matched with everything heard.

    Returns:
        Plain json values: ``video_events`` and ``audio_events`` (``time_s``, ``strength``, and which source),
        ``matched`` (at one frame of 16 fps, with ``offset_ms`` = sound minus picture), ``f1`` by tolerance in ms (None
        if there is no event at all), ``event_counts`` (seen and heard together, of what F1 is about),
        ``count_error`` (heard less seen), ``mean_abs_offset_ms``, ``mean_offset_ms`` (None without a match) and
        ``confidence`` in 0..1: the F1 at one frame, lowered where few events speak for it.

    Raises:
        UsageError: the prompt does not parse.
        ValueError: shapes, dtypes or rates that cannot be read.
    """
    clauses = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    picture = Picture(video)
    seen: list[dict[str, Any]] = []
    heard: list[dict[str, Any]] = []
    for source, clause in enumerate(clauses if clauses else [None]):
        for seen_event in video_events(picture, fps, clause):
            seen.append(
                {
                    "time_s": round(seen_event.time, 4),
                    "source": source if clauses else None,
                    "colour": seen_event.colour,
                    "kind": seen_event.kind,
                    "strength": round(seen_event.strength, 4),
                    "x": round(seen_event.x, 4),
                    "y": round(seen_event.y, 4),
                }
            )
    onsets = source_onsets(audio, sample_rate, clauses) if clauses else audio_onsets(audio, sample_rate)
    for onset in onsets:
        heard.append({"time_s": round(onset.time, 4), "source": onset.source, "strength": round(onset.strength, 4)})
    return {
        "video_events": seen,
        "audio_events": heard,
        **_agreement(seen, heard, _groups(clauses)),
        "seconds": round(len(video) / fps, 6),
    }


def _groups(clauses: Sequence[Clause] | None) -> list[int | None]:
    """Sources that are both seen and heard; [None] stands for everything."""
    if not clauses:
        return [None]
    return [i for i, clause in enumerate(clauses) if clause.get("visible", True) and clause.get("audible", True)]


def _agreement(
    seen: Sequence[Mapping[str, Any]], heard: Sequence[Mapping[str, Any]], groups: Sequence[int | None]
) -> dict[str, Any]:
    def times(events: Sequence[Mapping[str, Any]], group: int | None) -> list[float]:
        return [float(event["time_s"]) for event in events if group is None or event["source"] == group]

    matched = []
    for group in groups:
        video, audio = times(seen, group), times(heard, group)
        for i, j in match_events(video, audio, PRIMARY):
            matched.append(
                {
                    "source": group,
                    "video_s": video[i],
                    "audio_s": audio[j],
                    "offset_ms": round(1000 * (audio[j] - video[i]), 2),
                }
            )
    f1: dict[str, float | None] = {}
    events = more_heard = 0
    for tolerance in TOLERANCES:
        counts = [count_events(times(seen, group), times(heard, group), tolerance) for group in groups]
        events = sum(c.reference + c.other for c in counts)
        more_heard = sum(c.other - c.reference for c in counts)
        f1[f"{1000 * tolerance:g}"] = round(2 * sum(c.matched for c in counts) / events, 4) if events else None
    offsets = [pair["offset_ms"] for pair in matched]
    primary = f1[f"{1000 * PRIMARY:g}"]
    return {
        "matched": matched,
        "f1": f1,
        "event_counts": events,
        "count_error": more_heard,
        "mean_abs_offset_ms": round(float(np.mean(np.abs(offsets))), 2) if offsets else None,
        "mean_offset_ms": round(float(np.mean(offsets)), 2) if offsets else None,
        # One matched pair may be luck, four are not: 1 - 2^-pairs.
        "confidence": round((primary or 0.0) * (1.0 - math.pow(2.0, -len(matched))), 4),
    }
