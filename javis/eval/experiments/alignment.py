"""(d) The prior estimator on pairs whose alignment is known, before and after contrastive training.

Pairs are made of world clips of one sounding source at the left or right:

* in time: the sound turned round by -500 to 500 ms (what leaves at one end comes in at the other, so nothing but the
  alignment changes);
* in place: the picture mirrored, so that what the caption has on the left is on the right;
* other sound, other picture: those of another clip.

Two scores of a pair on the axis that it is changed on: the discriminator's logit, and the distance of the pair's
embedding to the prior (1 - mean cosine). Ranking accuracy: how often the true pair of the same clip scores better.
Retrieval: which of `GROUP` true pairs is nearest to the prior of a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from javis.console import progress_bar
from javis.eval.experiments.common import Context, Row, as_figure, cell, excludes, listed, save_figure, table
from javis.eval.experiments.estimators import Trained, trained
from javis.eval.negatives import AXES, TRUE, Encoded, rate_of, score
from javis.eval.stats import bootstrap_interval
from javis.model.prior import PriorEstimator
from javis.train.prior_latents import video_tensor
from javis.world import Scene, WorldConfig, caption, render_audio, render_video, sample_scene

TITLE = "Prior estimator on pairs of known alignment"
COUNT = 64
FIRST_SEED = 1_700_000_000  # neither training nor the audit draws clips from here
SHIFTS_MS = (62.5, 125, 250, 500)
GROUP = 16
HOW = ("discriminator", "distance")
MIRRORED, OTHER_SOUND, OTHER_PICTURE = "mirrored picture", "sound of another clip", "picture of another clip"


def scenes(count: int, world: WorldConfig) -> list[Scene]:
    """Scenes of one source that is seen and heard, at the left and the right."""
    found: list[Scene] = []
    seed = FIRST_SEED
    while len(found) < count:
        scene = sample_scene(seed, world, sources=1)
        seed += 1
        if scene.sources[0].side in ("left", "right"):
            found.append(scene)
    return found


def turned(waveform: np.ndarray, milliseconds: float, sample_rate: int) -> np.ndarray:
    """The sound [N] later (earlier if negative), turned round at the ends."""
    return np.roll(waveform, round(milliseconds * sample_rate / 1000))


@torch.no_grad()
def encode(scene: Scene, other: Scene, parts: Trained) -> Encoded:
    """Latents of a clip and of its misaligned pairs."""
    video, audio, rate = render_video(scene), render_audio(scene), scene.config.sample_rate
    videos = [video, video[:, :, ::-1], render_video(other)]
    pairs = [(TRUE, 0, 0), (MIRRORED, 1, 0), (OTHER_PICTURE, 2, 0), (OTHER_SOUND, 0, 1)]
    sounds = [audio, render_audio(other)]
    for shift in SHIFTS_MS:
        for sign in (-1, 1):
            pairs.append((f"{sign * shift:g} ms", 0, len(sounds)))
            sounds.append(turned(audio, sign * shift, rate))
    pictures = parts.video_codec.encode(video_tensor(np.stack(videos)))
    return Encoded(caption(scene), pictures, parts.audio_codec.encode(torch.from_numpy(np.stack(sounds))), tuple(pairs))


@torch.no_grad()
def embeddings(
    estimator: PriorEstimator, encoded: Encoded, text: Tensor, size: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Axis -> prior of the caption and embedding of the true pair, [tokens, C] each."""
    priors = estimator.encode(text, generator=torch.Generator().manual_seed(seed))
    side = torch.full((1,), float(size))
    videos, sounds = estimator.embed_video(encoded.video[:1], side, side), estimator.embed_audio(encoded.audio[:1])
    return {
        axis: (getattr(priors, axis)[0], estimator.embed_pairs(axis, v, a)[0])  # type: ignore[arg-type]
        for axis, v, a in zip(AXES, videos, sounds, strict=True)
    }


