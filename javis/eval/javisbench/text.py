"""Results as tables of a terminal, and as a row of a LaTeX table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from javis.eval.javisbench.metrics import BY_NAME

if TYPE_CHECKING:
    from rich.console import Console

DIGITS = {"fvd": 1, "kvd": 2, "fad": 2, "offset_ms": 1, "builtin_picture": 2, "builtin_sound": 2}
PAPER = ("fvd", "kvd", "fad", "ib_tv", "ib_ta", "clip", "clap", "ib_av", "cavp", "avh_score", "javis_score", "desync")
OURS = ("av_align", "sync_score", "event_f1_62.5ms", "offset_ms", "caption")
LISTED = 3  # names of each kind of problem on a terminal
DAGGER = "†"  # after a distance of fewer clips than dimensions
WIDTH = 150  # of tables that go to a file


def number(value: float | None, name: str) -> str:
    """A figure with as many digits as its metric deserves; "-" for None."""
    return "-" if value is None else f"{value:.{DIGITS.get(name, 3)}f}"


def interval(figure: Mapping[str, Any], name: str) -> str:
    """The ends of the 95 % interval in brackets; empty if there is none."""
    if figure["low"] is None:
        return ""
    return f"[{number(figure['low'], name)}, {number(figure['high'], name)}]"


def notes(figure: Mapping[str, Any], name: str) -> str:
    """What a reader has to know of a figure, beside its interval."""
    said = []
    if figure.get("corrected") is not None:
        said.append(f"{number(figure['corrected'], name)} without the bias of few clips, and its interval")
    if figure.get("rank_deficient"):
        said.append(f"{DAGGER} fewer clips than dimensions")
    return "; ".join(said)


def value_of(figure: Mapping[str, Any], name: str) -> str:
    """The value, with a mark if it is of too few clips."""
    return number(figure["value"], name) + (DAGGER if figure.get("rank_deficient") else "")


def in_categories(results: Mapping[str, Any]) -> list[str]:
    """Names of the metrics that tables of categories have as columns."""
    return [name for name in results["figures"] if results["categories"].get(name) and not BY_NAME[name].is_detail]


def render(results: Mapping[str, Any], console: Console) -> None:
    """Figures, tables of categories, what was skipped and what was wrong."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    fingerprint = results["fingerprint"]
    console.print(
        f"{results['name']}: {results['evaluated']} of {results['asked']} samples, protocol {fingerprint['protocol']}, "
        f"fingerprint {fingerprint['id']}"
    )
    table = Table("metric", "better", "value", "95 %", "shuffled", "clips", "note", box=box.SIMPLE_HEAD)
    for name, figure in results["figures"].items():
        shuffled = number(figure["shuffled"], name)
        cells = (value_of(figure, name), interval(figure, name), shuffled, str(figure["n"]), notes(figure, name))
        table.add_row(figure["label"], figure["better"], *cells)
    console.print(table)
    names = in_categories(results)
    if names:
        table = Table("category", "clips", box=box.SIMPLE_HEAD)
        for name in names:
            table.add_column(results["figures"][name]["label"], justify="right", no_wrap=True)
        for aspect, categories in by_aspect(results).items():
            table.add_section()
            table.add_row(f"[bold]{escape(aspect)}[/bold]")
            for category, found in categories.items():
                most = max((figure["n"] for figure in found.values()), default=0)
                values = [value_of(found[name], name) if name in found else "-" for name in names]
                table.add_row(f"  {escape(category)}", str(most), *values)
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
    columns = [*PAPER, *(name for name in OURS if name in results["figures"])]
    arrows = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}
    head = " & ".join(f"{BY_NAME[name].label} {arrows[BY_NAME[name].better]}" for name in columns)
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
