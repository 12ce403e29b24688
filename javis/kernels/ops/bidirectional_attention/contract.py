"""What PyTorch knows of the fused forms of bidirectional_attention: when they run, shapes, gradients.

Two pairs of registered ops with the same schemas, ``javis::bidirectional_attention`` (Triton) and
``javis::bidirectional_attention_native`` (CPU), share one ``autograd.Function``. Beside the results the forward ops
return the logarithm (base 2) of each softmax's denominator, [B, H, N] in float32: all that the backward pass needs to
make either softmax again from the scores. ``javis_cuda::bidirectional_attention`` has the schema of these forward ops;
its backward pass is Triton's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from javis.kernels import native, triton_support

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128  # of the GPU kernels, whose tiles hold whole heads
# Shared memory of the CUDA kernel, for heads of up to 72 values and beyond: Plan::kShared in its source.
CUDA_SHARED = (137_472, 160_000)


def why_not_cuda(q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int) -> str | None:
    """Why the CUDA kernel cannot take this call, or None."""
    inputs = (q_video, q_audio, v_video, v_audio)
    reason = native.why_not_cuda(*inputs, dtypes=CUDA_DTYPES)
    if reason is not None:
        return reason
    size = q_video.shape[2] // num_heads
    if size % 8 or size > MAX_HEAD_SIZE:
        return f"head size {size} is not a multiple of 8 up to {MAX_HEAD_SIZE}"
    if q_video.shape[0] * num_heads > 65535:
        return f"batch * heads is {q_video.shape[0] * num_heads}, a launch grid holds up to 65535"
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        reason = why_not_triton(*inputs, num_heads)
        if reason is not None:
            return f"an argument requires a gradient, whose kernels are Triton's: {reason}"
    if q_video.device.type == "cuda":
        needs = CUDA_SHARED[size > 72]
        has = getattr(torch.cuda.get_device_properties(q_video.device), "shared_memory_per_block_optin", 49152)
        if has < needs:
            return f"needs {needs} bytes of shared memory in a block of threads, this GPU has {has}"
    return None


def why_not_triton(q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int) -> str | None:
    """Why the Triton kernels cannot take this call, or None."""
    size = q_video.shape[2] // num_heads
    if size > MAX_HEAD_SIZE:
        return f"head size {size}, the kernels hold up to {MAX_HEAD_SIZE}"
    if q_video.shape[0] * num_heads > 65535:
        return f"batch * heads is {q_video.shape[0] * num_heads}, a launch grid holds up to 65535"
    return triton_support.why_not_triton(q_video, q_audio, v_video, v_audio)


def why_not_cpu(q_video: Tensor, *_: object) -> str | None:
    """Why the native CPU kernels cannot take this call, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if q_video.device.type != "cpu":
        return f"needs CPU tensors, q_video is on {q_video.device}"
    if q_video.dtype not in NATIVE_DTYPES:
        return f"no {str(q_video.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    return None


def why_not_sdpa(q_video: Tensor, q_audio: Tensor, *_: object) -> str | None:
    """Why torch's scaled_dot_product_attention is not used for this call, or None."""
    if q_video.dtype == torch.float64:
        return "float64 goes to the reference"
    if q_video.numel() == 0 or q_audio.numel() == 0:
        return "nothing to attend to: a batch or a stream is empty"
    return None


