"""bidirectional_attention on CPU: PyTorch's matrix products around the native softmaxes, chunk by chunk of video.

The scores of a chunk are made once, serve both softmaxes while they are in cache, and are never kept: memory is a few
megabytes whatever the length of the video. Scores are float32 for bfloat16 inputs too: rounded, they would be most of
the error. The formulas are in docs/kernels/bidirectional_attention.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 512  # video tokens of a chunk: with 224 audio tokens its scores take half a megabyte per head in float32


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[N, E] -> [H, N, D], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def _product_to(a: Tensor, b: Tensor, total: Tensor, keep: Tensor | None = None) -> None:
    """total = total * keep + a @ b, with the total in float32 whatever a and b are."""
    if keep is not None:
        total.mul_(keep[:, :, None])
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def forward(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results and the logarithms of both denominators, as contract.py describes them."""
    batch, n_video, width = q_video.shape
    n_audio = q_audio.shape[1]

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    lse_video = floats(batch, num_heads, n_video).fill_(-math.inf)
    lse_audio = floats(batch, num_heads, n_audio).fill_(-math.inf)
    to_video, to_audio = q_video.new_empty(q_video.shape), q_video.new_empty(q_audio.shape)
    if 0 in (batch, n_video, n_audio):
        return to_video.zero_(), to_audio.zero_(), lse_video, lse_audio
    softmaxes = torch.ops.javis_native.bidirectional_softmaxes.default
    scale = (width // num_heads) ** -0.5
    chunk_shape = (num_heads, min(ROWS, n_video), n_audio)
    buffers = [floats(*chunk_shape), q_video.new_empty(chunk_shape), q_video.new_empty(chunk_shape)]
    keep, column_sum = floats(num_heads, n_audio), floats(num_heads, n_audio)
    total = floats(num_heads, n_audio, width // num_heads)
    for b in range(batch):
        qv, qa, vv, va, out = (_heads(x[b], num_heads) for x in (q_video, q_audio, v_video, v_audio, to_video))
        qa = qa.float()
        column_max = lse_audio[b]
        column_sum.zero_()
        total.zero_()
        for start in range(0, n_video, ROWS):
            chunk = slice(start, min(start + ROWS, n_video))
            scores, across, down = (x[:, : chunk.stop - start] for x in buffers)
            torch.bmm(qv[:, chunk].float(), qa.transpose(1, 2), out=scores)
            softmaxes(scores, across, down, lse_video[b, :, chunk], column_max, column_sum, keep, scale)
            out[:, chunk] = torch.bmm(across, va)
            _product_to(down.transpose(1, 2), vv[:, chunk], total, keep)
        _heads(to_audio[b], num_heads).copy_(total / column_sum[:, :, None])
        column_max += column_sum.log2()
    return to_video, to_audio, lse_video, lse_audio


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_video, q_audio, v_video, v_audio."""
    batch, n_video, width = q_video.shape
    n_audio = q_audio.shape[1]
    dq_video, dv_video = (q_video.new_empty(q_video.shape) for _ in range(2))
    dq_audio, dv_audio = (q_video.new_empty(q_audio.shape) for _ in range(2))
    if 0 in (batch, n_video, n_audio):
        return dq_video.zero_(), dq_audio.zero_(), dv_video.zero_(), dv_audio.zero_()
    gradient = torch.ops.javis_native.bidirectional_score_gradient.default
    scale = (width // num_heads) ** -0.5
    chunk_shape = (num_heads, min(ROWS, n_video), n_audio)
    buffers = [torch.empty(chunk_shape), *(q_video.new_empty(chunk_shape) for _ in range(3))]
    sums = torch.empty((2, num_heads, n_audio, width // num_heads), dtype=torch.float32)

    def delta(d: Tensor, out: Tensor) -> Tensor:
        return (d.float() * out).unflatten(-1, (num_heads, -1)).sum(-1).transpose(0, 1).contiguous()  # [H, N]

    for b in range(batch):
        tensors = (q_video, q_audio, v_video, v_audio, d_to_video, d_to_audio, dq_video, dv_video)
        qv, qa, vv, va, dov, doa, dqv, dvv = (_heads(x[b], num_heads) for x in tensors)
        wide_qa = qa.float()
        delta_audio = delta(d_to_audio[b], to_audio[b])
        sums.zero_()
        for start in range(0, n_video, ROWS):
            chunk = slice(start, min(start + ROWS, n_video))
            scores, d_scores, d_row, d_column = (x[:, : chunk.stop - start] for x in buffers)
            torch.bmm(qv[:, chunk].float(), wide_qa.transpose(1, 2), out=scores)
            torch.bmm(dov[:, chunk], va.transpose(1, 2), out=d_row)
            torch.bmm(vv[:, chunk], doa.transpose(1, 2), out=d_column)
            delta_video = delta(d_to_video[b, chunk], to_video[b, chunk])
            gradient(
                scores, d_scores, d_row, d_column, lse_video[b, :, chunk], delta_video, lse_audio[b], delta_audio, scale
            )  # from here on d_row and d_column are the softmaxes
            dqv[:, chunk] = torch.bmm(d_scores, qa)
            dvv[:, chunk] = torch.bmm(d_column, doa)
            _product_to(d_scores.transpose(1, 2), qv[:, chunk], sums[0])
            _product_to(d_row.transpose(1, 2), dov[:, chunk], sums[1])
        _heads(dq_audio[b], num_heads).copy_(sums[0])
        _heads(dv_audio[b], num_heads).copy_(sums[1])
    return dq_video, dq_audio, dv_video, dv_audio
