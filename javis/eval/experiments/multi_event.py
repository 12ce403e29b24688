"""(e) The gap between clips of one and of two sounding sources, and measures that might narrow it.

Gap: event F1 of prompts with one source less that of prompts with two. What real clips of the same scenes lose, plain
and through the codecs, is the detectors' and the codecs' share of it. A measure narrows the gap if it helps prompts of
two sources more than prompts of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from javis.eval.experiments.common import (
    TEACHER,
    Context,
    Row,
    as_figure,
    bars,
    cell,
    excludes,
    listed,
    save_figure,
    table,
)
from javis.eval.steps_points import CODEC, REAL, MeasuredClip, Setting
from javis.eval.steps_report import accuracy_of, f1_of, figure_of, offset_of
from javis.variants import variant_sampling

TITLE = "One source against two"
COUNT = 32
KINDS = {"one_source": "one", "two_sources": "two"}
USUAL = "as it is"
THROUGH_CODECS = "real clips through the codecs"
DRAWS = 2000


def settings(steps: int, sampling: Mapping[str, Any]) -> dict[str, Setting]:
    """Name -> setting: the checkpoint's own, then the measures that were tried.

    Args:
        steps: evaluations of the model for a clip.
        sampling: the checkpoint's defaults.
    """
    scale = float(sampling.get("audio_guidance", sampling["guidance"]))
    more = round(1.5 * scale, 2)
    found = {
        USUAL: Setting(TEACHER, steps, {}),
        "best of 4 by the weight-free score": Setting(TEACHER, steps, {"best_of": 4}),
        f"guidance of the sound {more:g} instead of {scale:g}": Setting(TEACHER, steps, {"audio_guidance": more}),
    }
    if sampling.get("order") == "sound_first" and steps > 1:
        first = (steps + 1) // 2
        options = {"audio_steps": 2 * first}
        found[f"{2 * first} steps for the sound instead of {first}"] = Setting(TEACHER, steps + first, options)
    return found


def run(context: Context) -> dict[str, Any]:
    """Clips of all prompts at every setting, and real clips of their scenes."""
    sampling = variant_sampling(context.pipe.description, TEACHER)
    clips: dict[str, list[MeasuredClip]] = {}
    wanted = {"real clips": Setting(REAL, None), THROUGH_CODECS: Setting(CODEC, None)}
    for name, setting in (wanted | settings(context.steps, sampling)).items():
        point = context.point(setting)
        clips[name] = [point.clips[number] for number in range(len(context.prompts))]
    return figures(clips)


def figures(clips: Mapping[str, Sequence[MeasuredClip]]) -> dict[str, Any]:
    """Figures of each setting by kind, its gap, and its paired difference to `USUAL`; the same prompts in one order."""
    usual = clips[USUAL]
    found: dict[str, Any] = {"prompts": {k: sum(c.measured.kind == k for c in usual) for k in KINDS}, "settings": {}}
    for name, mine in clips.items():
        kinds = {kind: [c for c in mine if c.measured.kind == kind] for kind in KINDS}
        entry: dict[str, Any] = {
            "f1": {kind: figure_of(f1_of(some)) for kind, some in kinds.items()},
            "mean_abs_offset_ms": {kind: figure_of(offset_of(some), 2) for kind, some in kinds.items()},
            "accuracy": {kind: figure_of(accuracy_of(some)) for kind, some in kinds.items()},
            "gap": as_figure(gap(mine)),
        }
        forwards = [c.forwards for c in mine if c.forwards is not None]
        entry["forwards_per_clip"] = round(float(np.mean(forwards)), 2) if forwards else None
        if forwards and mine is not usual:
            before = {kind: [c for c in usual if c.measured.kind == kind] for kind in KINDS}
            entry["gain"] = {k: as_figure(f1_of(kinds[k]).difference(f1_of(before[k]))) for k in KINDS}
            entry["narrowed"] = as_figure(narrowed(usual, mine))
        found["settings"][name] = entry
    return found


def gap(clips: Sequence[MeasuredClip]) -> tuple[float, float, float] | None:
    """Event F1 of one source less that of two, with its bootstrap interval over clips, drawn within each kind."""
    return _gap_of([clips], lambda gaps: gaps[0])


def narrowed(before: Sequence[MeasuredClip], after: Sequence[MeasuredClip]) -> tuple[float, float, float] | None:
    """Gap of ``before`` less that of ``after`` on the same prompts, with its paired interval."""
    return _gap_of([before, after], lambda gaps: gaps[0] - gaps[1])


def _gap_of(
    sets: Sequence[Sequence[MeasuredClip]], what: Callable[[list[np.ndarray]], np.ndarray]
) -> tuple[float, float, float] | None:
    """A function of the gaps of sets of clips of the same prompts; every draw takes the same prompts of all."""
    rng = np.random.default_rng(0)
    gaps = [np.zeros(1 + DRAWS) for _ in sets]
    for kind, sign in zip(KINDS, (1, -1), strict=True):
        numbers = np.array([i for i, clip in enumerate(sets[0]) if clip.measured.kind == kind])
        if not len(numbers):
            return None
        # The first row is the clips as they are.
        drawn = np.vstack((np.arange(len(numbers)), rng.integers(len(numbers), size=(DRAWS, len(numbers)))))
        for values, clips in zip(gaps, sets, strict=True):
            ratio = f1_of([clips[i] for i in numbers])
            values += sign * ratio.numerator[drawn].sum(axis=1) / ratio.denominator[drawn].sum(axis=1)
    found = what(gaps)
    low, high = np.percentile(found[1:], (2.5, 97.5))
    return float(found[0]), float(low), float(high)


# --- page -------------------------------------------------------------------------------------------------------------


def section(row: Row) -> str:
    """Table and finding."""
    counts = row["prompts"]
    text = (
        f"{counts['one_source']} held-out prompts of one source and {counts['two_sources']} of two, {row['steps']} "
        "steps unless a row says otherwise. Gap: event F1 of one source less that of two. Narrowed: gap less that of "
        "the measure, same prompts and noise; above 0 is better. Intervals: bootstrap over prompts, paired.\n\n"
    )
    header = ["", "event F1, one", "event F1, two", "gap", "gain, one", "gain, two", "narrowed", "offset ms, one / two"]
    header += ["caption, one / two", "evaluations a clip"]
    cells: list[list[object]] = []
    for name, entry in row["settings"].items():
        gain = entry.get("gain", {})
        cells.append([name, *(cell(entry["f1"][kind]) for kind in KINDS), cell(entry["gap"])])
        cells[-1] += [cell(gain.get(kind), sign=True) for kind in KINDS] + [cell(entry.get("narrowed"), sign=True)]
        cells[-1] += [_both(entry["mean_abs_offset_ms"], 1), _both(entry["accuracy"], 3), entry["forwards_per_clip"]]
    return text + table(header, cells) + "\n" + "\n".join(f"- {line}" for line in findings(row)) + "\n"


def _both(figures: Mapping[str, Any], digits: int) -> str:
    return " / ".join("-" if figures[k] is None else f"{figures[k]['value']:.{digits}f}" for k in KINDS)


def findings(row: Row) -> list[str]:
    """Whether there is a gap, and what each measure does to it."""
    usual = row["settings"][USUAL]["gap"]
    sure = "" if excludes(usual) else " (its interval holds 0: no gap is shown)"
    lines = [f"The gap is {cell(usual)}{sure}."]
    codec = row["settings"].get(THROUGH_CODECS)
    if codec is not None:
        lines.append(f"Real clips of the same scenes through the codecs have one of {cell(codec['gap'])}.")
    for name, entry in row["settings"].items():
        if "narrowed" not in entry:
            continue
        figure, gains = entry["narrowed"], entry["gain"]
        if excludes(figure):
            verdict = "narrows the gap" if figure["value"] > 0 else "widens the gap"
        else:
            verdict = "does not change the gap beyond chance"
        helped = [KINDS[k] for k in KINDS if excludes(gains[k]) and gains[k]["value"] > 0]
        hurt = [KINDS[k] for k in KINDS if excludes(gains[k]) and gains[k]["value"] < 0]
        said = [f"raises the F1 of {listed(helped)}"] * bool(helped) + [f"lowers that of {listed(hurt)}"] * bool(hurt)
        lines.append(f"{name}: {verdict} ({cell(figure, sign=True)}); {listed(said) or 'no F1 changes beyond chance'}.")
    lines.append(
        "Best-of picks by a score that is made of the same detectors as the F1 (without the prompt), so its F1 is "
        "chosen for; caption accuracy, which it does not see, is the check."
    )
    return lines


def plot(row: Row, path: Path) -> None:
    """F1 by kind, and the gaps."""
    from matplotlib.figure import Figure as Sheet

    names = list(row["settings"])
    entries = [row["settings"][name] for name in names]
    sheet = Sheet(figsize=(15, 4), layout="constrained")
    left, middle, right = sheet.subplots(1, 3)
    bars(left, names, [entry["f1"]["one_source"] for entry in entries], "event F1, one source", None)
    bars(middle, [""] * len(names), [entry["f1"]["two_sources"] for entry in entries], "event F1, two sources", None)
    bars(right, [""] * len(names), [entry["gap"] for entry in entries], "gap", 0.0)
    save_figure(sheet, path)
