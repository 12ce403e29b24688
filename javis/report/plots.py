"""Plots as inline SVG, in colours of the page's style sheet, so that they are readable in light and in dark.

Every plot is 420 units wide, which leaves its words readable on a phone, has a title that says what it shows in
numbers, and tells its lines apart by dashes as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from javis.report.html import Content, Markup, tag

Scale = Callable[[float], float]

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
POINTS = 240  # of a line; more are put together
COLOURS = 6


class Line(NamedTuple):
    """A line of a chart; ``spread`` holds the lowest and highest value at each x where there are some."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: tuple[Sequence[float], Sequence[float]] | None = None


class Interval(NamedTuple):
    """A figure with the ends of its interval, and a bound or control to compare with."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    mark: float | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count`` of them, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: ``22.8k``, ``0.25``, ``1e-05``."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> Line:
    """A line of at most ``points`` points, each the mean of its stretch between the lowest and the highest of it.

    What is not finite is left out.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) <= points:
        return Line("", [a for a, _ in pairs], [b for _, b in pairs])
    parts = np.array_split(np.array(pairs, dtype=np.float64), points)
    spread = ([float(part[:, 1].min()) for part in parts], [float(part[:, 1].max()) for part in parts])
    return Line("", [float(part[:, 0].mean()) for part in parts], [float(part[:, 1].mean()) for part in parts], spread)


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str = "") -> Markup:
    """Lines over a common axis, with a legend; logarithmic upwards where values reach over a factor of 50.

    A line without a finite value is left out; without any the chart is a sentence.
    """
    shown = [(line, thinned(line.x, line.y)) for line in lines]
    shown = [(Line(line.label, thin.x, thin.y, line.spread or thin.spread), thin) for line, thin in shown if thin.x]
    if not shown:
        return tag("p", f"{title}: no finite value.", class_="note")
    drawn = [line for line, _ in shown]
    values = [v for line in drawn for part in (line.y, *(line.spread or ())) for v in part if math.isfinite(v)]
    steps = [v for line in drawn for v in line.x]
    logarithmic = min(values) > 0 and max(values) / min(values) > 50
    first, last = min(steps), max(steps)
    ends = (first, last) if last > first else (first - 1, first + 1)  # a single step stands in the middle
    scale_x = _scale(*ends, LEFT, WIDTH - RIGHT)
    scale_y, y_ticks = _upwards(min(values), max(values), logarithmic)
    parts: list[Content] = [_grid_y(scale_y, y_ticks), _grid_x(scale_x, ticks(first, last, 4))]
    for i, line in enumerate(drawn):
        if line.spread is not None:
            below, above = (list(zip(line.x, values, strict=True)) for values in line.spread)
            edge = [*above, *reversed(below)]
            area = " ".join(f"{scale_x(a):.1f},{scale_y(b):.1f}" for a, b in edge)
            parts.append(tag("polygon", points=area, class_=f"band c{i % COLOURS}"))
        path = " ".join(f"{scale_x(a):.1f},{scale_y(b):.1f}" for a, b in zip(line.x, line.y, strict=True))
        parts.append(tag("polyline", points=path, class_=f"curve c{i % COLOURS}"))
        if len(line.x) <= 12:
            parts += [
                tag("circle", cx=f"{scale_x(a):.1f}", cy=f"{scale_y(b):.1f}", r=3, class_=f"dot c{i % COLOURS}")
                for a, b in zip(line.x, line.y, strict=True)
            ]
    parts.append(_words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    said = "; ".join(_told(line) for line in drawn)
    label = f"{y_label} (logarithmic)" if logarithmic else y_label
    return _figure(title, f"{title}. {said}.", parts, HEIGHT, legend=[line.label for line in drawn], note=label)


def interval_chart(rows: Sequence[Interval], *, title: str, mark: str = "") -> Markup:
    """Figures with their intervals, one below the other; ``mark`` names the tick of rows that have one."""
    rows = [row for row in rows if math.isfinite(row.value)]
    if not rows:
        return tag("p", f"{title}: no finite value.", class_="note")
    numbers = [v for row in rows for v in row[1:] if isinstance(v, (int, float)) and math.isfinite(v)]
    low, high = min([*numbers, 0.0]) if min(numbers) < 0.5 * max(numbers) else min(numbers), max(numbers)
    if low >= 0 and high <= 1 and high > 0.3:
        low, high = (0.0 if low < 0.5 else math.floor(low * 10) / 10), 1.0
    if low == high:
        low, high = low - 0.5, high + 0.5
    names, step = 150, 24
    scale = _scale(low, high, names, WIDTH - 16)
    height = 14 + step * len(rows) + 26
    parts: list[Content] = [_grid_x(scale, ticks(low, high, 4), bottom=height - 26, top=4)]
    for i, row in enumerate(rows):
        y = 14 + step * i + step / 2 - 6
        name = row.label if len(row.label) <= 24 else row.label[:23] + "…"
        parts.append(_words(names - 8, y + 4, name, anchor="end"))
        if row.low is not None and row.high is not None:
            parts.append(
                tag("line", x1=f"{scale(row.low):.1f}", x2=f"{scale(row.high):.1f}", y1=y, y2=y, class_="whisker c0")
            )
        if row.mark is not None:
            at = f"{scale(row.mark):.1f}"
            parts.append(tag("line", x1=at, x2=at, y1=y - 7, y2=y + 7, class_="mark c1"))
        parts.append(tag("circle", cx=f"{scale(row.value):.1f}", cy=y, r=4, class_="dot c0"))
    said = "; ".join(
        f"{row.label} {row.value:.3g}"
        + ("" if row.low is None or row.high is None else f" ({row.low:.3g} to {row.high:.3g})")
        for row in rows[:30]
    )
    return _figure(title, f"{title}. {said}.", parts, height, legend=[], note=f"tick: {mark}" if mark else "")


def histogram(
    values: Sequence[float], *, title: str, x_label: str, reach: tuple[float, float], bins: int = 25
) -> Markup:
    """How often values occur, between the ends of ``reach`` or, where some lie beyond, as far as they go."""
    finite = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if not len(finite):
        return tag("p", f"{title}: no finite value.", class_="note")
    low, high = min(reach[0], float(finite.min())), max(reach[1], float(finite.max()))
    counts, edges = np.histogram(finite, bins=bins, range=(low, high))
    scale_x = _scale(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT)
    scale_y = _scale(0.0, float(counts.max()), HEIGHT - BOTTOM, TOP)
    whole = [t for t in ticks(0.0, float(counts.max()), 4) if t == int(t)]
    parts: list[Content] = [_grid_y(scale_y, whole), _grid_x(scale_x, ticks(float(edges[0]), float(edges[-1]), 5))]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            x, y = scale_x(float(left)), scale_y(float(count))
            width = max(1.0, scale_x(float(right)) - x - 1)
            sides = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}"}
            parts.append(tag("rect", **sides, height=f"{HEIGHT - BOTTOM - y:.1f}", class_="bar c0"))
    parts.append(_words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    said = f"{len(finite)} values, mean {finite.mean():.3g}, from {finite.min():.3g} to {finite.max():.3g}"
    return _figure(title, f"{title}. {said}.", parts, HEIGHT, legend=[], note=said)


def timeline(seconds: float, marks: Mapping[str, Sequence[float]], label: str) -> Markup:
    """Times on the axis of a clip, a row for each name; the script moves a line along while the clip plays."""
    left, row = 52, 20
    height = row * len(marks) + 20
    scale = _scale(0.0, max(seconds, 1e-6), left, WIDTH - 10)
    parts: list[Content] = [_grid_x(scale, ticks(0.0, seconds, 4), bottom=height - 18, top=2)]
    said = []
    for i, (name, times) in enumerate(marks.items()):
        y = row * i + row / 2 + 2
        parts.append(_words(left - 8, y + 4, name, anchor="end"))
        parts.append(tag("line", x1=left, x2=WIDTH - 10, y1=y, y2=y, class_="axis"))
        for time in times:
            at = f"{scale(time):.1f}"
            parts.append(tag("line", x1=at, x2=at, y1=y - 8, y2=y + 8, class_=f"event c{i % COLOURS}"))
        said.append(f"{name} at {', '.join(f'{t:.2f}' for t in times)} s" if times else f"{name}: nothing")
    parts.append(tag("line", x1=left, x2=left, y1=0, y2=height - 18, class_="playhead"))
    svg = tag(
        "svg",
        tag("title", f"{label}. {'; '.join(said)}."),
        parts,
        viewbox=f"0 0 {WIDTH} {height}",
        role="img",
        class_="timeline",
        data_left=left,
        data_right=WIDTH - 10,
        data_seconds=f"{seconds:.6g}",
    )
    return svg


# --- parts of them ----------------------------------------------------------------------------------------------------


def _scale(low: float, high: float, first: float, last: float) -> Scale:
    span = high - low if high > low else 1.0
    return lambda value: first + (last - first) * (value - low) / span


def _upwards(low: float, high: float, logarithmic: bool) -> tuple[Scale, list[float]]:
    """Scale and ticks of the upright axis."""
    if logarithmic:
        inner = _scale(math.log10(low), math.log10(high), HEIGHT - BOTTOM, TOP)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [10.0**p for p in powers]
        if len(marks) <= 3:
            marks = [factor * 10.0**p for p in powers for factor in (1, 2, 5)]
        return (lambda value: inner(math.log10(max(value, low)))), [m for m in marks if low <= m <= high]
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin * (low - margin >= 0 or low < 0), high + margin
    return _scale(low, high, HEIGHT - BOTTOM, TOP), ticks(low, high, 5)


def _grid_y(scale: Scale, marks: Sequence[float]) -> list[Markup]:
    parts = []
    for mark in marks:
        y = f"{scale(mark):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(_words(LEFT - 6, float(y) + 4, short(mark), anchor="end"))
    return parts


def _grid_x(scale: Scale, marks: Sequence[float], bottom: float = HEIGHT - BOTTOM, top: float = TOP) -> list[Markup]:
    parts = []
    for mark in marks:
        x = f"{scale(mark):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(_words(float(x), bottom + 14, short(mark)))
    return parts


def _words(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _told(line: Line) -> str:
    best = min(range(len(line.y)), key=lambda i: line.y[i])
    return (
        f"{line.label} from {line.y[0]:.4g} at {short(line.x[0])} to {line.y[-1]:.4g} at {short(line.x[-1])}, "
        f"lowest {line.y[best]:.4g} at {short(line.x[best])}"
    )


def _figure(
    title: str, said: str, parts: Sequence[Content], height: float, *, legend: Sequence[str], note: str
) -> Markup:
    keys = [
        tag("li", tag("svg", tag("line", x1=0, x2=22, y1=5, y2=5, class_=f"curve c{i % COLOURS}"), viewbox="0 0 22 10",
                      class_="key", aria_hidden="true"), label)
        for i, label in enumerate(legend)
        if len(legend) > 1
    ]  # fmt: skip
    svg = tag("svg", tag("title", said), parts, viewbox=f"0 0 {WIDTH} {height:g}", role="img")
    return tag(
        "figure",
        tag("figcaption", title, tag("span", f" {note}", class_="note") if note else None),
        tag("ul", keys, class_="legend") if keys else None,
        svg,
    )
