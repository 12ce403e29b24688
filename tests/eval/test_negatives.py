"""The audit of stage 2: verdicts against closed forms, the command end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from javis.cli import main
from javis.data.negatives import KINDS
from javis.eval.negatives import TRUE, Encoded, Margins, Rate, audit, below_bar, encode_clip, score, verdicts
from javis.model.ops import ModelOps
from javis.model.prior import PriorEstimator
from javis.pipeline import JavisPipeline
from javis.train.prior_run import SMALL, text_encoder, with_estimator
from javis.world import WorldConfig


@pytest.fixture(scope="module")
def pipe():
    return JavisPipeline.from_pretrained("demo", ops=ModelOps())


def estimator(pipe):
    torch.manual_seed(3)
    return PriorEstimator(type(pipe.prior.config)(**{**pipe.prior.config.to_dict(), **SMALL, "encode_va": True})).eval()


@pytest.mark.parametrize(
    ("hits", "clips", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)],
)
def test_intervals_are_those_of_wilson(hits, clips, low, high):
    """81 of 263: table of Newcombe (1998), method 3."""
    assert Rate(hits, clips).interval == pytest.approx((low, high), abs=6e-5)


def pair(spatial, temporal, distance=(1.0, 1.0)):
    """Scores [2, 2]: rows spatial and temporal, columns logit and distance."""
    return np.array([[spatial, distance[0]], [temporal, distance[1]]])


def test_margins_let_the_false_alarms_through_that_they_promise():
    logits = np.random.default_rng(0).normal(size=(2, 40_000))
    margins = Margins.of([pair(a, b) for a, b in logits.T])
    assert margins.own == pytest.approx([-1.645, -1.645], abs=0.03)  # 5 % of a normal distribution
    assert margins.either == pytest.approx([-1.960, -1.960], abs=0.04)  # 2.5 %
    distances = np.random.default_rng(1).random((40_000, 2))
    margins = Margins.of([pair(0, 0, d) for d in distances])
    assert margins.distance == pytest.approx(2 - np.sqrt(0.1), abs=0.01)  # of a triangular distribution on 0..2


def test_verdicts_follow_their_definitions():
    margins = Margins(np.array([-2.0, -2.0]), np.array([-1.0, -1.0]), 1.2)
    true = pair(0.0, 0.0, (0.5, 0.5))
    # A temporal kind: caught by its axis, by the other axis alone, by neither, and within the own margin only.
    shifts = [pair(0, -3, (0.4, 0.7)), pair(-3, 0, (0.9, 0.4)), pair(0, 0, (0.1, 0.6)), pair(0, -1.5, (0.5, 0.5))]
    clips = [{TRUE: true, "audio_shift": shift} for shift in shifts] + [{TRUE: pair(-3, -1.5)}]
    found = verdicts(clips, margins)
    shift = {name: rate["rate"] for name, rate in found["kinds"]["audio_shift"].items()}
    assert shift == {"discriminator": 0.5, "own_axis": 0.5, "hinge": 0.5, "hinge_alone": 0.25, "hinge_own_axis": 0.5}
    assert found["kinds"]["audio_shift"]["hinge"]["clips"] == 4
    assert found["kinds"]["video_stall"]["hinge"]["clips"] == 0
    synchronous = {name: rate["rate"] for name, rate in found["synchronous"].items()}
    assert synchronous == {"discriminator": 0.8, "hinge_alone": 0.8, "spatial_axis": 0.8, "temporal_axis": 0.8}


def test_below_the_bar_are_kinds_that_either_verdict_misses():
    rates = {name: {"rate": 0.9} for name in ("discriminator", "hinge")}
    report = {
        "kinds": {
            "a": rates,
            "b": {**rates, "hinge": {"rate": 0.89}},
            "c": {**rates, "discriminator": {"rate": float("nan")}},
        }
    }
    assert [line.split()[0] for line in below_bar(report)] == ["b", "c"]


def test_scores_are_those_of_the_estimator_pair_by_pair(pipe):
    """Each pair alone, through the public parts of the estimator."""
    world, own = WorldConfig(), estimator(pipe)
    clip = encode_clip(1_500_000_001, world, pipe.video_codec, pipe.audio_codec, ("video_shift", "audio_mute"), "any")
    assert [kind for kind, _, _ in clip.pairs] == [TRUE, "video_shift", "audio_mute"]
    text = text_encoder(pipe)([clip.caption])
    found = score(own, clip, text, (64, 64), torch.Generator().manual_seed(5))
    with torch.no_grad():
        priors = own.encode(text, generator=torch.Generator().manual_seed(5))
        size = torch.full((1,), 64.0)
        for kind, video, audio in (("video_shift", 1, 0), ("audio_mute", 0, 1)):
            spatial, temporal = own.embed_video(clip.video[video : video + 1], size, size)
            a_spatial, a_temporal = own.embed_audio(clip.audio[audio : audio + 1])
            for row, (axis, v, a) in enumerate((("spatial", spatial, a_spatial), ("temporal", temporal, a_temporal))):
                embed, prior = own.embed_pairs(axis, v, a), getattr(priors, axis)
                cosines = [float(p @ e / p.norm() / e.norm()) for p, e in zip(prior[0], embed[0], strict=True)]
                assert found[kind][row, 0] == pytest.approx(float(own.discriminator(prior, embed)), abs=1e-4)
                assert found[kind][row, 1] == pytest.approx(1 - np.mean(cosines), abs=1e-4)


class Sign(torch.nn.Module):
    """The first number of an embedding as its logit."""

    def forward(self, prior, embed):
        return embed[:, 0, 0]


class Oracle(PriorEstimator):
    """Calls everything asynchronous whose picture is not the clip's own, by its discriminator and its distance."""

    def embed_video(self, video, frame_height, frame_width):
        changed = (video - video[:1]).flatten(1).abs().amax(1) > 1e-3
        tokens = torch.where(changed, -1.0, 1.0)[:, None, None, None].expand(-1, 1, 1, 64)
        return tokens, tokens

    def embed_audio(self, audio):
        tokens = torch.ones(len(audio), 1, 1, 64)
        return tokens, tokens

    def embed_pairs(self, axis, video, audio):
        return (video * audio)[:, 0]

    def encode(self, text, **rest):
        from javis.model.prior import Priors

        return Priors(spatial=torch.ones(1, 1, 64), temporal=torch.ones(1, 1, 64))


