"""What the model is told about the clips of a call: captions, negative prompts, priors, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.frame_size import FrameSize
from javis.model.dit import Conditioning, JavisDiT
from javis.model.prior import Priors
from javis.sample import Guidance

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline


def negatives(pipe: JavisPipeline, given: str | Sequence[str] | None, count: int, what: str = "") -> list[str] | None:
    """Captions of the negative prompts, one per clip; None if there are none.

    Raises:
        UsageError: neither one nor ``count`` prompts, or an unusable one.
    """
    if given is None:
        return None
    prompts = [given] * count if isinstance(given, str) else list(given)
    if len(prompts) != count:
        raise UsageError(f"{len(prompts)} negative {what}prompts for {count} prompts; expected as many or one")
    return pipe.captions(prompts, negative=True)


def conditioned(
    pipe: JavisPipeline,
    text: Tensor,
    mask: Tensor,
    priors: Priors,
    *,
    frames: int,
    samples: int,
    guided: bool,
    negative: tuple[Tensor, Tensor] | None = None,
    audio_negative: tuple[Tensor, Tensor] | None = None,
    with_bidirectional: bool = True,
    size: FrameSize | None = None,
    fps: float | None = None,
    model: JavisDiT | None = None,
    scales: Guidance | None = None,
) -> Conditioning:
    """Conditioning of the prompts, and with guidance of the unconditional samples after them.

    Args:
        text, mask: hidden states [B, L, C] of the captions and bool [B, L].
        priors: of the B prompts.
        frames, samples: whole windows of the codecs (:class:`javis.durations.ClipLength`).
        negative: hidden states and mask of what not to show, instead of the null caption.
        audio_negative: the same of what not to hear, for the audio blocks; None: as for the video blocks.
        size, fps: of the pictures; None: the checkpoint's.
        model: that is told; None: the pipeline's, which is the teacher.
        scales: of guidance, for a model that takes them as input.
    """
    model, spatial, temporal = model or pipe.model, priors.spatial, priors.temporal
    size = size or pipe.frame_size
    heard = heard_mask = None
    if guided:
        null_spatial, null_temporal = model.null_prior
        other, other_mask = negative or (model.null_text.expand(len(text), -1, -1), mask)
        if audio_negative is not None:
            heard, heard_mask = torch.cat((text, audio_negative[0])), torch.cat((mask, audio_negative[1]))
        text, mask = torch.cat((text, other)), torch.cat((mask, other_mask))
        spatial = torch.cat((spatial, null_spatial.expand_as(spatial)))
        temporal = torch.cat((temporal, null_temporal.expand_as(temporal)))

    def each(value: float) -> Tensor:
        return torch.full((len(text),), float(value), device=pipe.device)

    more: dict[str, Any] = {}
    if scales is not None:
        more["guidance"] = torch.tensor([scales], device=pipe.device).expand(len(text), -1)
    with torch.no_grad():
        return model.condition(
            text,
            text_mask=mask,
            spatial_prior=spatial,
            temporal_prior=temporal,
            fps=each(pipe.fps if fps is None else fps),
            height=each(size.height),
            width=each(size.width),
            video_sizes=pipe.video_codec.latent_sizes(frames, *size),
            audio_sizes=pipe.audio_codec.latent_sizes(samples),
            with_bidirectional=with_bidirectional,
            audio_text=heard,
            audio_text_mask=heard_mask,
            **more,
        )
