"""What a stage trains, what it starts from, and its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from javis.flow import add_noise, flow_losses
from javis.model.checkpoint import to_official
from javis.train.recipes.batches import draw
from javis.train.recipes.config import Draws
from javis.train.recipes.parameters import Stage, Train, audio_from_video, freeze, part_of
from javis.train.recipes.task import BINS, FlowModule, FlowTask

from .small import SMALL, small_batch, small_clips, small_model

# The official rules, in the official names: modules with gradients in the configurations of stages 1 and 3.
# The null embeddings (y_embedding) are buffers there.
OFFICIAL: dict[str, tuple[str, ...]] = {
    "audio": ("ax_embedder.", "audio_y_embedder.y_proj.", "audio_spatial_blocks.", "audio_temporal_blocks.",
              "audio_final_layer."),
    "joint": ("st_t_block.", "st_prior_embedder.y_proj.", "video_st_prior_blocks.", "audio_st_prior_blocks.",
              "va_cross_blocks."),
}  # fmt: skip
SHARED = ("t_embedder.", "fps_embedder.", "t_block.")


def official_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in to_official(model.state_dict()).items()}


def train(stage: Stage, which: Train, steps: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = small_model()
    freeze(model, stage, which)
    task = FlowTask(model, stage)
    before = official_state(model)
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        losses = task.module(small_batch(stage, step, Draws(drop_text=0.4, drop_prior=0.4, drop="independent")))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    return before, official_state(model)


@pytest.mark.parametrize("stage", ["audio", "joint"])
def test_official_freezing(stage: Stage) -> None:
    """After some steps exactly the official modules have changed."""
    before, after = train(stage, "official")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(OFFICIAL[stage])}
    assert len(changed) > 20


@pytest.mark.parametrize("stage", ["audio", "joint"])
def test_training_all_leaves_out_what_takes_no_part(stage: Stage) -> None:
    before, after = train(stage, "all")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if stage == "audio":
        assert changed == {name for name in before if name.startswith(OFFICIAL["audio"] + SHARED)}
    else:
        assert changed == {name for name in before if not name.endswith("y_embedding")}


def test_every_parameter_belongs_somewhere() -> None:
    parts = {part_of(name) for name, _ in small_model().named_parameters()}
    assert parts == {"shared", "video", "audio", "video_text", "audio_text", "prior", "bidirectional", "null"}
    with pytest.raises(KeyError, match="belongs to no part"):
        part_of("layers.0.new_block.weight")


def test_the_audio_branch_starts_from_the_video_branch() -> None:
    """Blocks and caption embedder, in official names; patch embedder and final layer do not agree in shape here."""
    model = small_model()
    before = official_state(model)
    audio_from_video(model)
    after = official_state(model)
    copied = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        n for n in before if n.startswith(("audio_spatial_blocks.", "audio_temporal_blocks.", "audio_y_embedder."))
    }
    assert copied - {"audio_final_layer.scale_shift_table", "ax_embedder.proj.bias"} == expected
    for name in expected:
        assert torch.equal(after[name], before[name.removeprefix("audio_")]), name


# -- loss --------------------------------------------------------------------------------------------------------------


def reference_joint(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Losses by way of ``condition`` and ``denoise``, which the goldens hold to the official code."""
    model = small_model()
    drop = {name: batch[name][:, None, None] for name in ("drop_text", "drop_audio_text", "drop_prior")}
    spatial, temporal = model.null_prior
    told = model.condition(
        torch.where(drop["drop_text"], model.null_text, batch["text"]),
        text_mask=batch["text_mask"],
        audio_text=torch.where(drop["drop_audio_text"], model.null_text, batch["text"]),
        audio_text_mask=batch["text_mask"],
        fps=batch["fps"], height=batch["height"], width=batch["width"], video_sizes=(5, 4, 6), audio_sizes=(8, 4),
        spatial_prior=torch.where(drop["drop_prior"], spatial, batch["spatial_prior"]),
        temporal_prior=torch.where(drop["drop_prior"], temporal, batch["temporal_prior"]),
    )  # fmt: skip
    losses = flow_losses(
        lambda v, a, t, **masks: model.denoise(v, a, t, told, **masks),
        batch["video"], batch["audio"], batch["t"], video_noise=batch["video_noise"],
        audio_noise=batch["audio_noise"], video_mask=batch["video_mask"], audio_mask=batch["audio_mask"],
    )  # fmt: skip
    return losses.video, losses.audio


