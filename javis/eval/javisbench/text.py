"""Results as tables of a terminal, and as a row of a LaTeX table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from javis.eval.javisbench.metrics import METRICS

if TYPE_CHECKING:
    from rich.console import Console

DIGITS = {"fvd": 1, "kvd": 2, "fad": 2, "offset_ms": 1, "builtin_picture": 2, "builtin_sound": 2}
PAPER = ("fvd", "kvd", "fad", "ib_tv", "ib_ta", "clip", "clap", "ib_av", "cavp", "avh_score", "javis_score", "desync")
OURS = ("av_align", "event_f1_62.5ms", "offset_ms", "caption")
LISTED = 3  # names of each kind of problem on a terminal


def number(value: float | None, name: str) -> str:
    """A figure with as many digits as its metric deserves; "-" for None."""
    return "-" if value is None else f"{value:.{DIGITS.get(name, 3)}f}"


def interval(figure: Mapping[str, Any], name: str) -> str:
    """The ends of the 95 % interval in brackets; empty if there is none."""
    if figure["low"] is None:
        return ""
    return f"[{number(figure['low'], name)}, {number(figure['high'], name)}]"


def notes(figure: Mapping[str, Any]) -> str:
    """What a reader has to know of a figure, beside its interval."""
    said = []
    if figure.get("corrected") is not None:
        said.append("interval of the value without its bias of few clips")
    if figure.get("rank_deficient"):
        said.append("fewer clips than dimensions")
    return "; ".join(said)


def render(results: Mapping[str, Any], console: Console) -> None:
    """Figures, tables of categories, what was skipped and what was wrong."""
    from rich.table import Table

    fingerprint = results["fingerprint"]
    console.print(
        f"{results['name']}: {results['evaluated']} of {results['asked']} samples, protocol {fingerprint['protocol']}, "
        f"fingerprint {fingerprint['id']}"
    )
    table = Table("metric", "", "value", "95 %", "shuffled", "n", "note", title="All clips", title_justify="left")
    for name, figure in results["figures"].items():
        arrow = "higher" if figure["better"] == "higher" else "lower"
        shuffled = number(figure["shuffled"], name)
        table.add_row(figure["label"], arrow, number(figure["value"], name), interval(figure, name), shuffled,
                      str(figure["n"]), notes(figure))  # fmt: skip
    console.print(table)
    for aspect, categories in by_aspect(results).items():
        shown = [name for name in results["figures"] if any(name in found for found in categories.values())]
        table = Table(aspect, *(results["figures"][name]["label"] for name in shown), title_justify="left")
        for category, found in categories.items():
            cells = [number(found[name]["value"], name) if name in found else "-" for name in shown]
            most = max((figure["n"] for figure in found.values()), default=0)
            table.add_row(f"{category} ({most})", *cells)
        console.print(table)
    for name, reason in results["skipped"].items():
        console.print(f"skipped {name}: {reason}", soft_wrap=True, markup=False, highlight=False)
    for kind, problem in results["problems"].items():
        console.print(problem_line(kind, problem), soft_wrap=True, markup=False, highlight=False)


def problem_line(kind: str, problem: Mapping[str, Any]) -> str:
    """One kind of problem: how many, and the first few names."""
    names = list(problem["names"].items())
    shown = "; ".join(f"{name}: {reason}" if reason else name for name, reason in names[:LISTED])
    more = f"; and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{kind}: {problem['count']} ({shown}{more})"


def by_aspect(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """aspect -> category -> metric -> figure."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, aspects in results["categories"].items():
        for aspect, categories in aspects.items():
            for category, figure in categories.items():
                found.setdefault(aspect, {}).setdefault(category, {})[name] = figure
    return found


def latex(results: Mapping[str, Any]) -> str:
    """A row of a LaTeX table, with its columns in a comment above; "--" for what was skipped."""
    labels = {metric.name: (metric.label, metric.better) for metric in METRICS}
    columns = [*PAPER, *(name for name in OURS if name in results["figures"])]
    head = " & ".join(f"{labels[c][0]} $\\{'up' if labels[c][1] == 'higher' else 'down'}arrow$" for c in columns)
    cells = []
    for name in columns:
        figure = results["figures"].get(name)
        value = None if figure is None else figure["value"]
        cells.append("--" if value is None else number(value, name))
    title = re.sub(r"([\\{}$&#%_^~])", _escaped, results["name"])
    fingerprint = results["fingerprint"]
    about = f"% {results['evaluated']} of {results['asked']} samples, protocol {fingerprint['protocol']}, "
    return f"{about}fingerprint {fingerprint['id']}\n% Model & {head} \\\\\n{title} & {' & '.join(cells)} \\\\\n"


def _escaped(found: re.Match[str]) -> str:
    words = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    return words.get(found[1], "\\" + found[1])
