"""The picture of ``javis eval steps``: quality, distances and seconds against steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from javis.media import atomic_file

Row = Mapping[str, Any]
Read = Callable[[Row], "Mapping[str, Any] | None"]

_LEVELS = {"real": ("real clips", ":"), "codec": ("real clips through the codecs", "-.")}


def newest_rows(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each setting, of the checkpoint weights and prompts that the last row is of."""
    mine = [row for row in rows if row.get("kind") == "eval_steps"]
    if not mine:
        return []

    def source(row: Row) -> list[Any]:
        return [row[name] for name in ("checkpoint", "checkpoint_fingerprint", "count", "seed", "split")]

    last = source(mine[-1])
    newest = {
        (row["variant"], row["steps"], json.dumps(row["options"], sort_keys=True)): row
        for row in mine
        if source(row) == last
    }
    return list(newest.values())


def plot(rows: Sequence[Row], target: Path) -> None:
    """`draw` rows and write them as PNG, all or nothing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(rows)
    with atomic_file(target) as path:
        figure.savefig(path, format="png")
    plt.close(figure)


def draw(rows: Sequence[Row]) -> Any:
    """Rows (`javis.eval.steps_report.row_of`) as a matplotlib figure.

    A line for each variant and its options, bands for 95 % intervals, the shuffled control dashed, real clips and their
    round trip through the codecs as level lines. Frechet distances are drawn without the bias of few clips.
    """
    import matplotlib.pyplot as plt

    panels: list[tuple[str, Read, str]] = [  # title, what, scale
        ("event F1 at 62.5 ms", lambda row: row["f1"], "share"),
        ("mean |offset| of matched events, ms", lambda row: row["mean_abs_offset_ms"], "linear"),
        ("caption accuracy", lambda row: row["accuracy"], "linear"),
        ("Frechet distance, both", lambda row: _distance(row, "both"), "log"),
        ("Frechet distance, picture", lambda row: _distance(row, "picture"), "log"),
        ("Frechet distance, sound", lambda row: _distance(row, "sound"), "log"),
        ("seconds a clip, made alone", lambda row: _bare(row["seconds_alone"]), "log"),
        ("evaluations of the model a clip", lambda row: _bare(row["forwards_per_clip"]), "log"),
    ]
    curves: dict[str, list[Row]] = {}
    for row in sorted((r for r in rows if r["steps"] is not None), key=lambda r: r["steps"]):
        name = ", ".join([row["variant"], *(f"{option} {value}" for option, value in row["options"].items())])
        curves.setdefault(name, []).append(row)
    levels = {row["variant"]: row for row in rows if row["variant"] in _LEVELS}
    steps = sorted({row["steps"] for row in rows if row["steps"] is not None})
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.6), dpi=100)
    for axis, (title, read, scale) in zip(axes.flat, panels, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            _curve(axis, name, curve, read, f"C{number}", scale)
            if title.startswith("event F1"):
                _control(axis, name, curve, f"C{number}")
        for name, row in levels.items():
            level = read(row)
            # On a log axis a level near zero, such as real clips against real ones, would push the curves together.
            if level is not None and (scale != "log" or level["value"] > 0.2 * axis.dataLim.y0):
                label, style = _LEVELS[name]
                axis.axhline(level["value"], color="0.35", ls=style, lw=1, label=label)
        _frame(axis, title, scale, steps)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _curve(axis: Any, name: str, curve: Sequence[Row], read: Read, colour: str, scale: str) -> None:
    found = [(row["steps"], value) for row in curve if (value := read(row)) is not None]
    if scale == "log":
        found = [(at, value) for at, value in found if value["value"] > 0]
    if not found:
        return
    x = [at for at, _ in found]
    axis.plot(x, [value["value"] for _, value in found], "o-", ms=4, color=colour, label=name)
    if all(value.get("low") is not None for _, value in found):
        low = [max(value["low"], 0.01 * value["value"]) if scale == "log" else value["low"] for _, value in found]
        axis.fill_between(x, low, [value["high"] for _, value in found], color=colour, alpha=0.18, lw=0)


def _control(axis: Any, name: str, curve: Sequence[Row], colour: str) -> None:
    found = [(row["steps"], row["shuffled_f1"]) for row in curve if row["shuffled_f1"] is not None]
    if found:
        axis.plot(*zip(*found, strict=True), "--", lw=1, color=colour, label=f"{name}, shuffled sound")


def _frame(axis: Any, title: str, scale: str, steps: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(title=title, xlabel="steps")
    if not axis.lines:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
        axis.set_axis_off()
        return
    if scale == "log":
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif scale == "share":
        axis.set_ylim(0, 1.03)
    if steps:
        axis.set_xscale("log")
        # A number that would stand on its neighbour is left out.
        shown = [n for i, n in enumerate(steps) if i + 1 == len(steps) or steps[i + 1] > 1.3 * n]
        axis.set_xticks(shown, [str(n) for n in shown])
        axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)


def _distance(row: Row, name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = row["frechet"][name]
    return None if found is None else {**found, "value": found["corrected"]}


def _bare(value: float | None) -> Mapping[str, Any] | None:
    return None if value is None else {"value": value}
