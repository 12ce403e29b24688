"""The audio and the joint stage as a task of the engine: model and loss in one ``forward``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from javis.flow import NUM_TIMESTEPS, add_noise, flow_losses, masked_mean, mean_over_generated
from javis.model.blocks import Stream
from javis.model.dit import JavisDiT, Velocity
from javis.parallel.training import SequenceTraining
from javis.train.recipes.parameters import Stage

BINS = 10  # of the timestep histograms


class TimestepHistogram:
    """Samples and losses by timestep since the last :meth:`take`, of this process."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor, Tensor]] = []

    def add(self, t: Tensor, stream: str, losses: Tensor, mask: Tensor | None = None) -> None:
        """Note the losses [B] of a stream at ``t`` [B]; samples of which nothing is generated are left out."""
        some = torch.ones_like(t, dtype=torch.bool) if mask is None else mask.any(dim=1)
        self._seen.append((stream, t.detach().where(some, t.new_full((), float("nan"))), losses.detach()))

    def take(self) -> dict[str, dict[str, Any]]:
        """By stream: "timesteps", all of them, and "losses", the mean of each of ``BINS`` equal bins (None: no sample);
        what was noted is forgotten."""
        result = {}
        for stream in dict.fromkeys(name for name, _, _ in self._seen):
            t = torch.cat([t for name, t, _ in self._seen if name == stream]).float().cpu()
            losses = torch.cat([x for name, _, x in self._seen if name == stream]).float().cpu()[~t.isnan()]
            t = t[~t.isnan()]
            place = (t * (BINS / NUM_TIMESTEPS)).long().clamp(0, BINS - 1)
            means = [float(losses[place == i].mean()) if bool((place == i).any()) else None for i in range(BINS)]
            result[stream] = {"timesteps": t.tolist(), "losses": means}
        self._seen.clear()
        return result


class FlowModule(nn.Module):
    """Model plus rectified-flow loss.

    Layers are called one by one as modules (:meth:`javis.model.layer.JavisLayer.forward`), which is what sharding and
    activation checkpointing hook into.

    Args:
        model: trained in place; what is frozen has ``requires_grad`` off already.
        stage: "audio" trains the sound alone, without priors and without the other stream; "joint" both.
    """

    def __init__(self, model: JavisDiT, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        self.sequence: SequenceTraining | None = None  # where ranks share the tokens of a clip
        self.histogram = TimestepHistogram()

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A batch (:mod:`javis.train.recipes.batches`) -> "loss", and the mean of "video" and "audio" over the samples
        that generate any of it. A stream that is given whole carries no loss."""
        audio, t, mask = batch["audio"], batch["t"], batch.get("audio_mask")
        if self.stage == "audio":
            noise = batch["audio_noise"]
            out = self.velocity(batch, None, add_noise(audio, noise, t)).audio
            losses = masked_mean((out[:, : audio.shape[1]].float() - (audio - noise)).square(), None)
            self.histogram.add(t, "audio", losses)
            return {"loss": losses.mean(), "audio": losses.mean().detach()}
        found = flow_losses(
            lambda v, a, _t, **masks: self.velocity(batch, v, a, **masks),
            batch["video"],
            audio,
            t,
            video_noise=batch["video_noise"],
            audio_noise=batch["audio_noise"],
            video_mask=batch.get("video_mask"),
            audio_mask=mask,
        )
        video, video_mean = mean_over_generated(found.video, batch.get("video_mask"))
        sound, audio_mean = mean_over_generated(found.audio, mask)
        self.histogram.add(t, "video", found.video, batch.get("video_mask"))
        self.histogram.add(t, "audio", found.audio, mask)
        return {"loss": video + sound, "video": video_mean.detach(), "audio": audio_mean.detach()}

    def velocity(
        self,
        batch: dict[str, Any],
        video: Tensor | None,
        audio: Tensor,
        *,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
    ) -> Velocity:
        """Velocity at ``batch["t"]``; without ``video`` of the sound alone (the video entry then means nothing)."""
        model, t = self.model, batch["t"]
        tokens, clip = model.prepare(**self.told(batch, video))
        if video is None:  # the smallest picture of as many frames: the clock of the sound is the picture's
            given = audio.new_zeros(len(audio), model.config.video_channels, *clip.video_sizes)
        else:
            given = video
        steps = model if self.sequence is None else self.sequence
        start = steps.begin(given, audio, t, clip, video_mask, audio_mask)
        v, a = None if video is None else start.video, start.audio
        for layer in model.layers:
            v, a = layer(v, a, start, tokens, clip)
        return steps.finish(start.video if v is None else v, a, start, given, audio, t, clip)

    def told(self, batch: dict[str, Any], video: Tensor | None) -> dict[str, Any]:
        """Arguments of ``prepare``, with the dropped captions and priors replaced by the null ones."""
        model, joint = self.model, self.stage == "joint"
        text = batch["text"]
        sizes = tuple(batch["video_sizes"]) if video is None else tuple(video.shape[2:])
        if video is None:
            sizes = (sizes[0], *model.config.video_patch[1:])
        told: dict[str, Any] = {
            "text": _dropped(text, model.null_text, batch["drop_text"]),
            "text_mask": batch["text_mask"],
            "audio_text": _dropped(text, model.null_text, batch["drop_audio_text"]),
            "audio_text_mask": batch["text_mask"],
            "fps": batch["fps"],
            "height": batch["height"],
            "width": batch["width"],
            "video_sizes": sizes,
            "audio_sizes": tuple(batch["audio"].shape[2:]),
            "with_prior": joint,
            "with_bidirectional": joint,
        }
        if joint and model.config.use_prior:
            spatial, temporal = model.null_prior
            told["spatial_prior"] = _dropped(batch["spatial_prior"], spatial, batch["drop_prior"])
            told["temporal_prior"] = _dropped(batch["temporal_prior"], temporal, batch["drop_prior"])
        return told


class FlowTask:
    """What the engine trains in the stages audio and joint."""

    def __init__(self, model: JavisDiT, stage: Stage) -> None:
        self.module = FlowModule(model, stage)

    def blocks(self) -> list[nn.Module]:
        """The layers: units of sharding and of activation checkpointing."""
        return list(self.module.model.layers)

    def share_tokens(self, group: ProcessGroup) -> Callable[[], object]:
        """See `javis.train.engine.SharingTask`. The audio stage divides the tokens of the sound, all that it has."""
        module = self.module
        streams: tuple[Stream, ...] = ("audio",) if module.stage == "audio" else ("video", "audio")
        module.sequence = sequence = SequenceTraining(module.model, group, streams)

        def undo() -> None:
            sequence.remove()
            module.sequence = None

        return undo


def _dropped(value: Tensor, null: Tensor, drop: Tensor) -> Tensor:
    """[B, L, C] with the samples of ``drop`` [B] replaced by ``null`` [L or more, C]."""
    return torch.where(drop[:, None, None], null[: value.shape[1]].to(value.dtype), value)
