"""JavisDiT: the joint audio-video diffusion transformer (arXiv 2503.23377, section 3.2).

Read this file first, then blocks.py (what a layer does) and ops.py (the operations it is made of).
``condition`` does what depends on the prompt and the clip's sizes, once per clip; ``denoise`` what every step needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.blocks import Held, StepState, Stream
from javis.model.config import JavisDiTConfig, PriorScope
from javis.model.embed import (
    Embedders,
    checked_captions,
    clock_positions,
    clock_rope,
    rope_table,
    sinusoid,
    unpatchify,
    video_positions,
)
from javis.model.final import FinalLayer, velocity_of_sample
from javis.model.layer import JavisLayer
from javis.model.ops import ModelOps, Rope
from javis.model.records import ClipTokens, Conditioning, LayerCondition, StepStart, Velocity

__all__ = ["Conditioning", "JavisDiT", "LayerCondition", "StepStart", "Velocity"]


def _frame_mask(mask: Tensor | None, batch: int, frames: int, patch: int) -> Tensor | None:
    """Mask at latent resolution [B, T] -> at token resolution: the first latent frame of a patch decides."""
    if mask is not None and mask.shape != (batch, frames):
        raise ValueError(f"a condition mask must be {[batch, frames]}, got {list(mask.shape)}")
    return None if mask is None else mask.bool()[:, ::patch]


def in_turn(video: Callable[[], Tensor], audio: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The two streams of a layer, one after the other."""
    return video(), audio()


