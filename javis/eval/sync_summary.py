"""The figures of a folder of clips from the reports of its clips; see folder.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from javis.eval.fingerprint import fingerprint
from javis.eval.matching import count_events
from javis.eval.optical_flow import flow_method
from javis.eval.stats import Ratio
from javis.eval.sync import PRIMARY, TOLERANCES
from javis.eval.sync_measures import Measures
from javis.eval.sync_truth import rotations, shuffled_f1, truth_summary

_PRIMARY = f"{1000 * PRIMARY:g}"
CONFIDENT = 0.1  # confidence from which on an offset counts as known

Report = dict[str, Any]


def summary(reports: Sequence[Report], measured: Sequence[Measures], skipped: int) -> dict[str, Any]:
    """Figures over clips, json values.

    ``f1``: 2 matched / (seen + heard) over all clips, source by source where a clip has a prompt, by tolerance in ms,
    with a 95 % bootstrap interval over clips; ``any_f1`` the same of everything seen with everything heard, and
    ``shuffled`` that and AV-Align of pictures with the sounds of other clips. ``offset``: of the clips whose
    confidence is at least `CONFIDENT`. ``count_error``: heard less seen, a clip. ``remarks`` counts what is odd,
    ``truth`` compares with side files of the world.
    """
    offsets = [pair["offset_ms"] for report in reports for pair in report["matched"]]
    scores = [report["f1"][_PRIMARY] for report in reports if report["f1"][_PRIMARY] is not None]
    times = [(one.evidence.seen, one.evidence.heard) for one in measured]
    truths = [report["truth"] for report in reports if "truth" in report]
    return {
        "clips": len(reports),
        "skipped": skipped,
        "remarks": dict(Counter(word for report in reports for word in report["remarks"])),
        "clips_with_events": len(scores),
        "video_events": sum(len(report["video_events"]) for report in reports),
        "audio_events": sum(len(report["audio_events"]) for report in reports),
        "matched": len(offsets),
        f"mean_f1_{_PRIMARY}ms": _mean(scores, 4),
        "mean_abs_offset_ms": _mean(np.abs(offsets), 2),
        "mean_offset_ms": _mean(offsets, 2),
        "f1": {key: _pooled(reports, key) for key in reports[0]["f1"]},
        "any_f1": {_ms(t): _any_f1(times, t) for t in TOLERANCES},
        "offset": _offsets(reports),
        "count_error": _count_errors(reports),
        "sync_score": _mean([report["sync_score"] for report in reports], 4),
        "av_align": {name: _mean([r["av_align"][name] for r in reports], 4) for name in ("corrected", "official")},
        "shuffled": _shuffled(measured),
        **({"truth": truth_summary(truths)} if truths else {}),
        "fingerprint": fingerprint(
            measure="javis eval sync",
            flow=flow_method(),
            fps=sorted({round(report["fps"], 3) for report in reports}),
            seconds=sorted({report["seconds"] for report in reports}),
            size=sorted({tuple(report["size"]) for report in reports}),
            n=len(reports),
        ),
    }


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:g}"


def _mean(values: Any, digits: int) -> float | None:
    return round(float(np.mean(values)), digits) if len(values) else None


def _pooled(reports: Sequence[Report], key: str) -> list[float] | None:
    """[F1, low, high] over clips, None if there is no event at all."""
    counts = np.array([report["event_counts"] for report in reports], dtype=np.float64)
    matched = np.array([report["f1"][key] or 0.0 for report in reports]) * counts / 2
    ratio = Ratio(2 * matched, counts)
    ends = ratio.interval()
    return None if ratio.value is None or ends is None else [round(v, 4) for v in (ratio.value, *ends)]


def _any_f1(times: Sequence[tuple[list[float], list[float]]], tolerance: float) -> float | None:
    counts = [count_events(seen, heard, tolerance) for seen, heard in times]
    events = sum(c.reference + c.other for c in counts)
    return round(2 * sum(c.matched for c in counts) / events, 4) if events else None


def _offsets(reports: Sequence[Report]) -> dict[str, Any]:
    known = [r["offset"] for r in reports if r["offset"]["confidence"] >= CONFIDENT and r["offset"]["method"] != "none"]
    values = [offset["offset_ms"] for offset in known]
    return {
        "clips": len(known),
        "mean_ms": _mean(values, 2),
        "median_ms": round(float(np.median(values)), 2) if values else None,
        "mean_abs_ms": _mean(np.abs(values), 2),
        "confidence": _mean([report["offset"]["confidence"] for report in reports], 4),
    }


def _count_errors(reports: Sequence[Report]) -> dict[str, Any]:
    errors = [report["count_error"] for report in reports]
    return {"mean": _mean(errors, 4), "mean_abs": _mean(np.abs(errors), 4)}


def _shuffled(measured: Sequence[Measures]) -> dict[str, Any]:
    times = [(one.evidence.seen, one.evidence.heard) for one in measured]
    count = len(measured)
    aligned = [
        measured[i].av_align(measured[(i + k) % count].onset_peaks) for k in rotations(count) for i in range(count)
    ]
    found = {_ms(t): shuffled_f1(times, t) for t in TOLERANCES}
    return {
        "any_f1": {key: None if value is None else round(value, 4) for key, value in found.items()},
        "av_align": {name: _mean([one[name] for one in aligned], 4) for name in ("corrected", "official")},
    }
