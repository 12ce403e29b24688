"""Bidirectional attention of sharded streams (arXiv 2503.23377, section 3.2).

Each rank holds a part of the video tokens and sees all audio tokens, which are few. What audio says to video is then
complete. What video says to audio is a softmax over video tokens of all ranks: with the partial results ``o_r`` and the
logarithms ``l_r`` of their denominators,

    o = sum_r softmax(l)_r o_r

exactly, as in flash attention with split keys. So audio travels and video stays: at 512x512 that is 224 tokens a layer,
not 30,720.

The backward pass is that of the one attention: with ``o`` and ``l = logsumexp_r(l_r)``, the softmax over all of the
video is ``exp(s - l)`` on any part of it, so each rank runs the op's own backward pass on its video tokens, given ``o``
and ``l`` in the place of its partial ones. What that says of the audio is a part of a sum over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from javis.kernels.backend import Backend
from javis.kernels.ops.bidirectional_attention import lse as part
from javis.model import ops as plain
from javis.parallel.collectives import exchange, gather, scatter_sum


def backend_for(op: Callable[..., tuple[Tensor, Tensor]]) -> str:
    """The backend of the form of ``op`` that has parts: plain PyTorch for the plain op, else the kernels'."""
    return "reference" if op is plain.bidirectional_attention else "auto"


def combine(parts: Tensor, lse: Tensor) -> Tensor:
    """Results [R, B, N, E] over R disjoint sets of keys, log-sum-exps [R, B, N, H] -> over all of them, [B, N, E]."""
    weights = lse.softmax(0)[..., None]
    return (weights * parts.unflatten(-1, (lse.shape[-1], -1))).sum(0).flatten(2)


def sharded_attention(
    q_video: Tensor,
    q_audio: Tensor,
    v_video: Tensor,
    v_audio: Tensor,
    num_heads: int,
    *,
    audio_sizes: Sequence[int] | None,
    group: ProcessGroup,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Both directions for this rank's tokens, differentiable if the audio is divided.

    Args:
        q_video, v_video: [B, this rank's video tokens, E].
        q_audio, v_audio: [B, this rank's audio tokens, E]; all of them where ``audio_sizes`` is None.
        audio_sizes: audio tokens of each rank; None: every rank has all of them, and gets all results (no gradients).
        backend: of the op on one part, :func:`backend_for`.
    """
    # Autocast leaves rotated queries in float32.
    dtype = reduce(torch.promote_types, [x.dtype for x in (q_video, q_audio, v_video, v_audio)])
    q_video, q_audio, v_video, v_audio = (x.to(dtype) for x in (q_video, q_audio, v_video, v_audio))
    chosen = part.chosen(q_video, q_audio, v_video, v_audio, num_heads, backend=backend)
    with torch.autocast(q_video.device.type, enabled=False):  # scores are never rounded
        if audio_sizes is not None:
            made: tuple[Tensor, Tensor] = _ShardedAttention.apply(
                q_video, q_audio, v_video, v_audio, num_heads, list(audio_sizes), group, chosen
            )
            return made
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_video, q_audio, v_video, v_audio)):
            raise ValueError("audio that every rank has whole carries no gradients; divide it (shard_audio)")
        to_video, partial, _, logs = part.forward(q_video, q_audio, v_video, v_audio, num_heads, backend=chosen)
        packed = gather(_packed(partial, logs), 0, [1] * group.size(), group)
        return to_video, _merged(packed, num_heads)[0].to(dtype)


def _packed(results: Tensor, logs: Tensor) -> Tensor:
    """One message: results and, in the same (at least single) precision, logarithms to base 2: [1, B, Na, E + H]."""
    return torch.cat((results.to(logs.dtype), logs.transpose(1, 2)), -1)[None]


def _merged(packed: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Messages [R, B, N, E + H] -> results over all parts [B, N, E], and their logarithms to base 2 [B, N, H]."""
    parts, logs = packed.split([packed.shape[-1] - num_heads, num_heads], -1)
    natural = logs * math.log(2)
    return combine(parts, natural), natural.logsumexp(0) / math.log(2)


class _ShardedAttention(torch.autograd.Function):
    """`sharded_attention` of divided audio, on one backend."""

    @staticmethod
    def forward(
        ctx: Any,
        q_video: Tensor,
        q_audio: Tensor,
        v_video: Tensor,
        v_audio: Tensor,
        num_heads: int,
        audio_sizes: list[int],
        group: ProcessGroup,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        q_whole, v_whole = gather(torch.cat((q_audio, v_audio), -1), 1, audio_sizes, group).chunk(2, -1)
        to_video, partial, lse_video, logs = part.forward(
            q_video, q_whole, v_video, v_whole, num_heads, backend=backend
        )
        packed = exchange(
            _packed(partial, logs), split=2, out_sizes=audio_sizes, join=0, in_sizes=[1] * len(audio_sizes), group=group
        )
        to_audio, lse_audio = _merged(packed, num_heads)
        to_audio = to_audio.to(partial.dtype)
        ctx.save_for_backward(q_video, q_whole, v_video, v_whole, to_video, to_audio, lse_video, lse_audio)
        ctx.told = num_heads, audio_sizes, group, backend
        return to_video, to_audio

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_to_video: Tensor, d_to_audio: Tensor) -> tuple[Tensor | None, ...]:
        q_video, q_audio, v_video, v_audio, to_video, to_audio, lse_video, lse_audio = ctx.saved_tensors
        num_heads, sizes, group, backend = ctx.told
        width, dtype = q_video.shape[-1], q_video.dtype
        # Every rank's video was asked by all of the audio: one message tells its gradients, results and logarithms.
        packed = torch.cat((d_to_audio.to(lse_audio.dtype), to_audio.to(lse_audio.dtype), lse_audio), -1)
        d_whole, out, logs = gather(packed, 1, sizes, group).split([width, width, num_heads], -1)
        dq_video, dq_whole, dv_video, dv_whole = part.backward(
            d_to_video.contiguous(),
            d_whole.to(dtype).contiguous(),
            q_video,
            q_audio,
            v_video,
            v_audio,
            to_video,
            out.to(dtype).contiguous(),
            lse_video,
            logs.transpose(1, 2).contiguous(),
            num_heads,
            backend=backend,
        )
        own = scatter_sum(torch.cat((dq_whole, dv_whole), -1), 1, sizes, group)
        dq_audio, dv_audio = own.chunk(2, -1)
        return dq_video, dq_audio, dv_video, dv_audio, None, None, None, None
