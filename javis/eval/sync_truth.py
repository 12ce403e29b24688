"""What is seen and heard in a clip of the world against its side file (``javis world make``), which has every event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from javis.eval.matching import count_events, match_events, total_counts

TOLERANCES = (0.033, 0.050, 0.100)  # seconds
MATCH = 0.1  # seconds within which a found event is that of the truth, for offsets


def true_events(facts: Any) -> tuple[list[float], list[float]] | None:
    """Times (s) of the events of a side file that are to be seen, and to be heard; None if it is none of the world's.

    Args:
        facts: the json as read.
    """
    if not isinstance(facts, Mapping) or facts.get("format") != 1 or not isinstance(facts.get("sources"), list):
        return None
    seen: list[float] = []
    heard: list[float] = []
    try:
        for source in facts["sources"]:
            times = [float(event["time_s"]) for event in source["events"]]
            seen += times if source["visible"] else []
            heard += times if source["audible"] else []
    except (KeyError, TypeError, ValueError):
        return None
    return sorted(seen), sorted(heard)


def against_truth(truth: tuple[Sequence[float], Sequence[float]], report: Mapping[str, Any]) -> dict[str, Any]:
    """True, found and matched events of picture and sound of one clip, and the offsets (ms) of the matched ones."""
    found = {}
    for name, true in zip(("video", "audio"), truth, strict=True):
        times = [event["time_s"] for event in report[f"{name}_events"]]
        offsets = [1000 * (times[j] - true[i]) for i, j in match_events(true, times, MATCH)]
        found[name] = {
            "true": len(true),
            "found": len(times),
            "count_error": len(times) - len(true),
            "matched": {f"{1000 * t:g}": count_events(true, times, t).matched for t in TOLERANCES},
            "offsets_ms": [round(offset, 2) for offset in offsets],
        }
    return found


def truth_summary(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """F1, offsets and count error of picture and sound over the clips that have a truth, from `against_truth`."""
    summary: dict[str, Any] = {"clips": len(clips)}
    for name in ("video", "audio"):
        parts = [clip[name] for clip in clips]
        events = sum(part["true"] + part["found"] for part in parts)
        offsets = [offset for part in parts for offset in part["offsets_ms"]]
        summary[name] = {
            "events": sum(part["true"] for part in parts),
            "f1": {
                key: round(2 * sum(part["matched"][key] for part in parts) / events, 4) if events else None
                for key in (f"{1000 * t:g}" for t in TOLERANCES)
            },
            "mean_offset_ms": round(float(np.mean(offsets)), 2) if offsets else None,
            "mean_abs_offset_ms": round(float(np.mean(np.abs(offsets))), 2) if offsets else None,
            "mean_abs_count_error": round(float(np.mean([abs(part["count_error"]) for part in parts])), 4),
        }
    return summary


def shuffled_f1(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], tolerance: float) -> float | None:
    """Event F1 of pictures with the sounds of other clips: what chance reaches.

    Args:
        pairs: times (s) that are seen and heard, clip by clip.
        tolerance: seconds.

    Returns:
        Over up to eight rotations of the clips, so that no clip meets its own sound; None with under two clips.
    """
    turns = rotations(len(pairs))
    counts = [
        count_events(pairs[i][0], pairs[(i + k) % len(pairs)][1], tolerance) for k in turns for i in range(len(pairs))
    ]
    return total_counts(counts).f1


def rotations(count: int, most: int = 8) -> list[int]:
    """Up to ``most`` different numbers of places, 1..count - 1, spread evenly, by which a list of clips is rotated."""
    return sorted({round(k) for k in np.linspace(1, count - 1, min(most, count - 1))}) if count > 1 else []
