"""What PyTorch knows of flow_update: when its kernel can run and the shapes it returns. There is no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import triton_support


def why_not_triton(*arguments: Any) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "the kernel has no backward pass (call it under torch.no_grad)"
    for tensor in tensors[1:4]:
        if tensor.dtype not in triton_support.TRITON_DTYPES:
            return f"no kernel for {tensor.dtype}"
    return triton_support.why_not_triton(*tensors)


def flow_update_triton(
    video: Tensor,
    audio: Tensor,
    video_velocity: Tensor,
    audio_velocity: Tensor,
    dt: Tensor,
    guidance_video: float,
    guidance_audio: float,
    video_mask: Tensor | None,
    audio_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The Triton op on arguments that ``why_not_triton`` has accepted."""
    masks = [None if mask is None else mask.bool() for mask in (video_mask, audio_mask)]
    new_video, new_audio = torch.ops.javis.flow_update.default(
        video, audio, video_velocity, audio_velocity, dt.float(), guidance_video, guidance_audio, *masks
    )
    return new_video, new_audio


torch.library.define(
    "javis::flow_update",
    "(Tensor video, Tensor audio, Tensor video_velocity, Tensor audio_velocity, Tensor dt, float guidance_video,"
    " float guidance_audio, Tensor? video_mask, Tensor? audio_mask) -> (Tensor video_out, Tensor audio_out)",
)


@torch.library.register_fake("javis::flow_update")
def _shapes(video: Tensor, audio: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return video.new_empty(video.shape), audio.new_empty(audio.shape)


@torch.library.impl("javis::flow_update", ("CPU", "CUDA"))
def _flow_update(*args: Any) -> tuple[Tensor, Tensor]:
    from javis.kernels.ops.flow_update import triton_impl  # imports Triton, on the first call

    return triton_impl.flow_update(*args)
