"""bidirectional_attention for a part of the video, with what is needed to combine parts: see javis/parallel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.bidirectional_attention import api  # registers the ops, too
from javis.kernels.ops.bidirectional_attention.reference import bidirectional_attention_ref

# torch's attention does not return the denominators.
CHECKS: dict[Backend, Check] = {name: check for name, check in api.CHECKS.items() if name is not Backend.SDPA}


def bidirectional_attention_lse(
    q_video: Tensor,
    q_audio: Tensor,
    v_video: Tensor,
    v_audio: Tensor,
    num_heads: int,
    *,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """``bidirectional_attention`` and the natural logarithm of the columns' denominators.

    With results ``o_r`` and logarithms ``l_r`` of disjoint parts r of the video tokens, ``sum_r softmax(l)_r o_r`` is
    what all of the video says to audio.

    Args:
        As in :func:`javis.kernels.bidirectional_attention`; no gradients are computed.

    Returns:
        to_video [B, Nv, E], to_audio [B, Na, E] over these video tokens, and log-sum-exp of the scores of each audio
        token with these video tokens, [B, H, Na], float32 (float64 for float64).
    """
    api._validate(q_video, q_audio, v_video, v_audio, num_heads)
    inputs = (q_video, q_audio, v_video, v_audio)
    with torch.no_grad():
        # A name of its own: the measured choices are those of the op, which has one backend more.
        chosen = select("bidirectional_attention_lse", CHECKS, *inputs, num_heads, backend=backend)
        if chosen is Backend.REFERENCE:
            return (*bidirectional_attention_ref(*inputs, num_heads), _columns(q_video, q_audio, num_heads))
        op = {
            Backend.CUDA: lambda: torch.ops.javis_cuda.bidirectional_attention,
            Backend.TRITON: lambda: torch.ops.javis.bidirectional_attention,
            Backend.CPU: lambda: torch.ops.javis.bidirectional_attention_native,
        }[chosen]()
        to_video, to_audio, _, lse = op.default(*inputs, num_heads)  # its logarithms have base 2
        return to_video, to_audio, lse * math.log(2)


def _columns(q_video: Tensor, q_audio: Tensor, num_heads: int) -> Tensor:
    wide = torch.promote_types(q_video.dtype, torch.float32)
    qv, qa = (x.to(wide).unflatten(-1, (num_heads, -1)) for x in (q_video, q_audio))
    return (torch.einsum("bihd,bjhd->bhij", qv, qa) * qv.shape[-1] ** -0.5).logsumexp(2)
