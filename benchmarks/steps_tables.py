"""The section of docs/benchmarks.md on quality against steps, from rows of ``javis eval steps``; see tables.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Table = Callable[[Sequence[str], list[list[object]]], str]
CAPTION = ("colour", "shape", "side", "timbre", "pitch")
KINDS = ("one_source", "two_sources", "off_screen")
SETS = ("both", "picture", "sound")


def steps_section(rows: list[Row], table: Table, where: Callable[[Row], str]) -> str:
    """Newest row of each setting, of the weights and prompts that the last row is of, and the newest bars.

    Args:
        rows: of kind ``eval_steps`` and ``eval_steps_bars``, oldest first.
        table: makes a markdown table of a header and cells.
        where: device, versions and commit of a row.
    """
    from javis.eval.steps_plot import newest_rows

    points = newest_rows(rows)
    if not points:
        return ""
    one = points[-1]
    cells: list[list[object]] = []
    for row in points:
        name = ", ".join([row["variant"], *(f"{option} {value}" for option, value in row["options"].items())])
        kinds = " / ".join(_value(row["f1_by_kind"].get(kind)) for kind in KINDS)
        parts = " / ".join(_value(row["accuracy_of"].get(part)) for part in CAPTION)
        distances = [_interval(row["frechet"][part], 2, "corrected") for part in SETS]
        cells.append([name, row["steps"], row["forwards_per_clip"], row["seconds_per_clip"], row["seconds_alone"]])
        cells[-1] += [_interval(row["f1"], 3), kinds, row["shuffled_f1"], _interval(row["mean_abs_offset_ms"], 1)]
        cells[-1] += [_interval(row["accuracy"], 3), parts, *distances]
    header = ["", "steps", "evaluations a clip", "s a clip", "s alone", "event F1 [95 %]", "one / two / off-screen"]
    header += ["shuffled", "offset ms", "caption", " / ".join(CAPTION), *(f"Frechet, {part}" for part in SETS)]
    text = (
        "\n## Quality against steps\n\n"
        f"`javis eval steps --count {one['count']} --seed {one['seed']}` on checkpoint {one['checkpoint']}, "
        f"{sum(one['clips'].values())} {one['split'].replace('_', '-')} prompts; {where(one)}. Intervals: bootstrap "
        "over clips; Frechet distances to real clips, without the bias of few clips, jackknife. Drawn in "
        "[steps.png](steps.png). What is measured: [eval.md](eval.md).\n\n"
    )
    text += table(header, cells)
    weights = [row for row in rows if row["kind"] == "eval_steps_bars" and _same(row, one)]
    if weights:
        bars = [_bar(bar) for bar in weights[-1]["bars"]]
        text += f"\nDifferences on the same prompts; {where(weights[-1])}.\n\n"
        text += table(["bar", "value [95 %]", "bound", "held"], bars)
    return text


def _same(a: Row, b: Row) -> bool:
    return all(a[name] == b[name] for name in ("checkpoint_fingerprint", "count", "seed", "split"))


def _bar(bar: Row) -> list[object]:
    bound = f"at least {bar['at_least']:g}" if "at_least" in bar else f"at most {bar['at_most']:g}"
    verdict = {True: "yes", False: "no", None: "not measured"}[bar["held"]]
    if bar["held"] and bar["surely"] is False:
        verdict = "yes, but not all of the interval"
    return [bar["name"].replace("|", "\\|"), _interval(bar, 3), bound, verdict]


def _value(figure: Row | None, digits: int = 3) -> str:
    return "-" if figure is None else f"{figure['value']:.{digits}f}"


def _interval(figure: Row | None, digits: int, name: str = "value") -> str:
    if figure is None or figure[name] is None:
        return "-"
    ends = [] if figure.get("low") is None else [f"[{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"]
    return " ".join([f"{figure[name]:.{digits}f}", *ends])
