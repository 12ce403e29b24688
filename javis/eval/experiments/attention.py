"""(b) What the spatial prior attention and the bidirectional attention look at, against truth.

*Noised clips*: world clips of a caption "... on the left" (or right), noised to `LEVELS`, go through the transformer
once, told their caption and its priors; where things are and when they sound is known exactly. *Generated clips* of the
same captions: probabilities over all steps of sampling; truth is what the detectors find in the clip.

A score is given as the mean over all heads (and prior tokens), and for the one that is best on half of the noised
clips, scored on the other half. The priors of the same caption with its sides exchanged say whether it is the prior
that points at a side, or the picture itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from javis.console import progress_bar
from javis.eval.experiments.attention_record import recorded
from javis.eval.experiments.attention_scores import MEASURES, Score, scores
from javis.eval.experiments.attention_truth import KINDS, OPPOSITE, Truth, scenes, truth_of_clip, truth_of_scene
from javis.eval.experiments.common import Context, Figure, Row, as_figure, cell, excludes, save_figure, table
from javis.eval.stats import Ratio
from javis.flow import add_noise
from javis.generation import clip_noise
from javis.pipeline import JavisPipeline
from javis.train.prior_latents import video_tensor
from javis.world import Scene, WorldConfig, caption, render_audio, render_video

TITLE = "Attention maps"
COUNT = 24
LEVELS = (900.0, 600.0, 300.0)  # timesteps of noised clips; 1000 is noise alone
GENERATED = ("single", "multiple")  # no caption asks for two things at the same time
SWAPPED = "prior_side_swapped"
PARTS = ("layer", "head", "token")
NEGLIGIBLE = 0.005  # of a share: a difference of less is called none, however small its interval


@dataclass(frozen=True)
class Example:
    """One clip with its maps, for the pictures."""

    name: str
    words: str
    video: np.ndarray
    audio: np.ndarray
    fps: float
    sample_rate: int
    maps: Mapping[str, np.ndarray]
    truth: Truth


@dataclass(frozen=True)
class Grids:
    """Tokens of picture (T, h, w) and sound (Ta, M)."""

    picture: tuple[int, int, int]
    sound: tuple[int, int]

    @classmethod
    def of(cls, pipe: JavisPipeline) -> Grids:
        video, audio = pipe.model.embed.video, pipe.model.embed.audio
        frames, samples = pipe.frames_of(2.0), 2 * pipe.sample_rate
        picture = video.grid(pipe.video_codec.latent_sizes(frames, *pipe.frame_size))
        return cls(picture, audio.grid(pipe.audio_codec.latent_sizes(samples)))  # type: ignore[arg-type]


def run(context: Context) -> dict[str, Any]:
    """Scores of ``context.count`` clips a kind, noised and generated; pictures of one clip of each in ``out``."""
    from javis.eval.experiments.attention_plot import plot_example

    pipe, world = context.pipe, WorldConfig(**context.form)
    grids = Grids.of(pipe)
    drawn = {kind: scenes(kind, context.count, world) for kind in KINDS}
    found: dict[str, list[dict[str, Score]]] = {}
    examples: list[Example] = []
    total = (len(KINDS) + len(GENERATED)) * context.count
    with progress_bar("clips", total) as advance:
        done = 0
        for kind in KINDS:
            found[kind] = []
            for scene in drawn[kind]:
                example = noised(pipe, scene, grids, kind)
                measured = scores(example.maps, example.truth)
                swapped = scores(noised(pipe, scene, grids, kind, exchanged=True).maps, example.truth)
                found[kind].append(measured | {SWAPPED: against(measured["prior_side"], swapped["prior_side"])})
                examples += [example] * (scene is drawn[kind][0])
                done += 1
                advance(done)
        for kind in GENERATED:
            name = f"{kind}, generated"
            found[name] = []
            for example in generated(context, drawn[kind], grids, name):
                found[name].append(scores(example.maps, example.truth))
                examples += [example] * (len(found[name]) == 1)
                done += 1
                advance(done)
    figures = summarise(found)
    best = {name: tuple(where) for name, where in figures["best"].items()}
    for example in examples:
        stem = example.name.replace(", ", "-")
        plot_example(example, best, context.out / f"attention-{stem}.png")
    return figures


def against(own: Score, other: Score) -> Score:
    """The side score with the priors of the caption whose sides are exchanged as the control."""
    return Score(own.share, own.chance, other.share)


# --- maps -------------------------------------------------------------------------------------------------------------


def exchanged_sides(words: str) -> str:
    """The caption with left and right exchanged."""
    return " ".join(OPPOSITE.get(word, word) for word in words.split())


@torch.no_grad()
def noised(pipe: JavisPipeline, scene: Scene, grids: Grids, name: str, *, exchanged: bool = False) -> Example:
    """Maps of a world clip, averaged over `LEVELS`; ``exchanged``: with the priors of the exchanged caption."""
    words, seed, count = caption(scene), scene.seed, len(LEVELS)
    video, audio = render_video(scene), render_audio(scene)
    text, mask, priors = pipe.encode_prompts(pipe.captions([words]), [seed])
    if exchanged:
        _, _, priors = pipe.encode_prompts(pipe.captions([exchanged_sides(words)]), [seed])
    condition = pipe.condition(
        text.expand(count, -1, -1),
        mask.expand(count, -1),
        type(priors)(spatial=priors.spatial.expand(count, -1, -1), temporal=priors.temporal.expand(count, -1, -1)),
        frames=len(video),
        samples=len(audio),
        guided=False,
    )
    t = torch.tensor(LEVELS)
    picture = pipe.video_codec.encode(video_tensor(video[None]))
    sound = pipe.audio_codec.encode(torch.from_numpy(audio)[None])
    x, y = (
        add_noise(clean.expand(count, *clean.shape[1:]), clip_noise(clean.shape[1:], [seed], stream, pipe.device), t)
        for stream, clean in ((1, picture), (2, sound))
    )
    with recorded(pipe.model, count) as found:
        pipe.model.denoise(x, y, t, condition)
    maps = {what: _numpy(found.mean(what).mean(dim=0)) for what in found.sums}
    config = scene.config
    truth = truth_of_scene(scene, pipe.audio_codec, grids.picture, grids.sound)
    return Example(name, words, video, audio, config.fps, config.sample_rate, maps, truth)


def generated(context: Context, drawn: Sequence[Scene], grids: Grids, name: str) -> Iterator[Example]:
    """Clips that the teacher makes of the captions of scenes, and their maps over all steps of sampling."""
    pipe = context.pipe
    for start in range(0, len(drawn), context.batch_size):
        part = drawn[start : start + context.batch_size]
        with recorded(pipe.model, len(part)) as found:
            batch = pipe(
                [caption(scene) for scene in part],
                seed=[scene.seed for scene in part],
                steps=context.steps,
                variant="teacher",
                batch_size=len(part),
            )
        means = {what: found.mean(what) for what in found.sums}
        for i, scene in enumerate(part):
            clauses = [dict(source.clause) for source in scene.sources]
            clip = (batch.video[i], batch.audio[i], batch.fps, batch.sample_rate)
            truth = truth_of_clip(*clip, clauses, pipe.audio_codec, grids.picture, grids.sound)
            maps = {what: _numpy(values[i]) for what, values in means.items()}
            yield Example(name, caption(scene), *clip, maps, truth)


def _numpy(x: Tensor) -> np.ndarray:
    return np.asarray(x.double().cpu().numpy())


# --- figures ----------------------------------------------------------------------------------------------------------


def fitted_half(number: int) -> bool:
    """Whether the clip is of the half on which the best head is chosen; both sides are in both halves."""
    return number // 2 % 2 == 0


def summarise(found: Mapping[str, Sequence[Mapping[str, Score]]]) -> dict[str, Any]:
    """Kind -> measure -> figures; ``best``: where the best head of each measure is (layer, head[, prior token]).

    It is the one with the largest share over that of its control (or over chance where there is none), on the first
    half of the noised clips; its figures are of the other half.
    """
    best = {name: best_head(found, name) for name in MEASURES}
    best[SWAPPED] = best["prior_side"]
    kinds: dict[str, Any] = {}
    for kind, clips in found.items():
        kinds[kind] = {}
        for name in (*MEASURES, SWAPPED):
            numbered = [(i, clip[name]) for i, clip in enumerate(clips) if name in clip]
            held_out = [score for i, score in numbered if not fitted_half(i)]
            if numbered and held_out:
                kinds[kind][name] = {
                    "clips": len(numbered),
                    "chance": round(float(np.mean([score.chance for _, score in numbered])), 4),
                    "mean": _figures([score for _, score in numbered], None),
                    "best": _figures(held_out, best[name]),
                }
    return {"kinds": kinds, "best": {name: list(where) for name, where in best.items()}}


def best_head(found: Mapping[str, Sequence[Mapping[str, Score]]], name: str) -> tuple[int, ...]:
    """Index of the head (and prior token) that scores best, see `summarise`."""
    gains = [
        clip[name].share - (clip[name].chance if clip[name].control is None else clip[name].control)
        for kind, clips in found.items()
        if kind in KINDS
        for i, clip in enumerate(clips)
        if name in clip and fitted_half(i)
    ]
    mean = np.mean(gains, axis=0)
    return tuple(int(i) for i in np.unravel_index(int(mean.argmax()), mean.shape))


def _figures(clips: Sequence[Score], where: tuple[int, ...] | None) -> dict[str, Any]:
    """Share, control, and the paired differences to chance and control; of one head or the mean of all.

    Those of the control are of the clips that have one.
    """

    def ratio(maps: Sequence[np.ndarray]) -> Ratio:
        return over_clips([float(np.mean(x) if where is None else x[where]) for x in maps])

    share, chance = ratio([score.share for score in clips]), over_clips([score.chance for score in clips])
    controlled = [score for score in clips if score.control is not None]  # a full clip may have no quiet moment
    entry: dict[str, Any] = {
        "share": as_figure((share.value, *share.interval())),  # type: ignore[misc, arg-type]
        "over_chance": as_figure(share.difference(chance)),
        "control": None,
        "over_control": None,
    }
    if controlled:
        control = ratio([score.control for score in controlled if score.control is not None])
        entry["control"] = round(float(control.value or 0.0), 4)
        entry["over_control"] = as_figure(ratio([score.share for score in controlled]).difference(control))
    return entry


def over_clips(values: Sequence[float]) -> Ratio:
    """The mean of one value per clip."""
    return Ratio(np.array(values), np.ones(len(values)))


# --- page -------------------------------------------------------------------------------------------------------------


def section(row: Row) -> str:
    """Tables and finding."""
    cells: list[list[object]] = []
    for name, words in MEASURES.items():
        for kind, found in row["kinds"].items():
            if name not in found:
                continue
            one = found[name]
            where = ", ".join(f"{part} {i}" for part, i in zip(PARTS, row["best"][name], strict=False))
            cells.append(
                [words, kind, f"{one['chance']:.3f}", cell(one["mean"]["share"]), _number(one["mean"]["control"])]
            )
            cells[-1] += [cell(one["best"]["share"]), _number(one["best"]["control"]), where]
    header = ["what", "clips", "chance", "mean of all heads", "its control", "best head", "its control", "which"]
    swapped = [
        [kind, cell(found[SWAPPED]["best"]["share"]), _number(found[SWAPPED]["best"]["control"])]
        + [
            cell(found[SWAPPED]["best"]["over_control"], sign=True),
            cell(found[SWAPPED]["mean"]["over_control"], sign=True),
        ]
        for kind, found in row["kinds"].items()
        if SWAPPED in found
    ]
    return (
        f'{row["count"]} clips of a kind, captions "... on the left" and "... on the right" in turn. Noised clips: '
        f"world clips at timesteps {', '.join(f'{t:g}' for t in LEVELS)}, exact truth; generated: {row['steps']} "
        "steps, truth from the detectors. Chance: mass spread evenly. Control: the same map against the place "
        "mirrored, or at moments without an event. The best head is chosen on half of the noised clips and scored on "
        "the other half. Near: within one latent frame (two frames of the picture) of the event's. The mean over all "
        "prior tokens is even almost by construction, as their shares of a place add up to 1.\n\n"
        + table(header, cells)
        + "\nSide score (source's side over both sides) of the same clips with their own priors, and with those of the "
        "caption whose sides are exchanged:\n\n"
        + table(["clips", "own priors", "exchanged", "difference, best head", "difference, mean of all"], swapped)
        + "\n"
        + "\n".join(f"- {line}" for line in findings(row))
        + "\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def counts(figure: Figure | None) -> bool:
    """Whether a difference is neither chance nor negligible."""
    return figure is not None and excludes(figure) and abs(figure["value"]) >= NEGLIGIBLE


def findings(row: Row) -> list[str]:
    """What is above its control, by measure."""
    lines = []
    for name, words in MEASURES.items():
        verdicts = []
        for kind, found in row["kinds"].items():
            if name not in found:
                continue
            best = found[name]["best"]
            figure = best["over_control"] if best["over_control"] is not None else best["over_chance"]
            what = "control" if best["over_control"] is not None else "chance"
            above = "above" if figure["value"] > 0 else "below"
            verdict = f"{above} {what} ({figure['value']:+.3f})" if counts(figure) else f"as {what}"
            verdicts.append(f"{kind}: {verdict}")
        lines.append(f"{words}, best head: {'; '.join(verdicts)}.")
    moved = {kind: found[SWAPPED]["best"]["over_control"] for kind, found in row["kinds"].items() if SWAPPED in found}
    steered = [kind for kind, figure in moved.items() if counts(figure)]
    lines.append(
        f"Exchanging the sides in the priors' caption moves the side score in: {', '.join(steered)}."
        if steered
        else "Exchanging the sides in the priors' caption does not move the side score: what lies on the side follows "
        "picture and caption, not the prior."
    )
    return lines


def plot(row: Row, path: Path) -> None:
    """Shares of mean and best head with chance and control, a panel for each measure."""
    from matplotlib.figure import Figure as Sheet

    sheet = Sheet(figsize=(15, 7), layout="constrained")
    panels = sheet.subplots(2, 4)
    for axes, (name, words) in zip(panels.flat, MEASURES.items(), strict=False):
        kinds = [kind for kind, found in row["kinds"].items() if name in found]
        for which, colour, shift in (("mean", "#999999", -0.17), ("best", "#1b2a41", 0.17)):
            for y, kind in enumerate(kinds):
                entry = row["kinds"][kind][name][which]
                share = entry["share"]
                axes.plot([share["low"], share["high"]], [y + shift] * 2, color=colour, linewidth=2)
                label = {"mean": "mean of all heads", "best": "best head"}[which] if y == 0 else None
                axes.plot([share["value"]], [y + shift], "o", color=colour, label=label)
                if entry["control"] is not None:
                    axes.plot(
                        [entry["control"]], [y + shift], "x", color=colour, label="its control" if y == 0 else None
                    )
        for y, kind in enumerate(kinds):
            chance = row["kinds"][kind][name]["chance"]
            label = "chance" if y == 0 else None
            axes.plot([chance, chance], [y - 0.4, y + 0.4], "--", color="#c0392b", label=label)
        axes.set(yticks=range(len(kinds)), yticklabels=kinds, ylim=(len(kinds) - 0.5, -0.5))
        axes.set_title(words, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels.flat[-1].axis("off")
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center")
    save_figure(sheet, path)