def run(context: Context) -> dict[str, Any]:
    """Scores of ``context.count`` clips by the estimator with its initial and with its trained weights."""
    parts = trained(context)
    drawn = scenes(context.count, parts.world)
    estimators = {"before": parts.before, "after": parts.after}
    scores: dict[str, list[dict[str, NDArray[np.float64]]]] = {name: [] for name in estimators}
    found: dict[str, list[dict[str, tuple[Tensor, Tensor]]]] = {name: [] for name in estimators}
    size = parts.world.size
    with progress_bar("clips", len(drawn)) as advance:
        for number, scene in enumerate(drawn):
            encoded = encode(scene, drawn[(number + 1) % len(drawn)], parts)
            text = parts.encode_text([encoded.caption])
            for name, estimator in estimators.items():
                noise = torch.Generator().manual_seed(scene.seed)
                scores[name].append(score(estimator, encoded, text, (size, size), noise))
                found[name].append(embeddings(estimator, encoded, text, size, scene.seed))
            advance(number + 1)
    return {name: {**ranking(scores[name]), "retrieval": retrieval(found[name])} for name in estimators}


def ranking(clips: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, Any]:
    """Ranking accuracies of clips.

    Args:
        clips: for each, kind of pair (and TRUE) -> [2, 2]: rows spatial and temporal, columns logit and distance.

    Returns:
        ``pairs``: kind -> "axis", "discriminator" and "distance" (`Rate`); ``order``: mean rank correlation of the
        temporal logit with minus the size of the shift, with its bootstrap interval over clips.
    """
    kinds: dict[str, tuple[int, list[str]]] = {
        MIRRORED: (0, [MIRRORED]),
        OTHER_PICTURE: (0, [OTHER_PICTURE]),
        OTHER_SOUND: (1, [OTHER_SOUND]),
    }
    kinds |= {f"{shift:g} ms": (1, [f"{-shift:g} ms", f"{shift:g} ms"]) for shift in SHIFTS_MS}
    pairs = {}
    for kind, (axis, names) in kinds.items():
        both = [(clip[name][axis], clip[TRUE][axis]) for clip in clips for name in names]
        pairs[kind] = {
            "axis": AXES[axis],
            "discriminator": rate_of([bool(x[0] < true[0]) for x, true in both]).to_dict(),
            "distance": rate_of([bool(x[1] > true[1]) for x, true in both]).to_dict(),
        }
    sizes = [0.0] + [shift for shift in SHIFTS_MS for _ in range(2)]
    names = [TRUE] + [f"{sign * shift:g} ms" for shift in SHIFTS_MS for sign in (-1, 1)]
    order = [rank_correlation([-s for s in sizes], [float(clip[n][1, 0]) for n in names]) for clip in clips]
    ends = bootstrap_interval(order, lambda some: float(np.mean(some)))
    return {"pairs": pairs, "order": None if ends is None else as_figure((float(np.mean(order)), *ends))}


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values at their mean rank; 0 if one side is constant."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        x = np.asarray(values, float)
        return (x[:, None] > x).sum(axis=1) + 0.5 * ((x[:, None] == x).sum(axis=1) - 1)

    left, right = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale else 0.0


