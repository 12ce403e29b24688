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
    arguments = (q_video, q_audio, v_video, v_audio, num_heads)
    to_video, to_audio, _, lse_audio = forward(*arguments, backend=chosen(*arguments, backend=backend))
    return to_video, to_audio, lse_audio * math.log(2)


def chosen(
    q_video: Tensor,
    q_audio: Tensor,
    v_video: Tensor,
    v_audio: Tensor,
    num_heads: int,
    *,
    backend: Backend | str = Backend.AUTO,
) -> Backend:
    """The backend for `forward` and, where an argument requires a gradient, `backward`.

    Raises:
        ValueError, UsageError: as :func:`javis.kernels.bidirectional_attention`.
    """
    arguments = (q_video, q_audio, v_video, v_audio, num_heads)
    api._validate(*arguments)
    # A name of its own: the measured choices are those of the op, which has one backend more.
    return select("bidirectional_attention_lse", CHECKS, *arguments, backend=backend)


@torch.no_grad()
def forward(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int, *, backend: Backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both results, and the logarithms of base 2 of both denominators: lse_video [B, H, Nv], lse_audio [B, H, Na]."""
    inputs = (q_video, q_audio, v_video, v_audio)
    if backend is Backend.REFERENCE:
        scores = _scores(q_video, q_audio, num_heads)
        logs = [scores.logsumexp(axis) / math.log(2) for axis in (3, 2)]
        return (*bidirectional_attention_ref(*inputs, num_heads), *logs)  # type: ignore[return-value]
    op = {
        Backend.CUDA: lambda: torch.ops.javis_cuda.bidirectional_attention,
        Backend.TRITON: lambda: torch.ops.javis.bidirectional_attention,
        Backend.CPU: lambda: torch.ops.javis.bidirectional_attention_native,
    }[backend]()
    made: tuple[Tensor, Tensor, Tensor, Tensor] = op.default(*inputs, num_heads)
    return made


@torch.no_grad()
def backward(
    d_to_video: Tensor,
    d_to_audio: Tensor,
    q_video: Tensor,
    q_audio: Tensor,
    v_video: Tensor,
    v_audio: Tensor,
    to_video: Tensor,
    to_audio: Tensor,
    lse_video: Tensor,
    lse_audio: Tensor,
    num_heads: int,
    *,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_video, q_audio, v_video, v_audio.

    ``to_audio`` and ``lse_audio`` may be over more video tokens than these: a column's softmax is made again from its
    denominator. The gradients of the audio are then those through these video tokens, to be added to the others'.

    Args:
        lse_video, lse_audio: to base 2, as `forward` returns them.
    """
    tensors = (d_to_video, d_to_audio, q_video, q_audio, v_video, v_audio, to_video, to_audio, lse_video, lse_audio)
    if backend is not Backend.REFERENCE:
        ops = torch.ops.javis
        native = backend is Backend.CPU
        op = ops.bidirectional_attention_native_backward if native else ops.bidirectional_attention_backward
        made: tuple[Tensor, Tensor, Tensor, Tensor] = op.default(*tensors, num_heads)
        return made
    wide = torch.promote_types(q_video.dtype, torch.float32)
    d_rows, d_columns, qv, qa, vv, va, rows_out, columns_out = (
        x.to(wide).unflatten(-1, (num_heads, -1)) for x in tensors[:8]
    )
    scores = _scores(q_video, q_audio, num_heads) / math.log(2)
    rows, columns = (scores - lse_video[..., None]).exp2(), (scores - lse_audio[:, :, None]).exp2()
    delta_rows = (d_rows * rows_out).sum(-1).transpose(1, 2)[..., None]
    delta_columns = (d_columns * columns_out).sum(-1).transpose(1, 2)[:, :, None]
    d_scores = rows * (torch.einsum("bihd,bjhd->bhij", d_rows, va) - delta_rows)
    d_scores += columns * (torch.einsum("bihd,bjhd->bhij", vv, d_columns) - delta_columns)
    d_scores *= qv.shape[-1] ** -0.5
    results = (
        torch.einsum("bhij,bjhd->bihd", d_scores, qa),
        torch.einsum("bhij,bihd->bjhd", d_scores, qv),
        torch.einsum("bhij,bjhd->bihd", columns, d_columns),
        torch.einsum("bhij,bihd->bjhd", rows, d_rows),
    )
    dq_video, dq_audio, dv_video, dv_audio = (x.flatten(2).to(q_video.dtype) for x in results)
    return dq_video, dq_audio, dv_video, dv_audio


def _scores(q_video: Tensor, q_audio: Tensor, num_heads: int) -> Tensor:
    """Scaled scores [B, H, Nv, Na] in at least single precision."""
    wide = torch.promote_types(q_video.dtype, torch.float32)
    qv, qa = (x.to(wide).unflatten(-1, (num_heads, -1)) for x in (q_video, q_audio))
    return torch.einsum("bihd,bjhd->bhij", qv, qa) * qv.shape[-1] ** -0.5
