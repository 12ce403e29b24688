"""The whole evaluation: samples and real clips are measured, as far as they are not yet, and become figures.

Read next: clips.py (measuring), figures.py (what a figure is), metrics.py (which there are).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.errors import UsageError
from javis.eval.fingerprint import fingerprint
from javis.eval.javisbench.clips import Measuring, StoredClip
from javis.eval.javisbench.config import Config, Progress
from javis.eval.javisbench.embed import Skipped, find
from javis.eval.javisbench.figures import distance_figure, score_clips
from javis.eval.javisbench.layouts import Sample, samples_of_prompts, samples_of_tree
from javis.eval.javisbench.measure import FACTS, PEAKS, SYNC
from javis.eval.javisbench.metrics import BY_NAME, METRICS, Metric
from javis.eval.javisbench.prompts import Problems, read_prompts
from javis.eval.javisbench.real_clips import measure_folder, world_distance, world_gaussian
from javis.eval.javisbench.references import Reference, read_cache, write_cache
from javis.eval.javisbench.store import Store
from javis.eval.javisbench.taxonomy import OFFICIAL, Taxonomy, read_taxonomy
from javis.eval.optical_flow import flow_method

Groups = list[tuple[str, str, np.ndarray]]  # aspect, category, indices of clips
Found = tuple[dict[str, Any], dict[str, dict[str, Any]]]  # the figure of all clips, and by aspect and category


@dataclass(frozen=True)
class Evaluated:
    """The results as plain json values, and the readable clips behind them (for the page)."""

    results: dict[str, Any]
    clips: list[StoredClip]


def evaluate(config: Config, progress: Progress = lambda done, of: None) -> Evaluated:
    """Evaluate the samples of a folder; what was measured is kept in ``config.out`` and not measured again.

    Raises:
        UsageError: unusable arguments or files, or no sample at all. FailedError: processes cannot be started.
    """
    problems = Problems()
    chosen = _chosen(config.metrics)
    taxonomy, samples, rows = _samples(config, problems)
    parts, hashes, skipped = _parts(chosen, config)
    measuring = Measuring(
        Store(config.out / "measured"), parts, hashes, config.options, config.processes, config.timeout
    )
    clips = [clip for clip in measuring(samples, problems, progress) if clip.is_readable]
    if not clips:
        raise UsageError(f"none of the {len(samples)} samples in {config.samples} can be read: {_first(problems)}")
    compared = [metric for metric in chosen if metric.distance is not None and metric.name not in skipped]
    reference = _reference(config, rows, compared, measuring, problems, progress)
    groups = _groups(taxonomy, clips)
    figures: dict[str, Any] = {}
    categories: dict[str, Any] = {}
    for metric in [metric for metric in chosen if metric.name not in skipped]:
        if metric.distance is not None:
            found = _distances(metric, clips, groups, reference, hashes, config)
        else:
            found = _scores(metric, clips, groups, config, problems)
        if isinstance(found, str):
            skipped[metric.name] = found
        else:
            figures[metric.name] = {"label": metric.label, "better": metric.better, "about": metric.about, **found[0]}
            categories[metric.name] = found[1]
    return Evaluated(
        {
            "kind": "javisbench",
            "name": config.name,
            "samples": str(config.samples),
            "prompts": None if config.prompts is None else str(config.prompts),
            "layout": config.layout,
            "reference": None if reference is None else reference.source,
            "asked": len(samples) if rows is None else rows,
            "evaluated": len(clips),
            "fingerprint": _fingerprint(clips, config, hashes, reference),
            "figures": figures,
            "skipped": {metric.name: skipped[metric.name] for metric in chosen if metric.name in skipped},
            "categories": categories,
            "problems": problems.json(),
        },
        clips,
    )


# --- what is to be measured ---------------------------------------------------------------------------------------


def _samples(config: Config, problems: Problems) -> tuple[Taxonomy, list[Sample], int | None]:
    """Taxonomy, samples, and how many rows the CSV file has (None without one)."""
    if config.layout != "prompts":
        if config.prompts is not None:
            raise UsageError(f"layout {config.layout} has no prompts; leave out --prompts, or --layout")
        return *samples_of_tree(config.samples, config.layout), None
    if config.prompts is None:
        raise UsageError("expected --prompts FILE.csv, or --layout landscape, aist or folder for clips without prompts")
    taxonomy = OFFICIAL if config.categories is None else read_taxonomy(config.categories)
    table = read_prompts(config.prompts, taxonomy, problems)
    return taxonomy, samples_of_prompts(config.samples, table.prompts, problems), table.rows


def _chosen(names: Sequence[str]) -> list[Metric]:
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise UsageError(f"there is no metric {unknown[0]!r}; expected some of {', '.join(BY_NAME)}")
    return [metric for metric in METRICS if not names or metric.name in names]


def _parts(chosen: Iterable[Metric], config: Config) -> tuple[tuple[str, ...], dict[str, str], dict[str, str]]:
    """Parts that can be measured, the hash of each extractor's weights, and why metrics are skipped."""
    parts, hashes = [FACTS], {}
    skipped: dict[str, str] = {}
    for metric in chosen:
        if metric.needs_text and config.prompts is None:
            skipped[metric.name] = "needs prompts; give --prompts FILE.csv"
            continue
        if metric.part not in parts and metric.part not in (SYNC, PEAKS):
            found = find(metric.part, config.options)
            if isinstance(found, Skipped):
                skipped[metric.name] = found.reason
                continue
            hashes[metric.part] = f"{found.weights_hash}, {config.options.protocol}"  # some prepare clips by protocol
        if metric.part not in parts:
            parts.append(metric.part)
    return tuple(parts), hashes, skipped


