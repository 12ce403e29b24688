"""The audit of stage 2: which asynchronous twins of world clips an estimator calls asynchronous.

For every clip and every kind of negative the estimator gives two logits (its discriminator, on the spatial and on the
temporal axis) and two distances to the prior drawn from the caption (1 - mean cosine of the tokens, what the hinge loss
acts on). Verdicts:

* **discriminator**: asynchronous if the logit of either axis lies below its margin. A margin is the quantile of that
  axis' logits over other true clips below which ``FALSE_ALARMS / 2`` of them lie: about that share of true clips, per
  axis, is called asynchronous.
* **own axis**: the same with only the axis on which the kind is contrasted in training, and ``FALSE_ALARMS`` of it.
* **hinge**: asynchronous if the pair is farther from the prior than the true pair of the same clip (sum over axes).
* **hinge alone**: asynchronous if that distance lies above the margin that ``FALSE_ALARMS`` of other true clips exceed.
  Harder: how near a true pair comes to its prior differs from clip to clip, as a caption leaves much open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from javis.data.negatives import KINDS
from javis.data.negatives_world import draw_scene, world_clip, world_negatives
from javis.model.codecs import AudioCodec, VideoCodec
from javis.model.prior import PriorEstimator
from javis.train.prior_latents import video_tensor
from javis.world import WorldConfig, caption

FALSE_ALARMS = 0.05
BAR = 0.9
CALIBRATION_SEED = 1_600_000_000  # of true clips that set the margins; audited clips have other seeds
AXES = ("spatial", "temporal")
TRUE = "true clip"


@dataclass(frozen=True)
class Encoded:
    """Latents of one clip and of its negatives."""

    caption: str
    video: Tensor  # [1 + pictures, C, T, H, W], the clip's own first
    audio: Tensor  # [1 + sounds, C, Ta, M], the clip's own first
    pairs: tuple[tuple[str, int, int], ...]  # (kind or TRUE, picture, sound)


@torch.no_grad()
def encode_clip(
    seed: int, world: WorldConfig, video_codec: VideoCodec, audio_codec: AudioCodec, kinds: Sequence[str], split: str
) -> Encoded:
    """The world clip of a seed with one negative of each of ``kinds`` that it has."""
    scene = draw_scene(seed, world, split=split)
    clip = world_clip(scene)
    rng = np.random.default_rng([seed, 23])
    made = world_negatives(scene, clip, rng, kinds=kinds, split=split) if kinds else {}
    videos, sounds, pairs = [clip.video], [clip.waveform], [(TRUE, 0, 0)]
    for kind, negative in made.items():
        if negative.video is not None:
            pairs.append((kind, len(videos), 0))
            videos.append(negative.video)
        elif negative.waveform is not None:
            pairs.append((kind, 0, len(sounds)))
            sounds.append(negative.waveform)
    video = video_codec.encode(video_tensor(np.stack(videos)))
    return Encoded(caption(scene), video, audio_codec.encode(torch.from_numpy(np.stack(sounds))), tuple(pairs))


@torch.no_grad()
def score(
    estimator: PriorEstimator, encoded: Encoded, text: Tensor, frame: tuple[int, int], generator: torch.Generator
) -> dict[str, NDArray[np.float64]]:
    """[2, 2] of every pair of a clip: rows spatial and temporal, columns logit and distance to the prior."""
    priors = estimator.encode(text, generator=generator)
    height, width = (torch.full((len(encoded.video),), float(size)) for size in frame)
    videos = estimator.embed_video(encoded.video, height, width)
    audios = estimator.embed_audio(encoded.audio)
    pictures, sounds = [v for _, v, _ in encoded.pairs], [a for _, _, a in encoded.pairs]
    found = []
    for axis, video, audio in zip(AXES, videos, audios, strict=True):
        prior = getattr(priors, axis).expand(len(pictures), -1, -1)
        embeds = estimator.embed_pairs(axis, video[pictures], audio[sounds])  # type: ignore[arg-type]
        distance = 1 - F.cosine_similarity(prior, embeds, dim=-1).mean(dim=1)
        found.append(torch.stack((estimator.discriminator(prior, embeds), distance), dim=1))
    values = torch.stack(found, dim=1).double().numpy()  # [pairs, axes, 2]
    return {kind: values[i] for i, (kind, _, _) in enumerate(encoded.pairs)}


@dataclass(frozen=True)
class Rate:
    """A share of clips with its 95 % interval (Wilson 1927)."""

    hits: int
    clips: int

    @property
    def value(self) -> float:
        return self.hits / self.clips if self.clips else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        if not self.clips:
            return (0.0, 1.0)
        n, p, z = self.clips, self.value, 1.959964
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"rate": round(self.value, 4), "low": round(low, 4), "high": round(high, 4), "clips": self.clips}


def rate_of(verdicts: Sequence[bool]) -> Rate:
    return Rate(int(sum(verdicts)), len(verdicts))


@dataclass(frozen=True)
class Margins:
    """Logits below which a pair is called asynchronous, [spatial, temporal]."""

    either: NDArray[np.float64]  # for verdicts on both axes together
    own: NDArray[np.float64]  # for verdicts on one axis
    distance: float  # sum of both distances above which a pair is called asynchronous without its clip's true pair

    @classmethod
    def of(cls, scores: Sequence[NDArray[np.float64]]) -> Margins:
        """From the scores [2, 2] of true clips."""
        logits, distances = np.stack(scores)[:, :, 0], np.stack(scores)[:, :, 1].sum(axis=1)
        either, own = (np.quantile(logits, share, axis=0) for share in (FALSE_ALARMS / 2, FALSE_ALARMS))
        return cls(either, own, float(np.quantile(distances, 1 - FALSE_ALARMS)))


def verdicts(clips: Sequence[Mapping[str, NDArray[np.float64]]], margins: Margins) -> dict[str, Any]:
    """Shares of what is called asynchronous by kind, and of true clips that are called synchronous.

    Args:
        clips: for each clip, kind (and TRUE) -> [2, 2] as of :func:`score`.
        margins: from other true clips.
    """

    def either(x: NDArray[np.float64]) -> bool:
        return bool((x[:, 0] < margins.either).any())

    kinds: dict[str, Any] = {}
    for kind, what in KINDS.items():
        axis = AXES.index(what.axis)
        pairs = [(clip[kind], clip[TRUE]) for clip in clips if kind in clip]
        kinds[kind] = {
            "discriminator": rate_of([either(x) for x, _ in pairs]).to_dict(),
            "own_axis": rate_of([bool(x[axis, 0] < margins.own[axis]) for x, _ in pairs]).to_dict(),
            "hinge": rate_of([bool(x[:, 1].sum() > true[:, 1].sum()) for x, true in pairs]).to_dict(),
            "hinge_alone": rate_of([bool(x[:, 1].sum() > margins.distance) for x, _ in pairs]).to_dict(),
            "hinge_own_axis": rate_of([bool(x[axis, 1] > true[axis, 1]) for x, true in pairs]).to_dict(),
        }
    true = [clip[TRUE] for clip in clips]
    synchronous = {
        "discriminator": rate_of([not either(x) for x in true]).to_dict(),
        "hinge_alone": rate_of([bool(x[:, 1].sum() <= margins.distance) for x in true]).to_dict(),
        "spatial_axis": rate_of([bool(x[0, 0] >= margins.own[0]) for x in true]).to_dict(),
        "temporal_axis": rate_of([bool(x[1, 0] >= margins.own[1]) for x in true]).to_dict(),
    }
    return {"kinds": kinds, "synchronous": synchronous}


def audit(
    estimators: Mapping[str, PriorEstimator],
    video_codec: VideoCodec,
    audio_codec: AudioCodec,
    encode_text: Callable[[list[str]], Tensor],
    world: WorldConfig,
    *,
    count: int,
    calibration: int,
    seed: int,
    split: str = "any",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Audit estimators on the same clips.

    Args:
        estimators: by name, each with its embedding network.
        video_codec, audio_codec, encode_text: of the checkpoint, on the CPU.
        world: format of the clips.
        count: audited clips, of seeds ``seed + i``; calibration: true clips that set the margins.
        split: combinations that clips and added material may show.
        progress: called with the number of clips done.

    Returns:
        name -> what :func:`verdicts` returns.
    """
    frame = (world.size, world.size)
    true: dict[str, list[NDArray[np.float64]]] = {name: [] for name in estimators}
    clips: dict[str, list[dict[str, NDArray[np.float64]]]] = {name: [] for name in estimators}
    for number in range(calibration + count):
        measured = number >= calibration
        own = seed + number - calibration if measured else CALIBRATION_SEED + number
        encoded = encode_clip(own, world, video_codec, audio_codec, tuple(KINDS) if measured else (), split)
        text = encode_text([encoded.caption])
        for name, estimator in estimators.items():
            found = score(estimator.eval(), encoded, text, frame, torch.Generator().manual_seed(own))
            if measured:
                clips[name].append(found)
            else:
                true[name].append(found[TRUE])
        progress(number + 1)
    return {name: verdicts(clips[name], Margins.of(true[name])) for name in estimators}


def below_bar(report: Mapping[str, Any]) -> list[str]:
    """Kinds that the discriminator or the hinge calls asynchronous less often than ``BAR``, with the figures."""
    return [
        f"{kind} ({name} {rates[name]['rate']:.3f})"
        for kind, rates in report["kinds"].items()
        for name in ("discriminator", "hinge")
        if not rates[name]["rate"] >= BAR
    ]
