"""The page of a run: facts on top, then training, evaluations, clips, and what could not be read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from javis.report import evaluations
from javis.report.embed import Embedded, Embedder
from javis.report.html import Content, Markup, details, document, join, section, table, tag
from javis.report.plots import Line, line_chart, timeline
from javis.report.read import ClipFile, Evaluation, Log, Run
from javis.report.values import cell, number, words_of

FIRST = ("loss", "video", "audio")  # series of one chart: the losses of both streams and their sum
PRIMARY = "62.5"
FEW = 8  # values that a histogram needs to say something


def page(run: Run, embedder: Embedder, *, title: str, made: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        run: what was found.
        embedder: takes clips and pictures as far as they fit.
        title: of the page.
        made: facts on the page itself (date, version and commit of javis).
    """
    parts: list[tuple[str, str, Markup]] = []
    if run.logs or run.configs or run.checkpoints:
        parts.append(("training", "Training", _training(run)))
    for i, evaluation in enumerate(run.evaluations):
        drawn = [_picture(run, path, embedder) for path in run.pictures if _belongs(path, evaluation)]
        content = join([drawn, evaluations.show(evaluation)])
        parts.append((f"evaluation-{i + 1}", evaluations.title_of(evaluation), content))
    if run.clips:
        parts.append(("clips", "Clips", _clips(run, embedder)))
    left = [path for path in run.pictures if not any(_belongs(path, evaluation) for evaluation in run.evaluations)]
    if left:
        # The newest samples first, as they are what is looked for if not all fit.
        sheets = [_picture(run, path, embedder) for path in reversed(left)]
        parts.append(("pictures", "Samples and figures", join(sheets)))
    problems = [*run.problems, *embedder.broken]
    if problems:
        caption = f"{len(problems)} file{'s' * (len(problems) != 1)}"
        shown = tag("div", table(["file", "why"], problems, caption=caption, text=(0, 1)), class_="warn")
        parts.append(("problems", "Could not be read", shown))
    kinds = [f"{len(run.logs)} training log{'s' * (len(run.logs) != 1)}" if run.logs else ""]
    kinds.append(f"{len(run.evaluations)} evaluation{'s' * (len(run.evaluations) != 1)}" if run.evaluations else "")
    kinds.append(f"{len(run.clips)} clip{'s' * (len(run.clips) != 1)}" if run.clips else "")
    links = [tag("li", tag("a", heading, href=f"#{id_}")) for id_, heading, _ in parts]
    body = [
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            tag("p", ", ".join(filter(None, kinds)), class_="note"),
            tag("nav", tag("ul", links), aria_label="Sections"),
        ),
        tag(
            "main",
            section("Made with", _made_with(run), id_="made-with"),
            [section(heading, content, id_=id_) for id_, heading, content in parts],
            id="content",
        ),
        tag("footer", "Page: ", ", ".join(f"{words_of(name)} {value}" for name, value in made.items()), "."),
    ]
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("look.css", "look.js"))
    return document(title, join(body), style=style, script=script)


# --- facts ------------------------------------------------------------------------------------------------------------


def _made_with(run: Run) -> Markup:
    """Checkpoint, fingerprint, commit, versions, device: what the files themselves say; a column for each of them."""
    found: list[tuple[str, dict[str, str]]] = []
    for evaluation in run.evaluations:
        found.append((evaluation.name, evaluations.provenance(evaluation)))
    found.append(("clips", _of_clips(run.clips)))
    for name, config in run.configs.items():
        environment = config.get("environment") if isinstance(config, Mapping) else None
        found.append((f"training {name}".strip(), evaluations.provenance(Evaluation("", "", environment))))
    same: dict[str, tuple[list[str], dict[str, str]]] = {}  # what was made alike is one column
    for name, facts in found:
        key = json.dumps({k: v for k, v in facts.items() if k not in ("load", "date")}, sort_keys=True)
        names, _ = same.setdefault(key, ([], facts))
        names += [name] if facts and name not in names else []
    columns = {", ".join(names): facts for names, facts in same.values() if facts}
    if not columns:
        return tag("p", "The files do not say with which commit, versions and device they were made.")
    keys = list(dict.fromkeys(key for facts in columns.values() for key in facts))
    rows = [[words_of(key), *[facts.get(key, "–") for facts in columns.values()]] for key in keys]
    header = ["as the files say", *columns]
    return table(header, rows, caption="checkpoint, commit, versions, device", text=range(len(header)), titled=True)