def _reference(
    config: Config,
    rows: int | None,
    compared: Sequence[Metric],
    measuring: Measuring,
    problems: Problems,
    progress: Progress,
) -> Reference | None:
    if config.reference is None or not compared:
        return None
    if not config.reference.is_dir():
        return read_cache(config.reference, rows)
    layout = "folder" if config.layout == "prompts" else config.layout
    found = measure_folder(config.reference, layout, compared, measuring, problems, progress)
    if found.vectors:
        write_cache(config.out / "reference.safetensors", found)
    return found


def _first(problems: Problems) -> str:
    """One reason, for a message of one line."""
    for kind in ("unreadable", "not measured"):
        for name, reason in problems.found.get(kind, {}).items():
            return f"{name}: {reason}"
    return "no reason is known"


def _groups(taxonomy: Taxonomy, clips: Sequence[StoredClip]) -> Groups:
    """The clips of each category that has some."""
    found: Groups = []
    for a, aspect in enumerate(taxonomy):
        for c, category in enumerate(aspect.categories):
            members = [i for i, clip in enumerate(clips) if c in clip.sample.categories[a]]
            if members:
                found.append((aspect.name, category, np.array(members)))
    return found


# --- figures ------------------------------------------------------------------------------------------------------


def _scores(
    metric: Metric, clips: Sequence[StoredClip], groups: Groups, config: Config, problems: Problems
) -> Found | str:
    score, protocol = metric.score, config.options.protocol
    assert score is not None
    scores = score_clips(clips, lambda clip, other: score(clip, other, protocol), shuffle=metric.shuffles)
    if not scores.defined.any():
        if metric.needs_world:
            return "needs prompts in the words of the built-in world"
        return f"undefined for all clips; the first: {_why_undefined(metric, clips[0]) or 'nothing to compare'}"
    for index in np.flatnonzero(~scores.defined).tolist():
        why = _why_undefined(metric, clips[index])
        if why is not None and not metric.is_detail:
            problems.add(f"no {metric.label}", clips[index].sample.name, why)
    tables: dict[str, dict[str, Any]] = {}
    for aspect, category, members in groups:
        tables.setdefault(aspect, {})[category] = scores.figure(members)
    return scores.figure(np.arange(len(clips))), tables


def _why_undefined(metric: Metric, clip: StoredClip) -> str | None:
    """Why a clip has no figure; None if it should have none, or what is wrong with the clip says it already."""
    if metric.may_lack or (metric.part in clip and clip[metric.part].facts.get("sources") == []):
        return None  # the text describes nothing that is both seen and heard
    if "no sound" in clip.faults or "too few frames" in clip.faults:
        return None
    if metric.part not in clip:
        return "not measured"
    missing = clip[metric.part].facts.get("missing")
    return str(missing) if missing is not None else "no event seen or heard"


