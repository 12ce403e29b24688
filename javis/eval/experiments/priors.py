"""(a) Prior ablation: clips of the same prompts and noise with other priors than the estimator's.

The caption itself still reaches the transformer by its text attention; only the prior tokens of the guided half change.

* zero: prior tokens of zeros, which the transformer has never seen;
* null: the learned "no prior" tokens, which it saw in the share of training samples without condition;
* random: Gaussian tokens with mean and deviation of the real ones, token by token and channel by channel;
* swapped: the priors of another prompt, a derangement of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from javis.eval.experiments.common import (
    TEACHER,
    Context,
    Row,
    as_figure,
    bars,
    cell,
    excludes,
    listed,
    save_figure,
    table,
)
from javis.eval.frechet_features import SETS
from javis.eval.steps_points import MeasuredClip, Setting
from javis.eval.steps_report import accuracy_of, f1_of, figure_of, frechet_of, frechet_ratio, offset_of, shuffled_f1
from javis.generation import clip_generator
from javis.model.prior import Priors
from javis.pipeline import JavisPipeline
from javis.variants import Variant

if TYPE_CHECKING:
    from javis.eval.steps_prompts import Prompt

TITLE = "Prior ablation"
COUNT = 32

Source = Literal["zero", "null", "random", "swapped"]
SOURCES: tuple[Source, ...] = ("zero", "null", "random", "swapped")
SAME_CLIP = 0.05  # of the distance between two prompts' clips: what changes less is called the same clip
NOISE_STREAM = 7  # of a clip's seed, for random priors; 0 to 2 are the pipeline's


class ReplacedPriors(JavisPipeline):
    """A pipeline that shares the components of another one, with priors from elsewhere."""

    source: Source
    partners: dict[int, tuple[str, int]]
    moments: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        pipe: JavisPipeline,
        source: Source,
        partners: dict[int, tuple[str, int]],
        moments: tuple[Tensor, Tensor],
    ) -> ReplacedPriors:
        """
        Args:
            pipe: is not changed.
            source: what stands for the priors.
            partners: seed of a clip -> caption and seed of the clip whose priors it gets ("swapped").
            moments: mean and deviation of real priors, [Ns + Nt, C] each ("random").
        """
        made = cls.__new__(cls)
        made.__dict__.update(pipe.__dict__)
        made.source, made.partners, made.moments = source, partners, moments
        return made

    def estimate_priors(self, text: Tensor, seeds: Sequence[int], *, zero_prior: bool = False) -> Priors:
        """Priors of clips with these seeds; ``text`` is used by no source."""
        if self.source == "swapped":
            others = [self.partners[seed] for seed in seeds]
            told = self.encode_text([words for words, _ in others], for_prior=True)[0]
            return super().estimate_priors(told, [seed for _, seed in others])
        real = super().estimate_priors(text, seeds)
        if self.source == "zero":
            return Priors(spatial=torch.zeros_like(real.spatial), temporal=torch.zeros_like(real.temporal))
        if self.source == "null":
            spatial, temporal = self.model.null_prior
            return Priors(spatial=spatial.expand_as(real.spatial), temporal=temporal.expand_as(real.temporal))
        mean, deviation = (x.to(real.spatial) for x in self.moments)
        noise = [torch.randn(mean.shape, generator=clip_generator(seed, NOISE_STREAM)) for seed in seeds]
        tokens = mean + deviation * torch.stack(noise).to(mean)
        spatial, temporal = tokens.split((real.spatial.shape[1], real.temporal.shape[1]), dim=1)
        return Priors(spatial=spatial, temporal=temporal)


class Arms:
    """A pipeline whose call takes ``priors``: one of `SOURCES`, or nothing for the real ones."""

    def __init__(self, pipe: JavisPipeline, prompts: Sequence[Prompt]) -> None:
        self.pipe = pipe
        self.partners = partners_of(prompts)
        self.moments = prior_moments(pipe, prompts)

    def __call__(self, captions: list[str], *, variant: Variant | None = None, **options: Any) -> Any:
        source = options.pop("priors", None)
        pipe = self.pipe if source is None else ReplacedPriors.of(self.pipe, source, self.partners, self.moments)
        return pipe(captions, variant=variant, **options)


def partners_of(prompts: Sequence[Prompt]) -> dict[int, tuple[str, int]]:
    """Seed of each prompt -> caption and seed of another one; every prompt is the partner of one.

    Raises:
        ValueError: fewer than two prompts.
    """
    from javis.world import caption

    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts cannot be swapped; expected at least 2")
    order = np.random.default_rng(0).permutation(len(prompts))
    pairs = zip(order, np.roll(order, 1), strict=True)
    return {prompts[a].seed: (caption(prompts[b].scene), prompts[b].seed) for a, b in pairs}


def prior_moments(pipe: JavisPipeline, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Mean and deviation over prompts of the sampled priors, [Ns + Nt, C] each."""
    tokens = real_priors(pipe, prompts)
    return tokens.mean(0), tokens.std(0)


