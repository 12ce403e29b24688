"""Real clips in a folder, measured like generated ones; and those of the built-in world, described in the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from javis.eval import frechet, frechet_features
from javis.eval.javisbench.clips import Measuring
from javis.eval.javisbench.config import Progress
from javis.eval.javisbench.layouts import DataSet, samples_of_tree
from javis.eval.javisbench.measure import FACTS
from javis.eval.javisbench.metrics import Metric
from javis.eval.javisbench.prompts import Problems
from javis.eval.javisbench.references import Reference
from javis.eval.javisbench.store import Store

WORLD_SETS = {"video": "picture", "audio": "sound"}


def measure_folder(
    folder: Path, layout: DataSet, metrics: Sequence[Metric], like: Measuring, problems: Problems, progress: Progress
) -> Reference:
    """Features of all clips below a folder, for the distances among ``metrics``.

    What is wrong with real clips goes to ``problems`` under names of its own.

    Raises:
        UsageError: no such folder, or no clip below it.
    """
    taxonomy, samples = samples_of_tree(folder, layout)
    parts = (FACTS, *dict.fromkeys(metric.part for metric in metrics))
    store = Store(like.store.folder / "reference")
    troubles = Problems()
    clips = replace(like, store=store, parts=parts)(samples, troubles, progress)
    for kind, names in troubles.found.items():
        problems.found.setdefault(f"real clips: {kind}", {}).update(names)
    vectors: dict[tuple[str, str], np.ndarray] = {}
    for metric in metrics:
        found = [clip[metric.part].arrays.get(metric.kind) if metric.part in clip else None for clip in clips]
        widths = {array.size for array in found if array is not None}
        if widths:
            absent = np.full(widths.pop(), np.nan)
            vectors[metric.part, metric.kind] = np.stack([absent if a is None else a.reshape(-1) for a in found])
    scenes = None
    if taxonomy:
        scenes = tuple(taxonomy[0].categories[sample.categories[0][0]] for sample in samples)
    hashes = {extractor: like.hashes[extractor] for extractor, _ in vectors}
    return Reference(str(folder), vectors, hashes, None, scenes)


def world_distance(vectors: np.ndarray, kind: str) -> float:
    """Frechet distance of built-in features [N, 24], N >= 2, to those of the world's real clips."""
    centred = vectors - vectors.mean(axis=0)
    mine = frechet.Gaussian(vectors.mean(axis=0), centred.T @ centred / (len(vectors) - 1), len(vectors))
    return frechet.frechet_distance(mine, world_gaussian(kind))


def world_gaussian(kind: str) -> frechet.Gaussian:
    """Of the real clips that the package describes: "video" or "audio"."""
    return frechet_features.reference().gaussians[WORLD_SETS[kind]]