def test_joint_loss_is_that_of_condition_and_denoise() -> None:
    draws = Draws(masks={"quarter_head": 0.4, "video_to_audio": 0.3}, drop_text=0.5, drop_prior=0.5, drop="independent")
    batch = small_batch("joint", 3, draws, count=6)
    assert {"video_to_audio", "quarter_head", "none"} <= set(batch["mask_kinds"])
    video, audio = reference_joint(batch)
    given = ~batch["video_mask"].any(1)
    assert torch.equal(video[given], torch.ones(int(given.sum())))  # the official constant, without a gradient
    found = FlowModule(small_model(), "joint")(batch)
    assert found["loss"].item() == pytest.approx(((video.sum() - given.sum() + audio.sum()) / 6).item(), rel=1e-5)
    assert found["video"].item() == pytest.approx(video[~given].mean().item(), rel=1e-5)
    assert found["audio"].item() == pytest.approx(audio.mean().item(), rel=1e-5)


def test_audio_loss_does_not_depend_on_the_picture() -> None:
    """The same as the whole model's, whose streams are kept apart."""
    batch = small_batch("audio", 1)
    model = small_model()
    told = model.condition(
        torch.where(batch["drop_text"][:, None, None], model.null_text, batch["text"]), text_mask=batch["text_mask"],
        fps=batch["fps"], height=batch["height"], width=batch["width"], video_sizes=(5, 4, 6), audio_sizes=(8, 4),
        with_prior=False, with_bidirectional=False,
    )  # fmt: skip
    noisy = add_noise(batch["audio"], batch["audio_noise"], batch["t"])
    out = model.denoise(torch.randn(3, 4, 5, 4, 6), noisy, batch["t"], told).audio[:, :8]
    expected = (out - (batch["audio"] - batch["audio_noise"])).square().mean()
    found = FlowModule(small_model(), "audio")(batch)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(found) == {"loss", "audio"}


def test_histogram_of_timesteps() -> None:
    module = FlowModule(small_model(), "joint")
    batches = [small_batch("joint", i, Draws(masks={"video_to_audio": 0.5}), count=8) for i in range(3)]
    for batch in batches:
        module(batch)
    found = module.histogram.take()
    seen = torch.cat([b["t"][b["video_mask"].any(1)] for b in batches])
    assert found["video"]["timesteps"] == pytest.approx(seen.tolist())
    assert len(found["audio"]["timesteps"]) == 24 and len(found["audio"]["losses"]) == BINS
    empty = {i for i in range(BINS) if not ((seen // 100) == i).any()}
    assert {i for i, x in enumerate(found["video"]["losses"]) if x is None} == empty
    assert module.histogram.take() == {}


# -- draws -------------------------------------------------------------------------------------------------------------


def test_dropping_together_and_apart() -> None:
    clips = small_clips(4000)
    shares = Draws(drop_text=0.1, drop_prior=0.3)
    together = draw(clips, shares, [1], with_masks=False)
    assert torch.equal(together["drop_text"], together["drop_audio_text"])
    assert bool((together["drop_prior"] | ~together["drop_text"]).all())  # no sample with null text has its priors
    apart = draw(clips, Draws(drop_text=0.1, drop_prior=0.3, drop="independent"), [1], with_masks=False)
    for found in (together, apart):
        for name, share in (("drop_text", 0.1), ("drop_audio_text", 0.1), ("drop_prior", 0.3)):
            assert abs(found[name].float().mean() - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    both = (apart["drop_text"] & apart["drop_prior"]).float().mean()
    assert abs(both - 0.03) < 5 * (0.03 * 0.97 / 4000) ** 0.5


def test_timesteps_follow_size_and_duration() -> None:
    """The median of a logit-normal is a half; shifted by r it is r / (1 + r), with r of the golden's formula."""
    clips = small_clips(4000)
    for height, frames in ((32.0, 17.0), (512.0, 51.0)):
        clips["height"], clips["width"] = torch.full((4000,), height), torch.full((4000,), height)
        clips["frames"] = torch.full((4000,), frames)
        ratio = height / 512 * (frames // 17 * 5) ** 0.5
        median = float(draw(clips, Draws(), [2], with_masks=False)["t"].median())
        assert median == pytest.approx(1000 * ratio / (1 + ratio), rel=0.05)
    fixed = float(draw(clips, Draws(shift=3.0), [2], with_masks=False)["t"].median())
    assert fixed == pytest.approx(750, rel=0.03)


def test_draws_are_a_pure_function_of_the_seed() -> None:
    a, b = (small_batch("joint", 4) for _ in range(2))
    assert a["mask_kinds"] == b["mask_kinds"]
    assert all(torch.equal(a[n], b[n]) for n in a if isinstance(a[n], Tensor))
    other = draw(small_clips(3, 4), Draws(), [7, 5], with_masks=True)
    assert not torch.equal(a["t"], other["t"]) and not torch.equal(a["video_noise"], other["video_noise"])
    assert SMALL.caption_length == a["text"].shape[1]