def real_priors(pipe: JavisPipeline, prompts: Sequence[Prompt]) -> Tensor:
    """Sampled priors of prompts, spatial tokens first, [N, Ns + Nt, C]."""
    from javis.world import caption

    found = []
    for prompt in prompts:  # one by one: captions differ in length, and a clip does not depend on its batch
        _, _, priors = pipe.encode_prompts(pipe.captions([caption(prompt.scene)]), [prompt.seed])
        found.append(torch.cat((priors.spatial, priors.temporal), dim=1)[0])
    return torch.stack(found)


# --- figures ----------------------------------------------------------------------------------------------------------


def run(context: Context) -> dict[str, Any]:
    """Clips of all prompts with every kind of priors; figures of each, and differences to the real ones."""
    arms = Arms(context.pipe, context.prompts)
    clips: dict[str, list[MeasuredClip]] = {}
    for name in ("real", *SOURCES):
        options = {} if name == "real" else {"priors": name}
        point = context.point(Setting(TEACHER, context.steps, options), arms)
        clips[name] = [point.clips[number] for number in range(len(context.prompts))]
    return figures(clips)


def figures(clips: dict[str, list[MeasuredClip]]) -> dict[str, Any]:
    """Figures of the clips of each source of priors, "real" among them; the same prompts in the same order."""
    real = clips["real"]
    return {
        "prompts": len(real),
        "arms": {
            name: {
                "f1": figure_of(f1_of(mine)),
                "shuffled_f1": shuffled_f1(mine),
                "mean_abs_offset_ms": figure_of(offset_of(mine), 2),
                "accuracy": figure_of(accuracy_of(mine)),
                "side": figure_of(accuracy_of(mine, ["side"])),
                "frechet": {part: _jackknifed(frechet_of(mine, part)) for part in SETS},
            }
            for name, mine in clips.items()
        },
        "less_real": {
            name: {
                "f1": as_figure(f1_of(mine).difference(f1_of(real))),
                "mean_abs_offset_ms": as_figure(offset_of(mine).difference(offset_of(real)), 2),
                "accuracy": as_figure(accuracy_of(mine).difference(accuracy_of(real))),
                "side": as_figure(accuracy_of(mine, ["side"]).difference(accuracy_of(real, ["side"]))),
                "frechet_ratio": {part: _jackknifed(frechet_ratio(mine, real, part)) for part in SETS},
                "changed": changed(mine, real),
            }
            for name, mine in clips.items()
            if name != "real"
        },
    }


def changed(mine: Sequence[MeasuredClip], real: Sequence[MeasuredClip]) -> float | None:
    """Root mean square distance of the features of picture and sound to the clip with real priors, over that between
    clips of different prompts: 0 = the same clip, 1 = as far as another prompt's."""
    rows = [(a.features["both"], b.features["both"]) for a, b in zip(mine, real, strict=True) if "both" in a.features]
    if len(rows) < 2:
        return None
    ours, theirs = np.stack([a for a, _ in rows]), np.stack([b for _, b in rows])
    between = 2 * theirs.var(axis=0, ddof=1).sum()  # mean squared distance of two independent draws
    return round(float(np.sqrt(((ours - theirs) ** 2).sum(axis=1).mean() / between)), 4)


