"""Golden cases of the HiST-Sypo prior estimator (official STPriorExtractor)."""

from __future__ import annotations

import torch
from torch import Tensor

from javis.model.prior import PriorConfig, PriorEstimator, Priors

from .harness import GoldenCase

# Sub-case -> activation of the encoder layers; a new sub-case of encode must be added here to be replayed.
ENCODER_GELU = {"fastpath": None, "plain": "tanh"}  # None: the default, what the official model computes at inference


def replay(case: GoldenCase) -> None:
    weights = case.weights()
    estimator = PriorEstimator(PriorConfig.from_official(case.config, weights))
    estimator.load_state_dict(weights, strict=True)
    estimator.eval()
    with torch.no_grad():
        replay_encode(case, estimator)
        if case.children("out.loss"):
            replay_loss(case, estimator)


def replay_encode(case: GoldenCase, estimator: PriorEstimator) -> None:
    for path in case.children("out.encode"):
        priors = estimator.encode(case["in.text"], noise=case.get("in.encode.noise"), encoder_gelu=ENCODER_GELU[path])
        named = {
            "mean": priors.mean,
            "logvar": priors.logvar,
            "spatial_prior": priors.spatial,
            "temporal_prior": priors.temporal,
            "onset_prior": priors.onset,
        }
        for name in case.children(f"out.encode.{path}"):
            value = named[name]
            assert value is not None, f"{case.name}: the estimator gave no {name}"
            case.check(f"out.encode.{path}.{name}", value)


def replay_loss(case: GoldenCase, estimator: PriorEstimator) -> None:
    given = case.group("in.loss")
    height, width = given["frame_height"], given["frame_width"]
    video = dict(zip(("spatial", "temporal"), estimator.embed_video(given["video"], height, width), strict=True))
    audio = dict(zip(("spatial", "temporal"), estimator.embed_audio(given["audio"]), strict=True))
    for name in case.children("out.loss"):
        kind, _, axis = name.rpartition("_")
        if kind in ("pre_video", "pre_audio"):
            case.check(f"out.loss.{name}", (video if kind == "pre_video" else audio)[axis])
        elif kind == "embed":
            case.check(f"out.loss.{name}", estimator.embed_pairs(axis, video[axis], audio[axis]))
        else:
            check_loss(case, estimator, given, name)


def check_loss(case: GoldenCase, estimator: PriorEstimator, given: dict[str, Tensor], sub: str) -> None:
    """One recorded loss: the name of the sub-case says which inputs were withheld."""
    recorded = set(case.children(f"out.loss.{sub}"))
    with_posterior = "kl_loss" in recorded
    priors = Priors(
        spatial=given["spatial_prior"],
        temporal=given["temporal_prior"],
        mean=given.get("posterior_mean") if with_posterior else None,
        logvar=given.get("posterior_logvar") if with_posterior else None,
    )
    negatives = {
        kind: {axis: given[f"{kind}.{axis}"] for axis in case.children(f"in.loss.{kind}")}
        for kind in ("neg_videos", "neg_audios")
    }
    if sub == "video_neg_only":
        negatives["neg_audios"] = {}
    if sub == "audio_neg_only":
        negatives["neg_videos"] = {}
    loss = estimator.loss(
        priors,
        given["video"],
        given["audio"],
        frame_height=given["frame_height"],
        frame_width=given["frame_width"],
        onset=given.get(f"onset.{sub}", given.get("onset")) if "onset_loss" in recorded else None,
        **negatives,
    )
    parts = {"total": loss.total} | loss.parts()
    assert set(parts) == recorded, f"{case.name}: loss terms {sorted(parts)}, recorded {sorted(recorded)}"
    for name in recorded:
        case.check(f"out.loss.{sub}.{name}", parts[name], rtol=1e-5)
