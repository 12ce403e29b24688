"""A layer of JavisDiT: seven sub-blocks on two streams, and what they need of the condition."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from javis.model.blocks import (
    BidirectionalBlock,
    Held,
    KeyValue,
    PriorBlock,
    PriorCondition,
    StepState,
    Stream,
    TransformerBlock,
)
from javis.model.config import JavisDiTConfig
from javis.model.ops import ModelOps
from javis.model.records import ClipTokens, Conditioning, LayerCondition, StepStart


class JavisLayer(nn.Module):
    """One layer: video spatial, video temporal, audio spatial, audio temporal, priors, bidirectional attention."""

    def __init__(self, config: JavisDiTConfig, ops: ModelOps) -> None:
        super().__init__()
        self.video_spatial = TransformerBlock(config, ops, "spatial")
        self.video_temporal = TransformerBlock(config, ops, "temporal")
        self.audio_spatial = TransformerBlock(config, ops, "spatial")
        self.audio_temporal = TransformerBlock(config, ops, "temporal")
        self.video_prior = PriorBlock(config, ops) if config.use_prior else None
        self.audio_prior = PriorBlock(config, ops) if config.use_prior else None
        self.bidirectional = BidirectionalBlock(config, ops) if config.use_bidirectional else None

    def stream(
        self,
        name: Stream,
        x: Tensor,
        step: StepState,
        text: tuple[KeyValue, KeyValue],
        text_mask: Tensor | None,
        prior: tuple[PriorCondition, PriorCondition] | None,
        held: Mapping[str, Held] | None = None,
    ) -> Tensor:
        """The blocks of one stream, [B, N, C], up to where the streams meet.

        Args:
            text: keys and values for the spatial and the temporal block. prior: for the spatial and the temporal step.
            held: by block ("spatial", "temporal", "prior"), what it keeps across steps.
        """
        held = held or {}
        if name == "video":
            spatial, temporal, own_prior = self.video_spatial, self.video_temporal, self.video_prior
        else:
            spatial, temporal, own_prior = self.audio_spatial, self.audio_temporal, self.audio_prior
        x = spatial(x, step, text[0], text_mask, held.get("spatial"))
        x = temporal(x, step, text[1], text_mask, held.get("temporal"))
        if own_prior is not None and prior is not None:
            x = own_prior(x, step, *prior, held.get("prior"))
        return x

    def condition(self, tokens: ClipTokens) -> LayerCondition:
        """Keys and values of the condition tokens for all blocks."""
        told = [self._told(name, tokens) for name in ("video", "audio")]
        (video, video_prior), (audio, audio_prior) = told
        return LayerCondition((*video, *audio), video_prior, audio_prior)

    def _told(
        self, name: Stream, tokens: ClipTokens
    ) -> tuple[tuple[KeyValue, KeyValue], tuple[PriorCondition, PriorCondition] | None]:
        """What the blocks of one stream are told: captions, and priors if there are any."""
        if name == "video":
            spatial, temporal, own_prior = self.video_spatial, self.video_temporal, self.video_prior
            text, grid = tokens.video_text, tokens.video_grid
        else:
            spatial, temporal, own_prior = self.audio_spatial, self.audio_temporal, self.audio_prior
            text, grid = tokens.audio_text, tokens.audio_grid
        prior = None
        if own_prior is not None and tokens.priors is not None:
            prior = (
                own_prior.spatial.condition(tokens.priors[0], math.prod(grid[1:]), tokens.prior_scope),
                own_prior.temporal.condition(tokens.priors[1], grid[0], tokens.prior_scope),
            )
        return (spatial.text.key_value(text), temporal.text.key_value(text)), prior

    def forward(
        self, video: Tensor | None, audio: Tensor, start: StepStart, tokens: ClipTokens, clip: Conditioning
    ) -> tuple[Tensor | None, Tensor]:
        """The whole layer in one call, its conditioning included.

        Training calls layers so: a call of the module is what FSDP gathers weights for and what activation
        checkpointing computes again. The numbers are those of ``condition``, ``stream`` and the bidirectional block.

        Args:
            video: tokens [B, Nv, C]; None leaves the video stream out, and with it where the streams meet.
            audio: tokens [B, Na, C].
            start, tokens, clip: of the step and of the clip (:meth:`javis.model.dit.JavisDiT.prepare`).
        """
        if video is not None:
            text, prior = self._told("video", tokens)
            video = self.stream("video", video, start.video_step, text, clip.text_mask, prior)
        text, prior = self._told("audio", tokens)
        audio = self.stream("audio", audio, start.audio_step, text, clip.audio_text_mask, prior)
        if video is not None and self.bidirectional is not None and clip.with_bidirectional:
            video, audio = self.bidirectional(video, audio, clip.clock)
        return video, audio

    def blocks(self) -> dict[str, nn.Module]:
        """The sub-blocks by name, in the order they run; those this model has."""
        return {name: block for name, block in self.named_children() if block is not None}