def _jackknifed(found: Any) -> dict[str, float] | None:
    return None if found is None else {name: round(float(x), 4) for name, x in found._asdict().items()}


# --- page -------------------------------------------------------------------------------------------------------------


def section(row: Row) -> str:
    """Table and finding."""
    header = ["priors", "event F1", "shuffled", "mean offset, ms", "caption accuracy", "side"]
    header += [f"Frechet, {part}" for part in SETS]
    cells = [
        [name, cell(arm["f1"]), f"{arm['shuffled_f1']:.3f}" if arm["shuffled_f1"] is not None else "-"]
        + [cell(arm["mean_abs_offset_ms"], 1), cell(arm["accuracy"]), cell(arm["side"])]
        + [cell(arm["frechet"][part], 2, "corrected") for part in SETS]
        for name, arm in row["arms"].items()
    ]
    text = (
        f"{row['prompts']} held-out prompts, {row['steps']} steps; same prompts and noise for every source of priors. "
        "The text attention sees the caption in all of them. zero: tokens of zeros; null: the learned tokens of "
        '"no prior"; random: Gaussian tokens with mean and deviation of real ones; swapped: those of another '
        "prompt.\n\n"
    )
    text += table(header, cells)
    less = [
        [name, cell(d["f1"], sign=True), cell(d["mean_abs_offset_ms"], 1, sign=True), cell(d["accuracy"], sign=True)]
        + [cell(d["side"], sign=True), *(cell(d["frechet_ratio"][part], 2, "corrected") for part in SETS), d["changed"]]
        for name, d in row["less_real"].items()
    ]
    header = ["less real", "event F1", "offset, ms", "caption accuracy", "side"]
    header += [f"Frechet over real's, {part}" for part in SETS] + ["change"]
    text += (
        "\nPaired differences (bootstrap over prompts; ratios of distances: jackknife). Change: distance of features "
    )
    text += "to the clip with real priors, 1 = that of two prompts.\n\n" + table(header, less)
    return text + "\n" + "\n".join(f"- {line}" for line in findings(row)) + "\n"


def findings(row: Row) -> list[str]:
    """What the intervals say, a line for each source."""
    lines = []
    for name, d in row["less_real"].items():
        named = {"event F1": d["f1"], "offset": d["mean_abs_offset_ms"], "caption accuracy": d["accuracy"]}
        moved = [f"{what} {figure['value']:+.3g}" for what, figure in named.items() if excludes(figure)]
        ratios = d["frechet_ratio"]
        moved += [
            f"Frechet distance of {part if part != 'both' else 'both together'} times {ratios[part]['corrected']:.2f}"
            for part in SETS
            if excludes(ratios[part], 1.0)
        ]
        unmoved = "no figure differs from that of real priors (every interval holds no difference)"
        found = listed(moved) if moved else unmoved
        lines.append(f"{name} priors: {_how_far(d['changed'])}{found}.")
    return lines


def _how_far(change: float | None) -> str:
    if change is None:
        return ""
    same = "nearly the same clips" if change < SAME_CLIP else "changed clips"
    return f"{same} (change {change:.3f}); "


def plot(row: Row, path: Path) -> None:
    """Differences to real priors with their intervals."""
    from matplotlib.figure import Figure as Sheet

    names = list(row["less_real"])
    panels: list[tuple[str, Any, float]] = [
        ("event F1, less real", lambda d: d["f1"], 0.0),
        ("offset in ms, less real", lambda d: d["mean_abs_offset_ms"], 0.0),
        ("caption accuracy, less real", lambda d: d["accuracy"], 0.0),
        *((f"Frechet {part}, over real's", partial(_ratio, part), 1.0) for part in SETS),
    ]
    sheet = Sheet(figsize=(13, 5), layout="constrained")
    for axes, (title, read, level) in zip(sheet.subplots(2, 3).flat, panels, strict=True):
        bars(axes, names, [read(row["less_real"][name]) for name in names], title, level)
    save_figure(sheet, path)


def _ratio(part: str, d: Row) -> Any:
    return d["frechet_ratio"][part]