def _of_clips(clips: Sequence[ClipFile]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for clip in clips:
        request = clip.facts.get("request")
        request = request if isinstance(request, Mapping) else {}
        facts = {
            "checkpoint": request.get("checkpoint"),
            "checkpoint_fingerprint": request.get("checkpoint_fingerprint"),
            "javis": clip.facts.get("javis"),
        }
        for name, value in facts.items():
            if isinstance(value, str) and value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: ", ".join(values[:8]) for name, values in found.items() if values}


# --- training ---------------------------------------------------------------------------------------------------------


def _training(run: Run) -> Markup:
    parts: list[Markup] = []
    for log in run.logs:
        parts += [tag("h3", log.name or "Run"), _log(log)]
    if run.checkpoints:
        rows: list[tuple[str, str, str]] = [
            (name, f"{size / 1e6:.1f}", mark or "–") for name, size, mark in run.checkpoints
        ]
        parts += [
            tag("h3", "Checkpoints"),
            table(["checkpoint", "MB", "fingerprint"], rows, caption="newest last", text=(0, 2)),
        ]
    if run.configs:
        parts.append(tag("h3", "Configuration"))
        for name, config in run.configs.items():
            text = json.dumps(config, indent=1, default=str)
            told = name if name.endswith(".json") else f"config.json{f' of {name}' if name else ''}"
            parts.append(details(told, tag("pre", text)))
    return join(parts)


def _log(log: Log) -> Markup:
    series = log.series()
    seconds = series.pop("seconds", None)
    skipped = series.pop("skipped", None)
    last = log.rows[-1]["step"]
    said = f"{len(log.rows)} rows, to step {last:g}"
    if seconds is not None:
        said += f", {_duration(max(seconds[1]))}"
    if skipped is not None and skipped[1] and skipped[1][-1]:
        said += f"; {skipped[1][-1]:g} steps skipped for a loss or gradient that was not finite"
    charts = []
    for names in _groups(list(series)):
        lines = [Line(words_of(name), *series[name]) for name in names]
        title = words_of(names[0]) if len(names) == 1 else _group_title(names)
        charts.append(line_chart(lines, title=title, x_label="step"))
    rows: list[list[Content]] = []
    for name, (steps, values) in series.items():
        finite = [(value, step) for value, step in zip(values, steps, strict=True) if math.isfinite(value)]
        if finite:
            low, at = min(finite)
            rows.append([words_of(name), number(finite[0][0]), number(finite[-1][0]), number(low), f"{at:g}",
                         len(values) - len(finite)])  # fmt: skip
    header = ["series", "first", "last", "lowest", "at step", "not finite"]
    shown = details("The same in numbers", table(header, rows, caption=f"series of {log.name or 'the run'}"))
    return join([tag("p", f"{said}."), tag("div", charts, class_="plots"), shown])