def bidirectional_attention_sdpa(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Two calls of torch's attention, which computes the scores in each: once by rows, once by columns.

    On a CPU its mathematical form: the fused one of torch 2.13 approximates the exponential to 20 bits, beyond the
    error budget of float32, and makes zeros of a row of NaN.
    """
    if q_video.device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            return _two_attentions(q_video, q_audio, v_video, v_audio, num_heads)
    return _two_attentions(q_video, q_audio, v_video, v_audio, num_heads)


def _two_attentions(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_video, q_audio, v_video, v_audio))
    qv, qa, vv, va = heads  # [B, H, N, D]
    to_video = F.scaled_dot_product_attention(qv, qa, va)
    to_audio = F.scaled_dot_product_attention(qa, qv, vv)
    return to_video.transpose(1, 2).flatten(2), to_audio.transpose(1, 2).flatten(2)


def bidirectional_attention_fused(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int, *, native: bool
) -> tuple[Tensor, Tensor]:
    """The registered ops on arguments that ``why_not_triton`` or ``why_not_cpu`` has accepted."""
    results: tuple[Tensor, Tensor] = BidirectionalAttention.apply(q_video, q_audio, v_video, v_audio, num_heads, native)
    return results


def bidirectional_attention_cuda(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """The CUDA op on arguments that ``why_not_cuda`` has accepted."""
    results: tuple[Tensor, Tensor] = BidirectionalAttentionCuda.apply(q_video, q_audio, v_video, v_audio, num_heads)
    return results


class BidirectionalAttention(torch.autograd.Function):
    """See api.py for the shapes; ``native`` says which pair of ops runs."""

    @staticmethod
    def forward(
        ctx: Any, q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int, native: bool
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.javis.bidirectional_attention_native if native else torch.ops.javis.bidirectional_attention
        to_video, to_audio, lse_video, lse_audio = op.default(q_video, q_audio, v_video, v_audio, num_heads)
        ctx.num_heads, ctx.native = num_heads, native
        ctx.save_for_backward(q_video, q_audio, v_video, v_audio, to_video, to_audio, lse_video, lse_audio)
        return to_video, to_audio

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_to_video: Tensor, d_to_audio: Tensor) -> tuple[Tensor | None, ...]:
        ops = torch.ops.javis
        op = ops.bidirectional_attention_native_backward if ctx.native else ops.bidirectional_attention_backward
        return *op.default(d_to_video, d_to_audio, *ctx.saved_tensors, ctx.num_heads), None, None


class BidirectionalAttentionCuda(torch.autograd.Function):
    """Forward in CUDA, backward in Triton; see api.py for the shapes."""

    @staticmethod
    def forward(
        ctx: Any, q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.javis_cuda.bidirectional_attention.default
        to_video, to_audio, lse_video, lse_audio = op(q_video, q_audio, v_video, v_audio, num_heads)
        ctx.num_heads = num_heads
        ctx.save_for_backward(q_video, q_audio, v_video, v_audio, to_video, to_audio, lse_video, lse_audio)
        return to_video, to_audio

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_to_video: Tensor, d_to_audio: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.javis.bidirectional_attention_backward.default
        return *op(d_to_video, d_to_audio, *ctx.saved_tensors, ctx.num_heads), None


# The ops. Implementations load on the first call: triton, which is optional, is imported only there. ---------------


def _triton_forward(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from javis.kernels.ops.bidirectional_attention.launch import forward

    return forward(q_video, q_audio, v_video, v_audio, num_heads)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from javis.kernels.ops.bidirectional_attention.launch import backward

    return backward(*arguments)


def _native_forward(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from javis.kernels.ops.bidirectional_attention.native_impl import forward

    return forward(q_video, q_audio, v_video, v_audio, num_heads)


def _native_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from javis.kernels.ops.bidirectional_attention.native_impl import backward

    return backward(*arguments)


def _forward_shapes(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # new_empty, not empty_like: the launchers allocate dense outputs whatever the strides of the inputs.
    batch, video, _ = q_video.shape
    lse_video = q_video.new_empty((batch, num_heads, video), dtype=torch.float32)
    lse_audio = q_video.new_empty((batch, num_heads, q_audio.shape[1]), dtype=torch.float32)
    return q_video.new_empty(q_video.shape), q_video.new_empty(q_audio.shape), lse_video, lse_audio


def _backward_shapes(
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
    video, audio = q_video.shape, q_audio.shape
    return (
        q_video.new_empty(video),
        q_video.new_empty(audio),
        q_video.new_empty(video),
        q_video.new_empty(audio),
    )


_INPUTS = "Tensor q_video, Tensor q_audio, Tensor v_video, Tensor v_audio"
_FORWARD = f"({_INPUTS}, int num_heads) -> (Tensor to_video, Tensor to_audio, Tensor lse_video, Tensor lse_audio)"
_BACKWARD = (
    f"(Tensor d_to_video, Tensor d_to_audio, {_INPUTS}, Tensor to_video, Tensor to_audio, Tensor lse_video, "
    "Tensor lse_audio, int num_heads) -> (Tensor, Tensor, Tensor, Tensor)"
)

for _name, _schema, _devices, _run, _shapes in (
    ("bidirectional_attention", _FORWARD, ("CUDA", "CPU"), _triton_forward, _forward_shapes),
    ("bidirectional_attention_backward", _BACKWARD, ("CUDA", "CPU"), _triton_backward, _backward_shapes),
    ("bidirectional_attention_native", _FORWARD, ("CPU",), _native_forward, _forward_shapes),
    ("bidirectional_attention_native_backward", _BACKWARD, ("CPU",), _native_backward, _backward_shapes),
):
    torch.library.define(f"javis::{_name}", _schema)
    for _device in _devices:
        torch.library.impl(f"javis::{_name}", _device, _run)
    torch.library.register_fake(f"javis::{_name}", _shapes)

if native.WHY_NOT_CUDA is None:
    torch.library.register_fake("javis_cuda::bidirectional_attention")(_forward_shapes)