def retrieval(clips: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """How often the prior of a caption is nearest to its own pair among those of `GROUP` clips, by axis; a last group
    with fewer clips is left out. ``chance`` beside it."""
    found: dict[str, Any] = {"group": min(GROUP, len(clips))}
    found["chance"] = round(1 / found["group"], 4)
    for axis in AXES:
        hits: list[bool] = []
        for start in range(0, len(clips) - found["group"] + 1, found["group"]):
            some = clips[start : start + found["group"]]
            priors, embeds = (torch.stack([clip[axis][i] for clip in some]) for i in (0, 1))
            near = F.cosine_similarity(priors[:, None], embeds[None], dim=-1).mean(-1)  # [captions, pairs]
            hits += (near.argmax(1) == torch.arange(len(some))).tolist()
        found[axis] = rate_of(hits).to_dict()
    return found


# --- page -------------------------------------------------------------------------------------------------------------


def section(row: Row) -> str:
    """Table and finding."""
    after = row["after"]
    cells = [
        [kind, found["axis"], *(_rate(row[when]["pairs"][kind][how]) for how in HOW for when in ("before", "after"))]
        for kind, found in after["pairs"].items()
    ]
    group = after["retrieval"]["group"]
    text = (
        f"{row['count']} clips of one source; share of pairs that score worse than the true pair of the clip (chance "
        "0.5). Shifts turn the sound round, both directions counted as pairs of their own; initial weights, and after "
        "`javis train prior`.\n\n"
    )
    header = ["pair", "axis", "discriminator before", "discriminator", "distance before", "distance"]
    text += table(header, cells)
    found = [
        [f"rank correlation of the logit with the shift ({what})", cell(row[what]["order"], sign=True)]
        for what in ("before", "after")
    ]
    found += [
        [f"caption finds its pair among {group}, {axis} axis ({what}; chance {after['retrieval']['chance']:.3f})"]
        + [_rate(row[what]["retrieval"][axis])]
        for axis in AXES
        for what in ("before", "after")
    ]
    text += "\n" + table(["", "[95 %]"], found)
    return text + "\n" + "\n".join(f"- {line}" for line in findings(row)) + "\n"


def _rate(rate: Row) -> str:
    return f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


def findings(row: Row) -> list[str]:
    """What is told apart, and what is not."""
    lines = []
    for when, words in (("before", "Before training"), ("after", "After training")):
        pairs = row[when]["pairs"]
        for how in HOW:
            told = [kind for kind, found in pairs.items() if found[how]["low"] > 0.5]
            blind = [kind for kind in pairs if kind not in told]
            lines.append(
                f"{words} the {how} ranks above chance: {listed(told) or 'nothing'}"
                + (f"; not above chance: {listed(blind)}." if blind else ".")
            )
    order = row["after"]["order"]
    grows = "falls as the shift grows" if excludes(order) and order["value"] > 0 else "does not fall with the shift"
    lines.append(f"The trained temporal logit {grows} (rank correlation {cell(order, sign=True)}).")
    found = row["after"]["retrieval"]
    finds = [axis for axis in AXES if found[axis]["low"] > found["chance"]]
    lines.append(
        f"After training a caption's prior finds its own pair above chance on the {listed(finds)} axis."
        if finds
        else "After training a caption's prior does not find its own pair among others above chance: what tells pairs "
        "apart is in the embedding of picture and sound, not in what the caption says of them."
    )
    return lines


def plot(row: Row, path: Path) -> None:
    """Ranking accuracy by shift and by kind, before and after."""
    from matplotlib.figure import Figure as Sheet

    sheet = Sheet(figsize=(13, 4.2), layout="constrained")
    shifts, kinds = sheet.subplots(1, 2)
    for when, colour in (("before", "#999999"), ("after", "#1b2a41")):
        pairs = row[when]["pairs"]
        for how, style in zip(HOW, ("-", "--"), strict=True):
            rates = [pairs[f"{shift:g} ms"][how] for shift in SHIFTS_MS]
            values = [rate["rate"] for rate in rates]
            shifts.plot(SHIFTS_MS, values, style, color=colour, marker="o", label=f"{how}, {when}")
            shifts.fill_between(
                SHIFTS_MS, [r["low"] for r in rates], [r["high"] for r in rates], color=colour, alpha=0.12
            )
    shifts.axhline(0.5, color="#c0392b", linestyle=":", label="chance")
    shifts.set(xlabel="sound turned by, ms", ylabel="true pair scores better", title="shift in time", ylim=(0, 1.02))
    shifts.set(xscale="log", xticks=SHIFTS_MS, xticklabels=[f"{s:g}" for s in SHIFTS_MS])
    shifts.minorticks_off()
    shifts.legend(fontsize=8)
    names = [MIRRORED, OTHER_PICTURE, OTHER_SOUND]
    for offset, (when, how) in enumerate((w, h) for h in HOW for w in ("before", "after")):
        rates = [row[when]["pairs"][name][how] for name in names]
        places = np.arange(len(names)) + (offset - 1.5) * 0.18
        colour = "#1b2a41" if when == "after" else "#999999"
        kinds.bar(
            places,
            [r["rate"] for r in rates],
            0.16,
            color=colour,
            hatch="//" if how == "distance" else "",
            edgecolor="white",
            yerr=[[r["rate"] - r["low"] for r in rates], [r["high"] - r["rate"] for r in rates]],
            label=f"{how}, {when}",
        )
    kinds.axhline(0.5, color="#c0392b", linestyle=":")
    kinds.set(xticks=range(len(names)), xticklabels=names, ylim=(0, 1.02), title="in place, and other clips")
    kinds.legend(fontsize=8)
    save_figure(sheet, path)
