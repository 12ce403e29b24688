"""Json values as tables, whatever evaluation they are of; figures with an interval also as plots.

A figure is an object with ``value`` or ``rate`` and, if it has one, the interval ``low`` to ``high``. Objects of the
same shape become the rows of one table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from javis.report.html import Markup, details, join, table, tag
from javis.report.plots import Interval, interval_chart
from javis.report.read import ENVIRONMENT

DEPTH = 6  # of nested objects; below it json is shown as it is
ROWS, ITEMS = 200, 24  # of a table, and of a list in one cell
PLOTS = 6  # of one evaluation
SMALL = ("about", "better", "label", "n", "clips", "chance", "shuffled", "corrected", "n_real")


def number(value: float) -> str:
    """A number for people: four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009") if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def value_of(figure: Any) -> float | None:
    """The number of a figure; None if it is no figure, or is undefined."""
    if isinstance(figure, Mapping):
        for name in ("value", "rate"):
            if isinstance(figure.get(name), (int, float)):
                return float(figure[name])
    return None


def is_figure(data: Any) -> bool:
    """Whether ``data`` is a figure that fits into one cell."""
    if not isinstance(data, Mapping) or not ({"value", "rate"} & set(data)):
        return False
    return all(value is None or isinstance(value, (str, int, float)) for value in data.values())


def cell(data: Any) -> Markup:
    """One value in a cell of a table."""
    if data is None:
        return join("–")
    if is_figure(data):
        value = value_of(data)
        ends = [data.get("low"), data.get("high")]
        told = "–" if value is None else number(value)
        if isinstance(data.get("corrected"), (int, float)):  # the interval is around the value without its bias
            told += f", without bias {number(data['corrected'])}"
        if all(isinstance(end, (int, float)) for end in ends):
            told += f" [{number(ends[0])}, {number(ends[1])}]"
        if isinstance(data.get("shuffled"), (int, float)):
            told += f" (shuffled {number(data['shuffled'])})"
        return join(told)
    if isinstance(data, (bool, int, float)):
        return join(number(data))
    if isinstance(data, list):
        shown = ", ".join(str(cell_text(item)) for item in data[:ITEMS])
        return join(shown + (f", … {len(data) - ITEMS} more" if len(data) > ITEMS else ""))
    return join(str(data))


def cell_text(data: Any) -> str:
    """An item of a list."""
    if isinstance(data, (bool, int, float)):
        return number(data)
    return "–" if data is None else str(data)


def is_plain(data: Any) -> bool:
    """Whether ``data`` fits into a cell."""
    if isinstance(data, list):
        return all(item is None or isinstance(item, (str, int, float)) for item in data)
    return not isinstance(data, Mapping) or is_figure(data)


def words_of(key: str) -> str:
    """A key for people."""
    return str(key).replace("_", " ")