def test_the_audit_of_an_estimator_that_only_sees_pictures(pipe):
    oracle = Oracle(estimator(pipe).config)
    oracle.discriminator = Sign()
    report = audit(
        {"after": oracle}, pipe.video_codec, pipe.audio_codec, text_encoder(pipe), WorldConfig(),
        count=4, calibration=3, seed=1_500_000_000,
    )["after"]  # fmt: skip
    for kind, what in KINDS.items():
        for verdict in ("discriminator", "own_axis", "hinge", "hinge_alone", "hinge_own_axis"):
            assert report["kinds"][kind][verdict]["rate"] == (1.0 if what.modality == "video" else 0.0)
    assert report["synchronous"]["discriminator"]["rate"] == 1.0
    assert len(below_bar(report)) == 14  # both verdicts on seven kinds of sound


def test_the_command_audits_before_and_after(tmp_path, pipe, capsys):
    own = JavisPipeline.from_pretrained("demo", ops=ModelOps())
    folder = with_estimator(own, estimator(pipe)).save_pretrained(tmp_path / "checkpoint")
    paths = ["--json", str(tmp_path / "a.json"), "--append", str(tmp_path / "rows.jsonl")]
    assert main(["eval", "negatives", "--checkpoint", str(folder), "--count", "3", "--calibration", "3", *paths]) == 0
    report, row = json.loads((tmp_path / "a.json").read_text()), json.loads((tmp_path / "rows.jsonl").read_text())
    assert report == row and report["kind"] == "eval_negatives" and report["seed"] == 1_500_000_000
    assert set(report["before"]["kinds"]) == set(report["after"]["kinds"]) == set(KINDS)
    assert "true clips called synchronous" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "javis train prior"), (["--count", "0"], "--count 0"), (["--checkpoint", "nowhere/at/all"], "nowhere")],
)
def test_what_cannot_be_audited_is_refused(arguments, message, capsys):
    assert main(["eval", "negatives", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_encoded_clips_have_every_kind(pipe):
    clip: Encoded = encode_clip(1_500_000_000, WorldConfig(), pipe.video_codec, pipe.audio_codec, tuple(KINDS), "any")
    assert {kind for kind, _, _ in clip.pairs} == {TRUE, *KINDS}
    assert len(clip.video) == 5 and len(clip.audio) == 8
