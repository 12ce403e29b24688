"""Launches of the Triton kernels of bidirectional_attention: memory, grids and how work is split."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from javis.kernels.ops.bidirectional_attention.triton_impl import (
    MAX_STRIDE,
    backward_config,
    backward_kernel,
    delta_kernel,
    forward_config,
    forward_kernel,
    head_tiles,
    merge_kernel,
)

# Programs of a launch that splits one stream: enough to fill the 132 processors of an H100 about four times, so that
# the last ones to finish leave little idle. Not read from the device: results must not depend on its size.
PROGRAMS = 512


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _split(tiles: int, others: int) -> tuple[int, int]:
    """How many tiles a split has and how many splits there are, for ``others`` programs beside."""
    splits = min(tiles, max(1, PROGRAMS // others))
    per_split = _ceil(tiles, splits)
    return per_split, _ceil(tiles, per_split)


def _dense_rows(x: Tensor) -> Tensor:
    """Samples may have any stride and tokens nearly any; the values of a token must lie side by side."""
    return x if x.stride(2) == 1 and x.stride(1) <= MAX_STRIDE else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _is_hopper(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9  # the interpreter takes its tiles


def forward(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results and the logarithms of both denominators, as contract.py describes them."""
    batch, n_video, width = q_video.shape
    n_audio = q_audio.shape[1]
    inputs = [_dense_rows(x) for x in (q_video, q_audio, v_video, v_audio)]
    if 0 in (batch, n_video, n_audio):
        return _nothing(q_video, q_audio, num_heads)
    head = head_tiles(width // num_heads)
    config = forward_config(q_video.dtype, _is_hopper(q_video.device))
    pairs = batch * num_heads
    per_split, splits = _split(_ceil(n_video, config["BV"]), pairs)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q_video.device)

    to_video, to_audio = q_video.new_empty(q_video.shape), q_video.new_empty(q_audio.shape)
    lse_video, lse_audio = floats(batch, num_heads, n_video), floats(batch, num_heads, n_audio)
    parts = floats(pairs, splits, n_audio, width // num_heads), *(floats(pairs, splits, n_audio) for _ in range(2))
    scale = (width // num_heads) ** -0.5 * math.log2(math.e)
    forward_kernel[(splits, pairs)](
        *inputs, to_video, lse_video, *parts, *_strides(*inputs), num_heads, n_video, n_audio, per_split, scale,
        **head, **config,
    )  # fmt: skip
    block = 16  # little work in each, so many: 14 per head at 224 audio tokens
    merge_kernel[(_ceil(n_audio, block), pairs)](
        *parts, to_audio, lse_audio, num_heads, n_audio, splits, **head, BA=block, num_warps=4
    )
    return to_video, to_audio, lse_video, lse_audio


def _nothing(q_video: Tensor, q_audio: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """No samples, or nobody to ask: sums over no tokens."""
    lse = [
        torch.full((x.shape[0], num_heads, x.shape[1]), -math.inf, dtype=torch.float32, device=x.device)
        for x in (q_video, q_audio)
    ]
    return q_video.new_zeros(q_video.shape), q_video.new_zeros(q_audio.shape), lse[0], lse[1]


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
    if 0 in (*q_video.shape, *q_audio.shape):
        video, audio = q_video.new_zeros(q_video.shape), q_video.new_zeros(q_audio.shape)
        return video, audio, torch.zeros_like(video), torch.zeros_like(audio)
    of_video = [_dense_rows(x) for x in (q_video, v_video, d_to_video)]
    of_audio = [_dense_rows(x) for x in (q_audio, v_audio, d_to_audio)]
    of_video += [lse_video, _row_products(to_video, of_video[2], num_heads)]
    of_audio += [lse_audio, _row_products(to_audio, of_audio[2], num_heads)]
    dq_video, dv_video = _one_side(of_video, of_audio, num_heads)
    dq_audio, dv_audio = _one_side(of_audio, of_video, num_heads)
    return dq_video, dq_audio, dv_video, dv_audio


def _row_products(out: Tensor, dout: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = out.shape
    block = 64
    delta = torch.empty((batch, num_heads, tokens), dtype=torch.float32, device=out.device)
    delta_kernel[(_ceil(tokens, block), batch * num_heads)](
        out, dout, delta, *_strides(out, dout), num_heads, tokens, **head_tiles(width // num_heads), BLOCK=block
    )
    return delta


def _one_side(own: list[Tensor], other: list[Tensor], num_heads: int) -> tuple[Tensor, Tensor]:
    """dq and dv of the stream ``own``; each stream is (q, v, gradient of its result, lse, delta)."""
    q, v, do, lse, delta = own
    k, w, dp, klse, kdelta = other
    batch, tokens, width = q.shape
    others = k.shape[1]
    config = backward_config(q.dtype)
    tiles = _ceil(tokens, config["BM"])
    per_split, splits = _split(_ceil(others, config["BN"]), batch * num_heads * tiles)
    dtype = q.dtype if splits == 1 else torch.float32
    dq, dv = (torch.empty((splits, batch, tokens, width), dtype=dtype, device=q.device) for _ in range(2))
    scale = (width // num_heads) ** -0.5 * math.log2(math.e)
    backward_kernel[(tiles, splits, batch * num_heads)](
        q, k, v, w, do, dp, lse, klse, delta, kdelta, dq, dv, *_strides(q, k, v, w, do, dp),
        num_heads, tokens, others, per_split, scale,
        **head_tiles(width // num_heads), **config,
    )  # fmt: skip
    if splits == 1:
        return dq[0], dv[0]
    return dq.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)
