"""Results as one HTML file that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from javis.eval.javisbench.clips import StoredClip
from javis.eval.javisbench.harness import Evaluated
from javis.eval.javisbench.measure import SYNC
from javis.eval.javisbench.metrics import BY_NAME
from javis.eval.javisbench.text import by_aspect, in_categories, interval, notes, number, value_of

SHOWN = 24  # clips with pictures
FRAMES, HEIGHT = 8, 64  # of a strip; pixels
PLOTTED = ("event_f1_62.5ms", "javis_score", "ib_av", "caption")  # at most, of those that there are

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --seen: #2a7de1; --heard: #d2691e; --mark: #888; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; } td.text { white-space: normal; }
tr.aspect th { text-align: left; background: var(--soft); } .small { font-size: .85rem; opacity: .75; }
.clip { border-top: 1px solid var(--line); padding: .6rem 0; } .clip img { display: block; max-width: 100%; }
.plots { display: flex; flex-wrap: wrap; gap: 2rem; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
pre { overflow-x: auto; background: var(--soft); padding: .75rem; } details { margin: .25rem 0; }
"""


def page(evaluated: Evaluated) -> str:
    """The page of an evaluation."""
    results = evaluated.results
    fingerprint = results["fingerprint"]
    title = f"JavisBench: {results['name']}"
    head = (
        f"<h1>{escape(title)}</h1><p class=small>{results['evaluated']} of {results['asked']} samples &middot; "
        f"protocol {escape(str(fingerprint['protocol']))} &middot; fingerprint {escape(str(fingerprint['id']))}</p>"
    )
    sections = [
        head,
        _figures(results),
        _skipped(results["skipped"]),
        _plots(results),
        _categories(results),
        _problems(results["problems"]),
        _clips(evaluated.clips),
        f"<h2>Fingerprint</h2><pre>{escape(json.dumps(fingerprint, indent=1))}</pre>",
    ]
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )


def _figures(results: Mapping[str, Any]) -> str:
    rows = []
    for name, figure in results["figures"].items():
        arrow = "&uarr;" if figure["better"] == "higher" else "&darr;"
        cells = [
            f"<td>{escape(figure['label'])} {arrow}",
            f"<td>{value_of(figure, name)}",
            f"<td>{interval(figure, name)}",
            f"<td>{number(figure['shuffled'], name)}",
            f"<td>{figure['n']}",
            f"<td class=text>{escape('; '.join(filter(None, (figure['about'], notes(figure, name)))))}",
        ]
        rows.append("<tr>" + "".join(cells))
    header = "<tr><th>metric<th>value<th>95 % interval<th>shuffled<th>clips<th class=text>what"
    return (
        f"<h2>All clips</h2><div class=scroll><table>{header}{''.join(rows)}</table></div>"
        "<p class=small>Intervals: bootstrap over clips; jackknife for distances. Shuffled: each picture with the "
        "sound (or text) of another clip.</p>"
    )


