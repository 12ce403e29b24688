"""Bidirectional attention of sharded streams (arXiv 2503.23377, section 3.2).

Each rank holds a part of the video tokens and sees all audio tokens, which are few. What audio says to video is then
complete. What video says to audio is a softmax over video tokens of all ranks: with the partial results ``o_r`` and the
logarithms ``l_r`` of their denominators,

    o = sum_r softmax(l)_r o_r

exactly, as in flash attention with split keys. So audio travels and video stays: at 512x512 that is 224 tokens a layer,
not 30,720.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from javis.kernels.ops.bidirectional_attention.lse import bidirectional_attention_lse
from javis.model import ops as plain
from javis.parallel.collectives import exchange, gather

# (q_video, q_audio, v_video, v_audio, heads) -> to_video [B, Nv, E], to_audio [B, Na, E], lse of audio [B, H, Na]
Partial = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def partial_for(op: Callable[..., tuple[Tensor, Tensor]]) -> Partial:
    """The form of ``op`` that also returns the log-sum-exp: in plain PyTorch for the plain op, else the kernels'."""
    backend = "reference" if op is plain.bidirectional_attention else "auto"
    return partial(bidirectional_attention_lse, backend=backend)


def combine(parts: Tensor, lse: Tensor) -> Tensor:
    """Results [R, B, N, E] over R disjoint sets of keys, log-sum-exps [R, B, N, H] -> over all of them, [B, N, E]."""
    weights = lse.softmax(0)[..., None]
    return (weights * parts.unflatten(-1, (lse.shape[-1], -1))).sum(0).flatten(2)


def sharded_attention(
    attend: Partial,
    q_video: Tensor,
    q_audio: Tensor,
    v_video: Tensor,
    v_audio: Tensor,
    num_heads: int,
    *,
    audio_sizes: Sequence[int] | None,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Both directions for this rank's tokens.

    Args:
        attend: the op on one part, :func:`partial_for`.
        q_video, v_video: [B, this rank's video tokens, E].
        q_audio, v_audio: [B, this rank's audio tokens, E]; all of them where ``audio_sizes`` is None.
        audio_sizes: audio tokens of each rank; None: every rank has all of them, and gets all results.
    """
    ranks = group.size()
    if audio_sizes is not None:
        q_audio, v_audio = gather(torch.cat((q_audio, v_audio), -1), 1, audio_sizes, group).chunk(2, -1)
    to_video, part, lse = attend(q_video, q_audio, v_video, v_audio, num_heads)
    # One message: results and, in the same (at least single) precision, the logarithms.
    packed = torch.cat((part.to(lse.dtype), lse.transpose(1, 2)), -1)[None]  # [1, B, Na, E + H]
    if audio_sizes is None:
        packed = gather(packed, 0, [1] * ranks, group)
    else:
        packed = exchange(packed, split=2, out_sizes=audio_sizes, join=0, in_sizes=[1] * ranks, group=group)
    parts, logs = packed.split([part.shape[-1], num_heads], -1)
    return to_video, combine(parts, logs).to(part.dtype)