class Values:
    """Tables and plots of one evaluation; ``plots`` counts down."""

    def __init__(self, plots: int = PLOTS) -> None:
        self.plots = plots

    def show(self, data: Any, name: str = "", depth: int = 0) -> Markup:
        """Everything in ``data``, but for what `environment_of` tells."""
        if isinstance(data, Mapping):
            return self._object(data, name, depth)
        if isinstance(data, list) and data and all(isinstance(item, Mapping) for item in data):
            return self._rows({str(i + 1): item for i, item in enumerate(data)}, name, depth)
        return tag("p", words_of(name), ": " if name else None, cell(data))

    def _object(self, data: Mapping[str, Any], name: str, depth: int) -> Markup:
        if depth >= DEPTH:
            return tag("pre", str(dict(data))[:4000])
        left = {key: value for key, value in data.items() if key not in ENVIRONMENT or depth}
        plain = {key: value for key, value in left.items() if is_plain(value)}
        figures = {key: value for key, value in plain.items() if is_figure(value)}
        facts = {key: value for key, value in plain.items() if key not in figures}
        parts: list[Markup] = []
        if facts:
            parts.append(pairs(facts, words_of(name) or "facts", titled=True))
        if figures:
            parts.append(self._rows(figures, name, depth))
        for key, value in left.items():
            if key in plain:
                continue
            title = tag(f"h{min(6, 4 + depth)}", words_of(key))
            if isinstance(value, Mapping) and _alike(value):
                parts += [title, self._rows(value, key, depth + 1)]
            else:
                parts += [title, self.show(value, key, depth + 1)]
        return join(parts)

    def _rows(self, data: Mapping[str, Any], name: str, depth: int) -> Markup:
        """Objects of the same shape as a table, and their first figure as a plot."""
        if all(is_figure(value) for value in data.values()):
            rows = [[words_of(value.get("label") or key), cell(value)] for key, value in data.items()]
            extra = [key for key in SMALL[3:6] if any(value.get(key) is not None for value in data.values())]
            for row, value in zip(rows, data.values(), strict=True):
                row += [cell(value.get(key)) for key in extra]
            shown = table(
                ["figure", "value and 95 % interval", *extra],
                rows[:ROWS],
                caption=words_of(name) or "figures",
                titled=True,
            )
            return join([shown, self._plot(data, words_of(name))])
        columns = list(dict.fromkeys(key for row in data.values() for key in row))
        flat = [key for key in columns if all(is_plain(row.get(key)) for row in data.values())]
        flat = [key for key in flat if key not in ENVIRONMENT]
        words = {0} | {
            i + 1 for i, key in enumerate(flat) if any(isinstance(row.get(key), (str, list)) for row in data.values())
        }
        rows = [[words_of(key), *[cell(row.get(column)) for column in flat]] for key, row in list(data.items())[:ROWS]]
        caption = words_of(name) or "rows"
        if len(data) > ROWS:
            caption += f" (the first {ROWS} of {len(data)})"
        parts = [table(["", *map(words_of, flat)], rows, caption=caption, text=words, titled=len(data) <= ROWS)]
        for column in flat:
            figures = {key: row.get(column) for key, row in data.items() if is_figure(row.get(column))}
            if len(figures) >= 2:
                parts.append(self._plot(figures, f"{words_of(name)}: {words_of(column)}"))
                break
        nested = [key for key in columns if key not in flat]
        for key, row in list(data.items())[:ITEMS]:
            inner = {column: row[column] for column in nested if column in row}
            if inner:
                parts.append(
                    details(f"{words_of(key)}: {', '.join(map(words_of, inner))}", self.show(inner, key, depth + 1))
                )
        return join(parts)

    def _plot(self, figures: Mapping[str, Any], title: str) -> Markup:
        rows = [
            Interval(
                words_of(figure.get("label") or key),
                value,
                figure.get("low"),
                figure.get("high"),
                figure.get("shuffled"),
            )
            for key, figure in figures.items()
            if (value := value_of(figure)) is not None
        ]
        ranged = [row for row in rows if row.low is not None]
        if len(ranged) < 2 or self.plots <= 0 or len(rows) > 40 or _apart(rows):
            return join(None)
        self.plots -= 1
        mark = "shuffled" if any(row.mark is not None for row in rows) else ""
        return tag("div", interval_chart(rows, title=title, mark=mark), class_="plots")


def _alike(data: Mapping[str, Any]) -> bool:
    """Whether the values are objects that make the rows of one table."""
    rows = list(data.values())
    if not rows or not all(isinstance(row, Mapping) and row for row in rows):
        return False
    if all(is_figure(row) for row in rows):
        return True
    if len(rows) < 2:
        return False
    shared = set(rows[0]).intersection(*rows[1:])
    return len(shared) * 2 >= max(len(row) for row in rows) and any(is_plain(rows[0][key]) for key in shared)


def _apart(rows: Sequence[Interval]) -> bool:
    """Whether figures are of sizes so different that one axis shows nothing."""
    sizes = [abs(row.value) for row in rows if row.value]
    return bool(sizes) and max(sizes) > 200 * min(sizes) and max(sizes) > 10


def pairs(facts: Mapping[str, Any], caption: str, *, titled: bool = False) -> Markup:
    """Names and values."""
    shown = table(
        [], [[words_of(key), cell(value)] for key, value in facts.items()], caption=caption, text=(0, 1), titled=titled
    )
    return tag("div", shown, class_="pairs")