def _distances(
    metric: Metric,
    clips: Sequence[StoredClip],
    groups: Groups,
    reference: Reference | None,
    hashes: Mapping[str, str],
    config: Config,
) -> Found | str:
    vectors, owners = [], []
    for index, clip in enumerate(clips):
        array = clip[metric.part].arrays.get(metric.kind) if metric.part in clip else None
        if array is not None and np.isfinite(array).all():
            vectors.append(np.asarray(array, np.float64).reshape(-1))
            owners.append(index)
    if len(vectors) < 2:
        return f"{len(vectors)} clips have {metric.part} features of the {_KINDS[metric.kind]}; expected at least 2"
    matrix, place = np.stack(vectors), {owner: i for i, owner in enumerate(owners)}
    why_not = _incomparable(metric, matrix.shape[1], reference, hashes[metric.part], clips, config)
    if why_not is not None:
        return why_not

    def figure(members: Iterable[int], rows: np.ndarray | None, scene: str | None, *, interval: bool) -> Any:
        mine = matrix[[place[i] for i in members if i in place]]
        compare, real = _comparison(metric, reference, rows, scene, config)
        return {**distance_figure(mine, compare, interval=interval), "n_real": real} if real >= 2 else None

    tables: dict[str, dict[str, Any]] = {}
    for aspect, category, members in groups:
        rows = [row for i in members if (row := clips[i].sample.row) is not None]
        found = figure(members.tolist(), np.array(rows) if rows else None, category, interval=False)
        if found is not None:
            tables.setdefault(aspect, {})[category] = found
    return figure(range(len(clips)), None, None, interval=True), tables


_KINDS = {"video": "picture", "audio": "sound"}


def _incomparable(
    metric: Metric,
    width: int,
    reference: Reference | None,
    weights_hash: str,
    clips: Sequence[StoredClip],
    config: Config,
) -> str | None:
    """Why there is nothing to compare with; None if there is."""
    if reference is None:
        of_world = metric.part == "builtin" and any(SYNC in c and c[SYNC].facts.get("by_source") for c in clips)
        return None if of_world else "needs real clips: give --reference FOLDER, or a file with cached features"
    real = reference.of(metric.part, metric.kind)
    if len(real) < 2:
        return f"{reference.source} has no features of {metric.part} for the {_KINDS[metric.kind]}"
    if reference.is_official and config.options.protocol != "official" and metric.part == "i3d":
        return "the official features are of pixels in 0..1, by accident: compare with them under --protocol official"
    if reference.hashes.get(metric.part) not in (None, weights_hash):
        return f"{reference.source} was made with other weights of {metric.part}; make it again from the clips"
    if real.shape[1] != width:
        return f"{reference.source} has vectors of {real.shape[1]} dimensions, {metric.part} makes {width}"
    return None


def _comparison(
    metric: Metric, reference: Reference | None, rows: np.ndarray | None, scene: str | None, config: Config
) -> tuple[Callable[[np.ndarray], float], int]:
    """The distance of vectors to real ones, and how many of these there are.

    Without a reference these are the real clips of the built-in world, all of them for every category.
    """
    kind, distance, protocol = metric.kind, metric.distance, config.options.protocol
    assert distance is not None
    if reference is None:
        return lambda some: world_distance(some, kind), world_gaussian(kind).count
    real = reference.of(metric.part, kind, rows, scene)
    return lambda some: distance(some, real, protocol=protocol), len(real)


def _fingerprint(
    clips: Sequence[StoredClip], config: Config, hashes: Mapping[str, str], reference: Reference | None
) -> dict[str, Any]:
    facts = [clip[FACTS].facts for clip in clips]

    def spread(values: Iterable[Any]) -> Any:
        """One value, a few, or the smallest and the largest of many."""
        found = sorted(set(values))
        if len(found) == 1:
            return found[0]
        return found if len(found) <= 4 else {"from": found[0], "to": found[-1]}

    return fingerprint(
        protocol=config.options.protocol,
        n=len(clips),
        fps=spread(f["fps"] for f in facts),
        size=spread(f"{f['width']}x{f['height']}" for f in facts),
        seconds=spread(round(f["video_seconds"], 3) for f in facts),
        sample_rate=spread(f["sample_rate"] for f in facts),
        cut_to_seconds=config.options.seconds,
        windows=[config.options.window_seconds, config.options.window_overlap],
        extractors=dict(hashes),
        reference=None if reference is None else reference.source,
        flow=flow_method(),
    )