def _groups(names: list[str]) -> list[list[str]]:
    """Series by chart: losses of both streams together, lists together, parts of one loss together, others alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, _, tail = name.rpartition(" ")
        prefix = name.split("_")[0]
        if name in FIRST:
            key = "loss of the streams"
        elif head and tail.isdecimal():
            key = f"list {head}"
        elif prefix in ("spatial", "temporal") and "_" in name:
            key = f"prior {prefix}"
        else:
            key = f"alone {name}"
        groups.setdefault(key, []).append(name)
    found = []
    for group in groups.values():
        found += [group[i : i + 6] for i in range(0, len(group), 6)]
    return found


def _group_title(names: Sequence[str]) -> str:
    if set(names) <= set(FIRST):
        return "loss"
    head = names[0].rpartition(" ")[0]
    return words_of(head) if head else f"{names[0].split('_')[0]} losses"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# --- clips and pictures -----------------------------------------------------------------------------------------------


def _clips(run: Run, embedder: Embedder) -> Markup:
    measured = _reports(run.evaluations)
    rows, cards, shown = [], [], 0
    offsets: list[float] = []
    for place, clip in enumerate(run.clips, 1):
        report = clip.sync or measured.get(clip.path.name, {})
        offsets += [
            pair["offset_ms"] for pair in _list(report, "matched") if isinstance(pair.get("offset_ms"), (int, float))
        ]
        embedded = embedder.clip(clip.path)
        shown += isinstance(embedded, Embedded)
        name = run.name_of(clip.path)
        f1 = _f1(report)
        seen, heard = (len(_list(report, key)) if report else None for key in ("video_events", "audio_events"))
        rows.append(
            [name, clip.caption or "–", cell(f1), cell(report.get("mean_abs_offset_ms")), cell(seen), cell(heard),
             "yes" if isinstance(embedded, Embedded) else embedded]
        )  # fmt: skip
        if isinstance(embedded, Embedded):
            cards.append(_card(name, clip, report, embedded, place))
    said = tag("p", f"{shown} of {len(run.clips)} clips can be played here.") if shown < len(run.clips) else None
    if embedder.left_out and shown < len(run.clips):
        said = tag(
            "p",
            f"{shown} of {len(run.clips)} clips can be played here. {len(embedder.left_out)} do not fit into the "
            "limits of the page; --max-mb and --max-clip-mb of 'javis report' raise them. The table says which.",
            class_="warn",
        )
    plots = None
    if len(offsets) >= FEW:
        chart = evaluations.offsets_chart(offsets)
        plots = tag("div", chart, class_="plots")
    header = ["clip", "prompt", "event F1 at 62.5 ms", "mean |offset| in ms", "seen", "heard", "in the page"]
    whole = table(header, rows, caption="all clips", text=(0, 1, 6))
    return join(
        [
            said,
            plots,
            tag("ul", cards, class_="clips") if cards else None,
            details("All clips in a table", whole, open_=not cards),
        ]
    )


def _reports(found: Sequence[Evaluation]) -> dict[str, Mapping[str, Any]]:
    """Sync reports by name of the clip, of an evaluation that lies beside the clips."""
    reports: dict[str, Mapping[str, Any]] = {}
    for evaluation in found:
        if evaluations.kind_of(evaluation) == "sync":
            reports |= {
                name: report for name, report in evaluation.data["clips"].items() if isinstance(report, Mapping)
            }
    return reports


def _f1(report: Mapping[str, Any]) -> float | None:
    found = report.get("f1")
    value = found.get(PRIMARY) if isinstance(found, Mapping) else None
    return value if isinstance(value, (int, float)) else None


def _list(report: Mapping[str, Any], key: str) -> list[Any]:
    found = report.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _card(name: str, clip: ClipFile, report: Mapping[str, Any], embedded: Embedded, place: int) -> Markup:
    caption = clip.caption or name
    video = tag(
        "video",
        tag("p", f"This browser plays no video. The clip is the file {name}."),
        controls=True,
        playsinline=True,
        preload="none",
        width=embedded.width,
        height=embedded.height,
        poster=embedded.poster,
        src=embedded.url,
        aria_label=f"Clip {place}: {caption}",
    )
    times = {
        label: [float(event["time_s"]) for event in _list(report, key) if isinstance(event.get("time_s"), (int, float))]
        for label, key in (("seen", "video_events"), ("heard", "audio_events"))
    }
    axis = timeline(embedded.seconds, times, f"Events of {caption}") if report else None
    f1 = _f1(report)
    said = [] if f1 is None else [f"F1 {number(f1)}"]
    if isinstance(report.get("mean_abs_offset_ms"), (int, float)):
        said.append(f"{number(report['mean_abs_offset_ms'])} ms apart")
    said += [
        f"{words_of(key)} {clip.facts[key]}"
        for key in ("seed", "steps", "variant", "model_resolution", "fps")
        if isinstance(clip.facts.get(key), (str, int, float))
    ]
    if clip.facts.get("random_weights"):
        said.append("random weights")
    return tag(
        "li",
        video,
        axis,
        tag("h3", caption),
        tag("p", "; ".join(said), class_="note"),
        tag("p", name, f". {embedded.note}" if embedded.note else None, class_="note"),
        details("What its json says", tag("pre", json.dumps(_brief(clip.facts), indent=1))) if clip.facts else None,
        class_="clip",
    )


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sync report, which the axis of the clip shows."""
    return {key: value for key, value in facts.items() if key != "sync"}


def _belongs(path: Path, evaluation: Evaluation) -> bool:
    """Whether a picture was drawn of an evaluation: priors.png of priors.json."""
    return path.stem == Path(evaluation.name).stem and Path(evaluation.name).suffix == ".json"


def _picture(run: Run, path: Path, embedder: Embedder) -> Markup:
    name, url = run.name_of(path), embedder.picture(path)
    if url is None:
        return tag("p", f"{name} is not in the page (--max-mb, --max-clip-mb).", class_="warn")
    return tag("figure", tag("figcaption", name), tag("img", src=url, alt=f"Picture {name}", loading="lazy"))
