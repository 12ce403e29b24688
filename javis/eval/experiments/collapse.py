"""(f) Prior collapse: do priors say anything of the prompt?

Each estimator gives a Gaussian for every token of a prompt. Collapsed are priors that are the same for every prompt, or
whose noise drowns what differs. Figures, for the spatial and the temporal tokens:

* prompt share: variance of the means over prompts, over that plus the variance of the noise;
* cosine of two prompts: of the means of different prompts (1: one and the same prior);
* dimensions: participation ratio ``(sum l)^2 / sum l^2`` of the eigenvalues of the means' covariance;
* nats a value: KL divergence of the Gaussian from the standard normal, per value;
* read by a linear probe: an attribute from *sampled* priors of prompts that the probe was not fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from javis.eval.experiments.common import Context, Row, as_figure, bars, cell, listed, save_figure, table
from javis.eval.experiments.estimators import posterior, trained
from javis.eval.negatives import rate_of
from javis.eval.stats import bootstrap_interval
from javis.world import Scene, WorldConfig, caption, sample_scene

TITLE = "Prior collapse"
COUNT = 600
FIRST_SEED = 1_800_000_000
PROBED = ("side", "motion", "colour", "shape", "material", "size")
FIT_SHARE = 2 / 3
RIDGE = 10.0


def run(context: Context) -> dict[str, Any]:
    """Priors of ``context.count`` captions of one source, by every estimator there is."""
    world = WorldConfig(**context.form)
    scenes = [sample_scene(FIRST_SEED + i, world, sources=1) for i in range(context.count)]
    captions = [caption(scene) for scene in scenes]
    pipe = context.pipe

    def encode(words: list[str]) -> Tensor:
        return pipe.encode_text(pipe.captions(words), for_prior=True)[0]

    estimators: dict[str, Any] = {"of the checkpoint": (pipe.prior, encode)}
    if context.prior_checkpoint is not None:
        parts = trained(context)
        estimators["contrastive, before"] = (parts.before, parts.encode_text)
        estimators["contrastive, after"] = (parts.after, parts.encode_text)
    found: dict[str, Any] = {}
    for name, (estimator, encoder) in estimators.items():
        mean, logvar = posterior(estimator, encoder, captions)
        spatial = estimator.config.spatial_token_num
        found[name] = {
            axis: figures(mean[:, part], logvar[:, part], scenes)
            for axis, part in (("spatial", slice(0, spatial)), ("temporal", slice(spatial, None)))
        }
    return {"estimators": found}


def figures(mean: Tensor, logvar: Tensor, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Figures of the priors of one axis: mean and log variance [N, tokens, C] of the prompts of ``scenes``."""
    x, noise = mean.flatten(1).double().numpy(), logvar.flatten(1).double().exp().numpy()
    drawn = np.random.default_rng(0).normal(size=x.shape) * np.sqrt(noise) + x
    ends = bootstrap_interval(range(len(x)), lambda some: prompt_share(x[list(some)], noise[list(some)]), draws=200)
    share = None if ends is None else as_figure((prompt_share(x, noise), *ends))
    kl = 0.5 * (x**2 + noise - 1 - np.log(np.maximum(noise, 1e-300)))
    return {
        "prompt_share": share,
        "deviation_over_prompts": round(float(np.sqrt(x.var(axis=0, ddof=1).mean())), 5),
        "deviation_of_noise": round(float(np.sqrt(noise.mean())), 5),
        "cosine_of_two_prompts": round(mean_cosine(x), 4),
        "dimensions": round(participation(x), 2),
        "nats_a_value": round(float(kl.mean()), 4),
        "probe": {name: probe(drawn, [getattr(s.sources[0], name) for s in scenes]) for name in PROBED},
    }


def prompt_share(mean: np.ndarray, noise: np.ndarray) -> float:
    """Share of the prompt in the variance of sampled priors: means and noise variances [N, D]."""
    between, within = float(mean.var(axis=0, ddof=1).sum()), float(noise.mean(axis=0).sum())
    return between / (between + within) if between + within else 0.0