def _skipped(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    items = "".join(
        f"<tr><td>{escape(BY_NAME[name].label)}<td class=text>{escape(why)}" for name, why in skipped.items()
    )
    return f"<h2>Skipped</h2><div class=scroll><table>{items}</table></div>"


def _categories(results: Mapping[str, Any]) -> str:
    tables = by_aspect(results)
    names = in_categories(results)
    if not tables or not names:
        return ""
    rows = []
    for aspect, categories in tables.items():
        rows.append(f"<tr class=aspect><th colspan={len(names) + 2}>{escape(aspect)}")
        for category, found in categories.items():
            clips = max(figure["n"] for figure in found.values())
            cells = "".join(
                f"<td title='{interval(found[name], name)}'>{value_of(found[name], name)}" if name in found
                else "<td>-"
                for name in names
            )  # fmt: skip
            rows.append(f"<tr><td>{escape(category)}<td>{clips}{cells}")
    header = "<tr><th>category<th>clips" + "".join(f"<th>{escape(results['figures'][name]['label'])}" for name in names)
    return f"<h2>Categories</h2><div class=scroll><table>{header}{''.join(rows)}</table></div>"


# --- intervals of the categories as a drawing ---------------------------------------------------------------------


def _plots(results: Mapping[str, Any]) -> str:
    drawn = [name for name in PLOTTED if results["categories"].get(name)][:2]
    if not drawn:
        return ""
    return f"<h2>By category</h2><div class=plots>{''.join(_plot(results, name) for name in drawn)}</div>"


def _plot(results: Mapping[str, Any], name: str) -> str:
    """Value and interval of each category on one axis, all clips on top, the shuffled control as a tick."""
    lines = [("all clips", results["figures"][name])]
    for categories in results["categories"][name].values():
        lines += list(categories.items())
    lines = [(label, figure) for label, figure in lines if figure["value"] is not None]
    numbers = [f[key] for _, f in lines for key in ("value", "low", "high", "shuffled") if f.get(key) is not None]
    low, high = min([0.0, *numbers]), max([*numbers, 1.0 if max(numbers, default=0) <= 1 else 0.0])
    left, width, step = 170, 260, 20

    def x(value: float) -> float:
        return left + width * (value - low) / (high - low)

    marks = []
    for row, (label, figure) in enumerate(lines):
        y = 34 + step * row
        marks.append(f"<text x={left - 10} y={y + 4} text-anchor=end>{escape(label)}</text>")
        if figure["low"] is not None:
            marks.append(f'<line x1={x(figure["low"]):.1f} x2={x(figure["high"]):.1f} y1={y} y2={y} stroke=var(--seen) '
                         'stroke-width=2 />')  # fmt: skip
        if figure.get("shuffled") is not None:
            at = x(figure["shuffled"])
            marks.append(f"<line x1={at:.1f} x2={at:.1f} y1={y - 6} y2={y + 6} stroke=var(--heard) stroke-width=2 />")
        marks.append(f"<circle cx={x(figure['value']):.1f} cy={y} r=4 fill=var(--seen) />")
    bottom = 34 + step * len(lines)
    axis = "".join(
        f"<line x1={x(v):.1f} x2={x(v):.1f} y1=24 y2={bottom - 10} stroke=var(--line) />"
        f"<text x={x(v):.1f} y={bottom + 6} text-anchor=middle>{v:.3g}</text>"
        for v in np.linspace(low, high, 5)
    )
    title = f"{escape(results['figures'][name]['label'])} (point and interval), shuffled (tick)"
    return (
        f'<svg width={left + width + 30} height={bottom + 14} role=img aria-label="{title}">'
        f"<text x=0 y=14 font-weight=bold>{title}</text>{axis}{''.join(marks)}</svg>"
    )


# --- problems, clips ----------------------------------------------------------------------------------------------


def _problems(problems: Mapping[str, Any]) -> str:
    if not problems:
        return "<h2>Problems</h2><p>None.</p>"
    parts = []
    for kind, problem in problems.items():
        items = "".join(
            f"<tr><td>{escape(name)}<td class=text>{escape(reason)}" for name, reason in problem["names"].items()
        )
        parts.append(
            f"<details><summary>{escape(kind)}: {problem['count']}</summary>"
            f"<div class=scroll><table>{items}</table></div></details>"
        )
    return f"<h2>Problems</h2>{''.join(parts)}"


def _clips(clips: Sequence[StoredClip]) -> str:
    """Some clips with pictures: all of a few, else those that agree least and most."""
    order = sorted(range(len(clips)), key=lambda i: (_agreement(clips[i]), i))
    said = f"{len(clips)} clips, those that agree least first."
    if len(order) > SHOWN:
        compared = [i for i in order if _agreement(clips[i]) <= 1] or order
        order = compared[: SHOWN // 2] + compared[SHOWN // 2 :][-SHOWN // 2 :]
        said = f"The {SHOWN // 2} clips that agree least and the {SHOWN // 2} that agree most."
    legend = "Blue above the line: seen; orange below it: heard."
    return f"<h2>Clips</h2><p class=small>{said} {legend}</p>{''.join(_clip(clips[i]) for i in order)}"


def _agreement(clip: StoredClip) -> float:
    f1 = clip[SYNC].facts.get("f1", {}).get("62.5") if SYNC in clip else None
    return 2.0 if f1 is None else float(f1)  # what has no events to compare comes last


def _clip(clip: StoredClip) -> str:
    from javis.errors import UsageError

    sample = clip.sample
    facts = clip[SYNC].facts if SYNC in clip else {}
    said = [f"F1 {facts['f1']['62.5']:.2f}"] if facts.get("f1", {}).get("62.5") is not None else []
    if facts.get("mean_abs_offset_ms") is not None:
        said.append(f"{facts['mean_abs_offset_ms']:g} ms apart")
    wrong = [name for name, rights in facts.get("checks", {}).items() if not all(rights)]
    said += [f"wrong: {', '.join(wrong)}"] if wrong else []
    said += [f"{kind}: {reason}" for kind, reason in clip.faults.items()]
    try:
        picture = f'<img src="data:image/png;base64,{_strip(sample.video)}" alt="">'
    except (UsageError, OSError) as error:
        picture = f"<p class=small>{escape(str(error))}</p>"
    text = "" if sample.prompt is None else f": {escape(sample.prompt.text)}"
    return (
        f"<div class=clip><b>{escape(sample.name)}</b>{text} <span class=small>{escape('; '.join(said))}</span>"
        f"{picture}{_timeline(facts)}</div>"
    )


def _strip(path: Any) -> str:
    """Frames of a clip side by side, as PNG in base64."""
    from PIL import Image

    from javis.media import read_clip

    video = read_clip(path).video
    chosen = video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)]
    width = max(1, round(HEIGHT * video.shape[2] / video.shape[1]))
    strip = Image.new("RGB", ((width + 2) * FRAMES, HEIGHT), "white")
    for place, frame in enumerate(chosen):
        strip.paste(Image.fromarray(frame).resize((width, HEIGHT)), (place * (width + 2), 0))
    buffer = io.BytesIO()
    strip.quantize(64).save(buffer, "PNG")  # a third of the size; the frames are for a glance
    return base64.b64encode(buffer.getvalue()).decode()


def _timeline(facts: Mapping[str, Any]) -> str:
    if "sources" not in facts:
        return ""
    width, seconds = 528, max(float(facts["seconds"]), 1e-6)

    def ticks(events: Sequence[Mapping[str, Any]], top: int, colour: str) -> str:
        return "".join(
            f"<line x1={x:.1f} x2={x:.1f} y1={top} y2={top + 8} stroke=var(--{colour}) stroke-width=2 />"
            for x in (width * float(event["time_s"]) / seconds for event in events)
        )

    seen, heard = ticks(facts["video_events"], 1, "seen"), ticks(facts["audio_events"], 10, "heard")
    line = f"<line x1=0 x2={width} y1=9.5 y2=9.5 stroke=var(--mark) />"
    return f"<svg width={width} height=20 role=img aria-label=events>{line}{seen}{heard}</svg>"
