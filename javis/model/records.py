"""What :class:`javis.model.dit.JavisDiT` takes and gives: conditioning of a clip, the start of a step, a velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from javis.model.blocks import KeyValue, PriorCondition, StepState
from javis.model.config import PriorScope
from javis.model.ops import Rope


class Velocity(NamedTuple):
    """Output of a denoising step: video [B, Cv, T, H, W] and audio [B, Ca, Ta, M].

    With ``pred_sigma`` there are twice as many channels as in the latents; the first half is the velocity.
    """

    video: Tensor
    audio: Tensor


class ClipTokens(NamedTuple):
    """Embedded condition tokens of a clip, of which every layer makes its own keys and values."""

    video_text: Tensor  # [B, L, C]
    audio_text: Tensor  # [B, La, C]
    priors: tuple[Tensor, Tensor] | None  # spatial [B, Ns, C] and temporal [B, Nt, C]
    video_grid: tuple[int, ...]  # tokens (T, H, W)
    audio_grid: tuple[int, ...]  # tokens (Ta, M)
    prior_scope: PriorScope = "sample"


class LayerCondition(NamedTuple):
    """Keys and values of one layer: captions per block, priors (folded for sampling) per modality and axis."""

    text: tuple[KeyValue, KeyValue, KeyValue, KeyValue]  # video spatial, video temporal, audio spatial, audio temporal
    video_prior: tuple[PriorCondition, PriorCondition] | None  # spatial, temporal
    audio_prior: tuple[PriorCondition, PriorCondition] | None


@dataclass(frozen=True)
class Conditioning:
    """Everything about a clip that does not depend on the timestep (see :meth:`JavisDiT.condition`)."""

    layers: list[LayerCondition]
    text_mask: Tensor | None
    fps: Tensor  # embedded, [B, C]; of a student with the guidance scales
    video_positions: Tensor  # [B, 1 or T, S, C]
    audio_positions: Tensor  # [1, 1 or T, S, C]
    video_sizes: tuple[int, int, int]
    audio_sizes: tuple[int, int]
    video_rope: Rope
    audio_rope: Rope
    with_bidirectional: bool = True
    clock: tuple[Rope, Rope] | None = None  # RoPE of the bidirectional attention, video and audio tokens
    audio_text_mask: Tensor | None = None  # of the captions of the audio blocks; as text_mask unless they differ


class StepStart(NamedTuple):
    """What a denoising step computes before its layers (:meth:`JavisDiT.begin`)."""

    video: Tensor  # tokens, [B, Nv, C]
    audio: Tensor  # tokens, [B, Na, C]
    time: Tensor  # embedded timestep, [B, C]
    time0: Tensor | None  # the same of timestep 0, with condition masks
    video_step: StepState
    audio_step: StepState