def mean_cosine(x: np.ndarray) -> float:
    """Mean cosine between different rows of [N, D]."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    total, count = unit.sum(axis=0), len(x)
    return float((total @ total - (unit**2).sum()) / (count * (count - 1)))


def participation(x: np.ndarray) -> float:
    """Effective number of dimensions of the rows of [N, D]; 0 if they are all the same."""
    values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    return float(values.sum() ** 2 / (values**2).sum()) if values.sum() > 0 else 0.0


def probe(x: np.ndarray, labels: Sequence[str | None]) -> dict[str, Any]:
    """Accuracy of a ridge regression on one-hot labels, fitted on the first two thirds of the rows [N, D] (those with a
    label) and read on the rest, with its 95 % interval; ``chance``: the most frequent label there."""
    have = [i for i, label in enumerate(labels) if label is not None]
    names = sorted({str(labels[i]) for i in have})
    values, y = x[have], np.array([names.index(str(labels[i])) for i in have])
    cut = int(FIT_SHARE * len(y))
    mean, deviation = values[:cut].mean(axis=0), values[:cut].std(axis=0)
    values = (values - mean) / np.where(deviation > 1e-9, deviation, 1.0)
    values = np.hstack((values, np.ones((len(values), 1))))
    gram = values[:cut].T @ values[:cut] + RIDGE * np.eye(values.shape[1])
    weights = np.linalg.solve(gram, values[:cut].T @ np.eye(len(names))[y[:cut]])
    right = (values[cut:] @ weights).argmax(axis=1) == y[cut:]
    chance = float(np.bincount(y[cut:], minlength=len(names)).max() / len(right))
    return {**rate_of(right.tolist()).to_dict(), "chance": round(chance, 4)}


# --- page -------------------------------------------------------------------------------------------------------------


def section(row: Row) -> str:
    """Tables and finding."""
    header = ["estimator", "tokens", "prompt share of the variance", "deviation over prompts / of the noise"]
    header += ["cosine of two prompts", "dimensions", "nats a value"]
    cells: list[list[object]] = []
    probes: list[list[object]] = []
    for name, axes in row["estimators"].items():
        for axis, f in axes.items():
            deviations = f"{f['deviation_over_prompts']:.3g} / {f['deviation_of_noise']:.3g}"
            cells.append([name, axis, cell(f["prompt_share"]), deviations, f["cosine_of_two_prompts"]])
            cells[-1] += [f["dimensions"], f["nats_a_value"]]
            probes.append([name, axis, *(f"{p['rate']:.3f} ({p['chance']:.3f})" for p in f["probe"].values())])
    return (
        f"Priors of {row['count']} captions of one source.\n\n"
        + table(header, cells)
        + "\nA linear probe on sampled priors of prompts it was not fitted on: share right (chance: the most frequent "
        "word).\n\n"
        + table(["estimator", "tokens", *PROBED], probes)
        + "\n"
        + "\n".join(f"- {line}" for line in findings(row))
        + "\n"
    )


def findings(row: Row) -> list[str]:
    """Which estimators have collapsed, and what can be read from them."""
    lines = []
    for name, axes in row["estimators"].items():
        for axis, f in axes.items():
            read = [what for what, p in f["probe"].items() if p["low"] > p["chance"]]
            cosine = f["cosine_of_two_prompts"]
            same = f"; two prompts have nearly the same mean (cosine {cosine:.3f})" if cosine > 0.9 else ""
            lines.append(
                f"{name}, {axis} tokens: {listed(read) or 'nothing'} can be read above chance, and the prompt makes "
                f"{100 * f['prompt_share']['value']:.1f} % of the variance{same}."
                + ("" if read else " They have collapsed.")
            )
    return lines


def plot(row: Row, path: Path) -> None:
    """Prompt shares, and what the probe reads less chance."""
    from matplotlib.figure import Figure as Sheet

    names = [f"{name}, {axis}" for name, axes in row["estimators"].items() for axis in axes]
    found = [f for axes in row["estimators"].values() for f in axes.values()]
    sheet = Sheet(figsize=(13, 4.2), layout="constrained")
    left, right = sheet.subplots(1, 2)
    bars(left, names, [f["prompt_share"] for f in found], "share of the prompt in the variance", None)
    left.set_xlim(0, 1)
    above = np.array([[p["rate"] - p["chance"] for p in f["probe"].values()] for f in found])
    image = right.imshow(above, cmap="viridis", vmin=0, vmax=max(0.2, float(above.max())), aspect="auto")
    right.set(xticks=range(len(PROBED)), xticklabels=PROBED, yticks=range(len(names)), yticklabels=[""] * len(names))
    right.set_title("linear probe, share right less chance")
    for y, line in enumerate(above):
        for place, value in enumerate(line):
            right.text(place, y, f"{value:+.2f}", ha="center", va="center", color="white", fontsize=8)
    sheet.colorbar(image, ax=right)
    save_figure(sheet, path)