class JavisDiT(nn.Module):
    """Predicts the velocity ``x_start - noise`` of video and audio latents.

    Args:
        config: sizes and switches.
        ops: operations the blocks are built on; plain PyTorch by default.
    """

    def __init__(self, config: JavisDiTConfig, ops: ModelOps | None = None) -> None:
        super().__init__()
        ops = ops or ModelOps()
        self.config = c = config
        self.embed = Embedders(c)
        self.time_block = nn.Linear(c.hidden_size, 6 * c.hidden_size)
        self.prior_time_block = nn.Linear(c.hidden_size, 9 * c.hidden_size) if c.use_prior else None
        self.layers = nn.ModuleList(JavisLayer(c, ops) for _ in range(c.depth))
        self.video_final = FinalLayer(c, ops, math.prod(c.video_patch) * c.video_out_channels)
        self.audio_final = FinalLayer(c, ops, math.prod(c.audio_patch) * c.audio_out_channels)
        # What a step runs in: javis/precision.py puts a library's FP8 context here.
        self.step_context: Callable[[], AbstractContextManager[None]] = nullcontext
        # How the streams of a layer run, which up to `meet` are independent: javis/sample/overlap.py has another way.
        self.run_streams: Callable[[Callable[[], Tensor], Callable[[], Tensor]], tuple[Tensor, Tensor]] = in_turn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linears, zero for what a block adds at first (text, prior and final projections), as in DiT."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (self.time_block, self.prior_time_block):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
        for final in (self.video_final, self.audio_final):
            nn.init.zeros_(final.linear.weight)
        for layer in self._layers:
            if layer.bidirectional is not None and self.config.clock_attention:
                layer.bidirectional.align_in_time()
        for embedder in self.embed.student_inputs():
            nn.init.zeros_(embedder.fc2.weight)

    @property
    def null_text(self) -> Tensor:
        """Caption tokens of "no caption", [L, caption_channels]."""
        return self.embed.video_text.null

    @property
    def null_prior(self) -> tuple[Tensor, Tensor]:
        """Prior tokens of "no prior": spatial [Ns, Cp] and temporal [Nt, Cp]."""
        if self.embed.prior is None:
            raise ValueError("this model has no prior (use_prior is off)")
        null = self.embed.prior.null
        spatial, temporal = null.split([self.config.spatial_prior_len, null.shape[0] - self.config.spatial_prior_len])
        return spatial, temporal

    # -- once per clip ------------------------------------------------------------------------------------------------

    def condition(self, text: Tensor, **told: Any) -> Conditioning:
        """Compute what does not depend on the timestep; arguments and errors as in :meth:`prepare`."""
        tokens, clip = self.prepare(text, **told)
        return replace(clip, layers=[layer.condition(tokens) for layer in self._layers])

    def prepare(
        self,
        text: Tensor,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        video_sizes: tuple[int, int, int],
        audio_sizes: tuple[int, int],
        text_mask: Tensor | None = None,
        spatial_prior: Tensor | None = None,
        temporal_prior: Tensor | None = None,
        prior_scope: PriorScope = "sample",
        with_prior: bool = True,
        with_bidirectional: bool = True,
        guidance: Tensor | None = None,
        audio_text: Tensor | None = None,
        audio_text_mask: Tensor | None = None,
    ) -> tuple[ClipTokens, Conditioning]:
        """What of :meth:`condition` all layers share: embedded tokens, and a conditioning without layers.

        Args:
            text: caption hidden states, [B, L, caption_channels].
            fps, height, width: frames per second and frame size in pixels, [B] each.
            video_sizes: (T, H, W) of the video latents; audio_sizes: (Ta, M) of the audio latents.
            text_mask: [B, L], nonzero = valid token; the others are removed. None: all are valid.
            spatial_prior: [B, Ns, prior_channels]; temporal_prior: [B, Nt, prior_channels].
            prior_scope: "sample" (each sample sees its own priors) or "batch" (the union over the batch, as the
                official code does by accident).
            with_prior, with_bidirectional: False leaves out those blocks (the first training stage, ablations).
            guidance: scales of video and audio, [B, 2], of a model with ``guidance_input`` and of no other.
            audio_text, audio_text_mask: captions of the audio blocks, [B, La, caption_channels] and [B, La], if they
                are others than those of the video blocks (a negative prompt of the sound).

        Raises:
            ValueError: shapes that do not fit the configuration, missing priors, a caption without a valid token.
        """
        c = self.config
        if prior_scope not in ("sample", "batch"):
            raise ValueError(f"prior_scope {prior_scope!r} is not 'sample' or 'batch'")
        if (guidance is not None) is not c.guidance_input:
            raise ValueError(
                "this model takes the guidance scales as input (guidance_input), and guidance was not given"
                if c.guidance_input
                else "guidance is an input of models with guidance_input only; guide this one while sampling"
            )
        if guidance is not None and guidance.shape != (len(text), 2):
            raise ValueError(f"guidance must be {[len(text), 2]}, got {list(guidance.shape)}")
        text, mask = checked_captions(text, text_mask, c.caption_channels)
        heard, heard_mask = text, mask
        if audio_text is not None:
            heard, heard_mask = checked_captions(audio_text, audio_text_mask, c.caption_channels)
        if len(heard) != len(text):
            raise ValueError(f"audio_text is of {len(heard)} samples, text of {len(text)}")
        batch, dtype = text.shape[0], self.time_block.weight.dtype
        video_grid = self.embed.video.grid(video_sizes)
        audio_grid = self.embed.audio.grid(audio_sizes)
        text = text.to(dtype)
        captions = (self.embed.video_text(text), self.embed.audio_text(heard.to(dtype)))
        priors = self._prior_tokens(spatial_prior, temporal_prior, batch) if c.use_prior and with_prior else None

        scale = (height.float() * width.float()).sqrt() / c.input_sq_size
        mel = torch.arange(audio_grid[1], device=text.device)
        video_pos = video_positions((video_grid[1], video_grid[2]), scale, c.hidden_size)[:, None]
        audio_pos = sinusoid(mel, c.hidden_size)[None, None]
        if c.clock:
            video_pos = video_pos + clock_positions(video_grid[0], video_grid[0], c.hidden_size, text.device)
            audio_pos = audio_pos + clock_positions(audio_grid[0], video_grid[0], c.hidden_size, text.device)
        clip = self.embed.fps(fps)
        if guidance is not None:
            clip = clip + self.embed.guidance_scales(guidance.to(text.device))
        tokens = ClipTokens(*captions, priors, video_grid, audio_grid, prior_scope)
        return tokens, Conditioning(
            layers=[],
            text_mask=mask,
            audio_text_mask=heard_mask,
            fps=clip,
            video_positions=video_pos.to(dtype),
            audio_positions=audio_pos.to(dtype),
            video_sizes=video_sizes,
            audio_sizes=audio_sizes,
            video_rope=rope_table(video_grid[0], c.head_size, text.device),
            audio_rope=rope_table(audio_grid[0], c.head_size, text.device),
            with_bidirectional=with_bidirectional,
            clock=self._clock(video_grid, audio_grid, text.device) if c.clock_attention else None,
        )

    def _clock(
        self, video_grid: tuple[int, ...], audio_grid: tuple[int, ...], device: torch.device
    ) -> tuple[Rope, Rope]:
        size, span = self.config.bidirectional_size // self.config.bidirectional_heads, video_grid[0]
        return (
            clock_rope(video_grid[0], math.prod(video_grid[1:]), span, size, device),
            clock_rope(audio_grid[0], math.prod(audio_grid[1:]), span, size, device),
        )

    def _prior_tokens(self, spatial: Tensor | None, temporal: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        c = self.config
        if spatial is None or temporal is None or self.embed.prior is None:
            raise ValueError("this model needs spatial_prior and temporal_prior (or use null_prior)")
        for name, value, length in (
            ("spatial_prior", spatial, c.spatial_prior_len),
            ("temporal_prior", temporal, c.temporal_prior_len),
        ):
            if value.shape != (batch, length, c.prior_channels):
                raise ValueError(f"{name} must be {[batch, length, c.prior_channels]}, got {list(value.shape)}")
        tokens = self.embed.prior(torch.cat((spatial, temporal), dim=1).to(self.time_block.weight.dtype))
        return tokens[:, : c.spatial_prior_len], tokens[:, c.spatial_prior_len :]

    # -- every step ---------------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> list[JavisLayer]:
        return cast(list[JavisLayer], list(self.layers))

    def denoise(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        condition: Conditioning,
        *,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Velocity:
        """One evaluation of the velocity.

        Args:
            video: latents [B, video_channels, T, H, W]; audio: latents [B, audio_channels, Ta, M].
            timestep: [B], 0 (data) to 1000 (noise).
            condition: what :meth:`condition` returned for these sizes.
            video_mask: bool [B, T]; audio_mask: bool [B, Ta] at latent resolution (the first latent frame of a patch
                decides). True = noisy frame, False = given frame, modulated as at timestep 0.
            end: [B], the timestep at which the step ends, of a model with ``step_input`` and of no other. The velocity
                is then the average one from ``timestep`` to there.

        Raises:
            ValueError: latents or masks that do not fit the conditioning, an ``end`` too many or too few.
        """
        with self.step_context():
            start = self.begin(video, audio, timestep, condition, video_mask, audio_mask, end)
            v, a = start.video, start.audio
            for number in range(self.config.depth):
                v, a = self.run_streams(
                    partial(self.stream, "video", number, v, start, condition),
                    partial(self.stream, "audio", number, a, start, condition),
                )
                v, a = self.meet(number, v, a, condition)
            return self.finish(v, a, start, video, audio, timestep, condition)

    # The parts of a step, for what leaves out some of them (javis/sample/cache.py). They run within ``step_context``.

    def begin(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        condition: Conditioning,
        video_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        end: Tensor | None = None,
    ) -> StepStart:
        """What comes before the layers; arguments and errors as in :meth:`denoise`."""
        if (end is not None) is not self.config.step_input:
            raise ValueError(
                "this model takes the end of the step as input (step_input), and end was not given"
                if self.config.step_input
                else "end is an input of models with step_input only"
            )
        c = self.config
        if tuple(video.shape[2:]) != condition.video_sizes or tuple(audio.shape[2:]) != condition.audio_sizes:
            raise ValueError(
                f"latents {list(video.shape)} and {list(audio.shape)} do not fit the conditioning, which is for video "
                f"sizes {condition.video_sizes} and audio sizes {condition.audio_sizes}"
            )
        dtype = self.time_block.weight.dtype
        masked = video_mask is not None or audio_mask is not None
        clip = condition.fps if self.embed.end is None or end is None else condition.fps + self.embed.end(end)
        time = self.embed.time(timestep) + clip
        time0 = self.embed.time(torch.zeros_like(timestep)) + clip if masked else None
        batch, now, clean = len(video), self._modulate(time), self._modulate(time0)
        v_mask = _frame_mask(video_mask, batch, video.shape[2], c.video_patch[0])
        a_mask = _frame_mask(audio_mask, batch, audio.shape[2], c.audio_patch[0])
        v_step = StepState(-(-video.shape[2] // c.video_patch[0]), *now, *clean, v_mask, condition.video_rope)
        a_step = StepState(-(-audio.shape[2] // c.audio_patch[0]), *now, *clean, a_mask, condition.audio_rope)

        v = self.embed.video(video.to(dtype))
        v = (v.unflatten(1, (v_step.frames, -1)) + condition.video_positions).flatten(1, 2)
        a = self.embed.audio(audio.to(dtype))
        a = (a.unflatten(1, (a_step.frames, -1)) + condition.audio_positions).flatten(1, 2)
        return StepStart(v, a, time, time0, v_step, a_step)

    def stream(
        self,
        name: Stream,
        number: int,
        x: Tensor,
        start: StepStart,
        condition: Conditioning,
        held: Mapping[str, Held] | None = None,
    ) -> Tensor:
        """Blocks of one stream in layer ``number``, up to where the streams meet: tokens [B, N, C] -> the same."""
        told, video = condition.layers[number], name == "video"
        return self._layers[number].stream(
            name,
            x,
            start.video_step if video else start.audio_step,
            told.text[:2] if video else told.text[2:],
            condition.text_mask if video else condition.audio_text_mask,
            told.video_prior if video else told.audio_prior,
            held,
        )

    def meet(self, number: int, v: Tensor, a: Tensor, condition: Conditioning) -> tuple[Tensor, Tensor]:
        """The bidirectional attention of layer ``number``, if it has one."""
        block = self._layers[number].bidirectional
        return (v, a) if block is None or not condition.with_bidirectional else block(v, a, condition.clock)

    def finish(
        self,
        v: Tensor,
        a: Tensor,
        start: StepStart,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        condition: Conditioning,
    ) -> Velocity:
        """What comes after the layers: tokens ``v``, ``a`` [B, N, C] -> velocity; latents as given to `begin`."""
        c = self.config
        v_out = self.video_final(v, start.time, start.time0, start.video_step.frame_mask)
        a_out = self.audio_final(a, start.time, start.time0, start.audio_step.frame_mask)
        v_grid = self.embed.video.grid(condition.video_sizes)
        a_grid = self.embed.audio.grid(condition.audio_sizes)
        video_out = unpatchify(v_out, v_grid, c.video_patch, condition.video_sizes)
        audio_out = unpatchify(a_out, a_grid, c.audio_patch, condition.audio_sizes)
        if c.prediction == "sample":
            video_out = velocity_of_sample(video_out, video, timestep, c.sigma_data)
            audio_out = velocity_of_sample(audio_out, audio, timestep, c.sigma_data)
        return Velocity(video_out, audio_out)

    def _modulate(self, time: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Time embedding [B, C] -> modulation of the blocks [B, 6C] and of the prior blocks [B, 9C]."""
        if time is None:
            return None, None
        prior = self.prior_time_block
        return self.time_block(F.silu(time)), None if prior is None else prior(F.silu(time))

    def forward(self, video: Tensor, audio: Tensor, timestep: Tensor, **kwargs: object) -> Velocity:
        """``condition`` and ``denoise`` in one call; arguments as in those."""
        masks = {name: kwargs.pop(name) for name in ("video_mask", "audio_mask", "end") if name in kwargs}
        sizes = {"video_sizes": tuple(video.shape[2:]), "audio_sizes": tuple(audio.shape[2:])}
        told = self.condition(**{**sizes, **kwargs})  # type: ignore[arg-type]
        return self.denoise(video, audio, timestep, told, **masks)  # type: ignore[arg-type]
