"""The maths of bidirectional_attention in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
from torch import Tensor


def bidirectional_attention_ref(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in api.py; computes in float32, or float64 for float64 inputs.

    Builds the whole score matrix [B, H, Nv, Na].
    """
    wide = torch.promote_types(q_video.dtype, torch.float32)
    heads = [x.to(wide).unflatten(-1, (num_heads, -1)) for x in (q_video, q_audio, v_video, v_audio)]
    qv, qa, vv, va = heads  # [B, N, H, D]
    scores = torch.einsum("bihd,bjhd->bhij", qv, qa) * qv.shape[-1] ** -0.5
    to_video = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), va)
    to_audio = torch.einsum("bhij,bihd->bjhd", scores.softmax(-2), vv)
    return to_video.flatten(2).to(q_video.dtype), to_audio.flatten(2).to(q_video.dtype)
