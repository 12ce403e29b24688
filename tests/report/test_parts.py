"""Escaping, scales and plots of the page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from javis.report.evaluations import _javisbench
from javis.report.html import document, escaped, join, table, tag
from javis.report.plots import Interval, Line, histogram, interval_chart, line_chart, thinned, ticks, timeline
from javis.report.values import Values, cell


def shapes(svg: str) -> ElementTree.Element:
    """The plot as XML, which it must be, too: an element that is not closed swallows the rest of a plot."""
    return ElementTree.fromstring(re.sub(r"^<figure>.*?(?=<svg viewBox=\"0 0 420)", "", svg).removesuffix("</figure>"))


def test_text_is_escaped_wherever_it_stands() -> None:
    hostile = "</td><script>alert(1)</script>\"' \x00\ud800"
    made = tag("td", hostile, ["&", 1], title=hostile)
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
            seen.extend([name, *(value or "" for _, value in attributes)])

        def handle_data(self, data: str) -> None:
            seen.append(data)

    reader = Reader()
    reader.feed(made)
    reader.close()
    text = hostile.replace("\x00", "�").replace("\ud800", "�")
    assert seen[0] == "td" and seen[1] == text and "".join(seen[2:]) == text + "&1"
    assert join(escaped("<")) == "&lt;" and join("&lt;") == "&amp;lt;"
    made.encode()  # can be written


def test_attributes_that_are_no_text() -> None:
    assert tag("video", controls=True, loop=False, poster=None, class_="a", data_x=1) == (
        '<video controls class="a" data-x="1"></video>'
    )
    assert tag("line", x1=1) == '<line x1="1"/>'


def test_a_document_allows_its_own_style_and_script_only() -> None:
    text = document("t<", tag("p", "x"), style="p{}", script="let a;")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and policy[1].count("sha256-") == 2
    assert "unsafe" not in policy[1] and "http" not in policy[1].replace("http-equiv", "")
    assert text.index("Content-Security-Policy") < text.index("<style")
    with pytest.raises(ValueError, match="end its element"):
        document("t", "x", style="</style>", script="")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 22800, [0, 5000, 10000, 15000, 20000]),
     (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]), (3, 3, [3])],
)  # fmt: skip
def test_ticks_are_round_and_within(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_long_line_keeps_its_extremes_and_its_mean() -> None:
    values = [1.0] * 5000
    values[2500] = 100.0
    values[100] = math.nan
    line = thinned(list(range(5000)), values, points=100)
    assert len(line.x) == 100 and line.spread is not None and max(line.spread[1]) == 100.0
    assert sum(line.y) / 100 == pytest.approx((4998 + 100) / 4999, rel=1e-3)
    assert thinned([1, 2], [math.inf, 5.0]).y == [5.0]


def test_a_line_chart_places_points_where_they_belong() -> None:
    svg = shapes(line_chart([Line("a", [0, 10], [1.0, 3.0])], title="t", x_label="step"))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").attrib["points"].split()]  # type: ignore[union-attr]
    (x0, y0), (x1, y1) = points
    assert (x0, x1) == (52.0, 408.0) and y0 > y1  # up is down in SVG
    names = [text for text in svg.findall("text") if text.attrib["text-anchor"] == "end"]
    grid = {text.text: float(text.attrib["y"]) - 4 for text in names}
    assert grid["1"] == pytest.approx(y0, abs=0.2) and grid["3"] == pytest.approx(y1, abs=0.2)
    title = svg.find("title")
    assert title is not None and "a from 1 at 0 to 3 at 10" in str(title.text)


def test_wide_ranges_are_logarithmic_and_nothing_finite_is_a_sentence() -> None:
    made = line_chart([Line("a", [1, 2, 3], [1.0, 10.0, 1000.0])], title="t", x_label="step", y_label="loss")
    assert "(logarithmic)" in made
    points = [float(p.split(",")[1]) for p in shapes(made).find("polyline").attrib["points"].split()]  # type: ignore[union-attr]
    assert (points[0] - points[1]) * 2 == pytest.approx(points[1] - points[2], abs=0.3)
    assert line_chart([Line("a", [1], [math.nan])], title="t<", x_label="x").startswith("<p")
    assert "no finite value" in histogram([math.nan], title="t", x_label="x", reach=(0, 1))
    shapes(line_chart([Line("a", [300], [1.0])], title="t", x_label="step"))


def test_intervals_histogram_and_timeline() -> None:
    svg = shapes(interval_chart([Interval("a", 0.5, 0.25, 0.75, 0.0), Interval("b", 1.0)], title="t", mark="shuffled"))
    dots = [float(dot.attrib["cx"]) for dot in svg.findall("circle")]
    whisker = next(line for line in svg.findall("line") if "whisker" in line.attrib["class"])
    left, right = float(whisker.attrib["x1"]), float(whisker.attrib["x2"])
    assert dots[0] == pytest.approx((left + right) / 2, abs=0.2)
    assert dots[1] - dots[0] == pytest.approx(right - left, abs=0.2)
    bars = shapes(histogram([0.1, 0.1, 0.9], title="t", x_label="x", reach=(0, 1), bins=10)).findall("rect")
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert len(heights) == 2 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    axis = ElementTree.fromstring(timeline(2.0, {"seen": [1.0], "heard": []}, "clip"))
    event = next(line for line in axis.findall("line") if "event" in line.attrib["class"])
    assert float(event.attrib["x1"]) == pytest.approx((52 + 410) / 2)
    assert "heard: nothing" in str(axis.find("title").text)  # type: ignore[union-attr]


def test_json_of_any_shape_becomes_tables() -> None:
    data = {
        "n": 3, "device": "left to the table on top", "none": None, "names": ["a", "<b>"],
        "kinds": {"x": {"rate": 0.5, "low": 0.25, "high": 0.75, "clips": 9}, "y": {"rate": 1, "low": 0.5, "high": 1}},
        "rows": [{"a": 1, "deep": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}, {"a": 2}],
    }  # fmt: skip
    made = Values().show(data)
    assert "0.5 [0.25, 0.75]" in made and "<figcaption>kinds" in made and "left to the table" not in made
    assert "&lt;b&gt;" in made and "<b>" not in made
    assert cell({"value": 0.25, "low": None}) == "0.25" and cell(True) == "yes" and cell(None) == "–"
    assert cell({"value": None, "why": "<i>"}) == "–" and cell(math.nan) == "nan"
    assert 'class="words"' in table(["a", "b"], [["x", 1]], caption="c")


def test_an_interval_stands_behind_the_value_that_it_is_of() -> None:
    """That of a distance of few clips is around the value without its bias, which need not hold the plain one."""
    assert cell({"value": 0.95, "low": 0.89, "high": 0.99, "shuffled": 0.25}) == "0.95 [0.89, 0.99] (shuffled 0.25)"
    biased = {"value": 5.77, "low": -1.73, "high": 3.75, "corrected": 1.01}
    assert cell(biased) == "5.77, without bias 1.01 [-1.73, 3.75]"


def test_the_control_of_javisbench_is_told_once() -> None:
    figure = {"label": "F1", "better": "higher", "value": 0.95, "low": 0.89, "high": 0.99, "shuffled": 0.25, "n": 16}
    page = str(_javisbench([{"evaluated": 20, "asked": 20, "figures": {"f1": figure}}]))
    assert page.count("0.25") == 1 and "0.95 [0.89, 0.99]" in page
