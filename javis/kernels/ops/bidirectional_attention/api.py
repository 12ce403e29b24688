"""bidirectional_attention: video asks audio and audio asks video, with one score matrix for both.

    S[i, j]     = q_video[i] . q_audio[j] / sqrt(D)                 per head, i over video, j over audio tokens
    to_video[i] = sum over j of softmax(S[i, :])[j] * v_audio[j]    rows
    to_audio[j] = sum over i of softmax(S[:, j])[i] * v_video[i]    columns

This is the multi-modal bidirectional cross-attention of JavisDiT (arXiv 2503.23377, section 3.2).

Read next: reference.py (the maths), contract.py (what torch.compile sees), triton_impl.py (the GPU kernels),
csrc/cuda/bidirectional_attention.cu (the same, for inference in 16 bits),
native_impl.py (the CPU form: chunks of matrix products around csrc/cpu/bidirectional_attention_rows.cpp).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.bidirectional_attention import contract
from javis.kernels.ops.bidirectional_attention.reference import bidirectional_attention_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: contract.why_not_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.CPU: contract.why_not_cpu,
    Backend.SDPA: contract.why_not_sdpa,
    Backend.REFERENCE: _always,
}


def bidirectional_attention(
    q_video: Tensor,
    q_audio: Tensor,
    v_video: Tensor,
    v_audio: Tensor,
    num_heads: int,
    *,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor]:
    """Both directions of attention between two streams, from one score matrix.

    Args:
        q_video: [B, Nv, E] with E = heads * D; asks, and is asked (there are no separate keys).
        q_audio: [B, Na, E].
        v_video, v_audio: values, like the q of their stream.
        num_heads: H, divides E.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        What audio says to video [B, Nv, E] and what video says to audio [B, Na, E], in the dtype of the inputs,
        differentiable in all four. Over no tokens at all a sum is 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    _validate(q_video, q_audio, v_video, v_audio, num_heads)
    arguments = (q_video, q_audio, v_video, v_audio, num_heads)
    chosen = select("bidirectional_attention", CHECKS, *arguments, backend=backend)
    if chosen is Backend.CUDA:
        return contract.bidirectional_attention_cuda(*arguments)
    if chosen is Backend.TRITON:
        return contract.bidirectional_attention_fused(*arguments, native=False)
    if chosen is Backend.CPU:
        return contract.bidirectional_attention_fused(*arguments, native=True)
    if chosen is Backend.SDPA:
        return contract.bidirectional_attention_sdpa(*arguments)
    return bidirectional_attention_ref(*arguments)


def _validate(q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int) -> None:
    if q_video.ndim != 3 or not q_video.dtype.is_floating_point:
        raise ValueError(f"q_video must be a floating-point [B, Nv, E], got {q_video.dtype} {tuple(q_video.shape)}")
    batch, video_tokens, width = q_video.shape
    if num_heads < 1 or width == 0 or width % num_heads:
        raise ValueError(f"num_heads must divide the width E of q_video, {width}, got {num_heads}")
    if q_audio.ndim != 3 or q_audio.shape[0] != batch or q_audio.shape[2] != width:
        raise ValueError(
            f"q_audio must be [{batch}, Na, {width}] as q_video is {tuple(q_video.shape)}, got {tuple(q_audio.shape)}"
        )
    for name, tensor, tokens in (("v_video", v_video, video_tokens), ("v_audio", v_audio, q_audio.shape[1])):
        if tuple(tensor.shape) != (batch, tokens, width):
            raise ValueError(f"{name} must be {[batch, tokens, width]} like its q, got {tuple(tensor.shape)}")
    for name, tensor in (("q_audio", q_audio), ("v_video", v_video), ("v_audio", v_audio)):
        if tensor.dtype != q_video.dtype:
            raise ValueError(f"{name} must be {q_video.dtype} like q_video, got {tensor.dtype}")
        if tensor.device != q_video.device:
            raise ValueError(f"{name} must be on {q_video.device} like q_video, got {tensor.device}")
