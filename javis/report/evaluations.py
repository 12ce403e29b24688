"""Sections of evaluations: what a kind is known for first, then everything that its file says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from javis.report.html import Markup, details, join, table, tag
from javis.report.plots import Line, histogram, line_chart
from javis.report.read import ENVIRONMENT, Evaluation
from javis.report.values import Values, cell, number, value_of

REACH = (-62.5, 62.5)  # ms: events further apart than a frame at 16 fps are not matched

KINDS = {
    "eval_world": "Synchrony and captions on the built-in world",
    "eval_steps": "Quality against steps",
    "eval_steps_bars": "Bars",
    "eval_negatives": "Audit of negatives",
    "eval_gate": "Recording of the quality gate",
    "eval_gate_verdict": "Quality gate",
    "javisbench": "JavisBench",
    "sync": "Synchrony of the clips",
}


def kind_of(evaluation: Evaluation) -> str:
    """The kind that the file says, or the one that its shape tells: sync reports have none."""
    data = evaluation.data
    if (
        not evaluation.kind
        and isinstance(data, Mapping)
        and isinstance(data.get("clips"), Mapping)
        and "summary" in data
    ):
        return "sync"
    return evaluation.kind


def title_of(evaluation: Evaluation) -> str:
    """Heading of its section."""
    kind = kind_of(evaluation)
    if kind == "eval_experiment" and isinstance(evaluation.data, Mapping):
        return f"Experiment: {evaluation.data.get('experiment', evaluation.name)}"
    return KINDS.get(kind, kind.replace("_", " ") or evaluation.name)


def show(evaluation: Evaluation) -> Markup:
    """The content of its section."""
    kind, data = kind_of(evaluation), evaluation.data
    rows = data if isinstance(data, list) else [data]
    rows = [row for row in rows if isinstance(row, Mapping)]
    try:
        head = HEADS[kind](rows) if kind in HEADS else None
    except (KeyError, TypeError, ValueError, AttributeError):
        head = tag(
            "p", f"Not of the form that this version knows of {kind}; below is what the file says.", class_="note"
        )
    left = [tag("p", f"From {evaluation.name}.", class_="note"), head]
    whole = data
    if kind == "sync":
        whole = data["summary"]
    elif kind == "eval_gate" and isinstance(data, Mapping):
        whole = {key: value for key, value in data.items() if key != "clips"}
    elif kind == "javisbench" and isinstance(data, Mapping):
        whole = {key: value for key, value in data.items() if key not in ("figures", "skipped")}
    shown = Values().show(whole)
    return join([*left, details("Everything in this file", shown) if head is not None else shown])


def _world(rows: Sequence[Mapping[str, Any]]) -> Markup:
    parts = []
    for row in rows:
        body = []
        for source in ("generated", "codec", "real"):
            for kind in ("one_source", "two_sources"):
                found = row.get(source, {}).get(kind)
                if found:
                    figure = {"value": found["f1"]["62.5"], **_ends(found.get("f1_interval"))}
                    label = f"{source}, {kind.replace('_', ' ')}"
                    body.append(
                        [label, found["clips"], cell(figure), cell(found["shuffled_f1"]),
                         cell(found["mean_abs_offset_ms"]), cell(found["objects_right"])]
                    )  # fmt: skip
        header = [
            "clips of",
            "clips",
            "event F1 at 62.5 ms",
            "F1, shuffled sound",
            "mean |offset| in ms",
            "objects right",
        ]
        parts.append(table(header, body, caption=_setting(row)))
        named = {source: row[source]["attributes"] for source in ("generated", "codec", "real") if source in row}
        columns = list(dict.fromkeys(name for found in named.values() for name in found))
        body = [[source, *[cell(found.get(name)) for name in columns]] for source, found in named.items()]
        parts.append(table(["share that is right", *columns], body, caption="attributes that the captions name"))
    return join(parts)


def _ends(interval: Any) -> dict[str, Any]:
    return {"low": interval[0], "high": interval[1]} if isinstance(interval, list) and len(interval) == 2 else {}


def _setting(row: Mapping[str, Any]) -> str:
    names = ("checkpoint", "variant", "steps", "guidance", "audio_guidance", "order", "split", "seed")
    said = [f"{name.replace('_', ' ')} {row[name]}" for name in names if row.get(name) is not None]
    return ", ".join(said + ([f"without {' and '.join(row['ablate'])}"] if row.get("ablate") else []))


def _steps(rows: Sequence[Mapping[str, Any]]) -> Markup:
    figures = {"f1": "event F1", "mean_abs_offset_ms": "mean |offset| in ms", "accuracy": "caption accuracy"}
    body = []
    for row in rows:
        options = ", ".join(f"{name} {value}" for name, value in (row.get("options") or {}).items())
        label = ", ".join(filter(None, [row["variant"], options]))
        cells = [cell(row.get("steps")), *[cell(row.get(name)) for name in figures], cell(row.get("shuffled_f1"))]
        body.append([label, *cells, cell(row.get("forwards_per_clip")), cell(row.get("seconds_per_clip"))])
    header = ["variant", "steps", *figures.values(), "F1, shuffled", "evaluations", "s a clip"]
    charts = []
    for name, label in figures.items():
        lines = []
        for variant in dict.fromkeys(row["variant"] for row in rows):
            points = [
                (float(row["steps"]), row[name])
                for row in rows
                if row["variant"] == variant
                and row.get("steps")
                and not row.get("options")
                and value_of(row.get(name)) is not None
            ]
            points.sort(key=lambda point: point[0])
            if points:
                values = [value_of(figure) or 0.0 for _, figure in points]
                spread = [figure.get("low") for _, figure in points], [figure.get("high") for _, figure in points]
                ends = None if None in spread[0] + spread[1] else spread
                lines.append(Line(variant, [x for x, _ in points], values, ends))
        if any(len(line.x) > 1 for line in lines):
            charts.append(line_chart(lines, title=label, x_label="steps"))
    return join([table(header, body, caption="points"), tag("div", charts, class_="plots")])


def _bars(rows: Sequence[Mapping[str, Any]]) -> Markup:
    body = []
    for bar in [bar for row in rows for bar in row["bars"]]:
        limit = f"at least {bar['at_least']:g}" if "at_least" in bar else f"at most {bar['at_most']:g}"
        body.append([_verdict(bar["held"]), bar["name"], cell(bar), limit])
    return table(["verdict", "figure", "value", "bar"], body, caption="bars", text=(0, 1, 3))


def _gate(rows: Sequence[Mapping[str, Any]]) -> Markup:
    body = [
        [_verdict(f["held"]), f["name"].replace("_", " "), cell(f["value"]),
         cell({"value": f["recorded"], "low": f["low"], "high": f["high"]}), cell(f["difference"])]
        for row in rows
        for f in row["figures"]
    ]  # fmt: skip
    header = ["verdict", "figure", "now", "recorded, 95 %", "difference, 99 %"]
    return table(header, body, caption=f"{rows[0]['clips']} clips", text=(0, 1))


def _verdict(held: bool | None) -> Markup:
    name = {True: "held", False: "missed", None: "unknown"}[held]
    return tag("span", name, class_=name)


def _javisbench(rows: Sequence[Mapping[str, Any]]) -> Markup:
    row = rows[0]
    body = [
        [
            f["label"],
            "higher" if f["better"] == "higher" else "lower",
            cell({key: value for key, value in f.items() if key != "shuffled"}),
            cell(f.get("shuffled")),
            cell(f.get("n")),
        ]
        for f in ({**figure, "label": figure.get("label", name)} for name, figure in row["figures"].items())
    ]
    parts = [
        tag("p", f"{row['evaluated']} of {row['asked']} samples evaluated."),
        table(["metric", "better", "value", "shuffled", "clips"], body, caption="all clips", text=(0, 1)),
    ]
    if row.get("skipped"):
        parts.append(table(["metric", "why"], list(row["skipped"].items()), caption="skipped", text=(0, 1)))
    return join(parts)


def offsets_chart(offsets: Sequence[float]) -> Markup:
    """How far apart matched events are, in ms."""
    return histogram(offsets, title="Offsets of matched events", x_label="sound minus picture in ms", reach=REACH)


def _sync(rows: Sequence[Mapping[str, Any]]) -> Markup:
    clips = rows[0]["clips"]
    offsets = [pair["offset_ms"] for report in clips.values() for pair in report.get("matched") or []]
    scores = [report["f1"]["62.5"] for report in clips.values() if (report.get("f1") or {}).get("62.5") is not None]
    charts = [
        offsets_chart(offsets),
        histogram(scores, title="Event F1 of a clip", x_label="F1 at 62.5 ms", reach=(0, 1), bins=10),
    ]
    parts = [tag("div", charts, class_="plots")]
    skipped = rows[0].get("skipped") or {}
    if skipped:
        parts.append(table(["clip", "why"], list(skipped.items()), caption="not measured", text=(0, 1)))
    return join(parts)


HEADS: dict[str, Callable[[Sequence[Mapping[str, Any]]], Markup]] = {
    "eval_world": _world,
    "eval_steps": _steps,
    "eval_steps_bars": _bars,
    "eval_gate_verdict": _gate,
    "javisbench": _javisbench,
    "sync": _sync,
}


def provenance(evaluation: Evaluation) -> dict[str, str]:
    """Checkpoint, fingerprints, commit, versions and device as the file says them, several values with commas."""
    rows = evaluation.data if isinstance(evaluation.data, list) else [evaluation.data]
    found: dict[str, list[str]] = {}
    for row in rows:
        if not isinstance(row, Mapping):
            continue
        for name in ("checkpoint", "checkpoint_fingerprint", "weights_sha256", *ENVIRONMENT):
            if row.get(name) is not None and isinstance(row[name], (str, int, float)):
                value = number(row[name]) if isinstance(row[name], (bool, float)) else str(row[name])
                if value not in found.setdefault(name, []):
                    found[name].append(value)
        mark = row.get("fingerprint")
        if isinstance(mark, Mapping) and isinstance(mark.get("id"), str):
            found.setdefault("fingerprint", []).append(mark["id"])
    return {name: ", ".join(values) for name, values in found.items()}
