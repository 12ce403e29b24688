"""What PyTorch knows of ada_layer_norm: when its kernels can run, the shapes they return, their gradient.

Native ops are in namespaces ``javis_native`` (CPU, schemas in csrc/registration.cpp) and ``javis_cuda``
(csrc/cuda/registration.cpp), Triton ops in ``javis``. Two registered ops make one differentiable call through an
``autograd.Function``, which costs less per call than ``torch.library.register_autograd`` and traces the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native, triton_support

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def why_not_cpu(x: Tensor, *modulation: Tensor | None) -> str | None:
    """Why the native CPU kernel cannot take this call, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if x.device.type != "cpu":
        return f"needs CPU tensors, x is on {x.device}"
    if x.dtype not in NATIVE_DTYPES:
        return f"no {str(x.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    for tensor in modulation:
        if tensor is not None and tensor.device.type != "cpu":
            return f"needs CPU tensors, the modulation is on {tensor.device}"
        if tensor is not None and tensor.dtype == torch.float64:
            return "the modulation is float64, which the kernel would round to float32"
    return None


CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CUDA_WIDTH = 4096  # kMaxNormWidth in csrc/cuda/norm.h: a row is kept in the registers of one block
MAX_TRITON_WIDTH = 16384  # a row is kept in registers


def why_not_cuda(x: Tensor, *modulation: Tensor | None) -> str | None:
    """Why the CUDA kernel cannot take this call, or None."""
    reason = native.why_not_cuda(x, *modulation, dtypes=CUDA_DTYPES)
    if reason is None and (x.shape[-1] % 8 or x.shape[-1] > MAX_CUDA_WIDTH):
        return f"width {x.shape[-1]} is not a multiple of 8 up to {MAX_CUDA_WIDTH}"
    return reason


def why_not_triton(x: Tensor, *modulation: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if x.shape[-1] > MAX_TRITON_WIDTH:
        return f"width {x.shape[-1]} is more than {MAX_TRITON_WIDTH}, one row in registers"
    return triton_support.why_not_triton(x, *modulation)


def uniform(*modulation: Tensor | None) -> list[Tensor | None]:
    """Modulation [B, C] of one dtype with dense rows, as the Triton kernels read it; usually nothing is copied."""
    dtypes = {tensor.dtype for tensor in modulation if tensor is not None}
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def prepare(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(common)
        return tensor if tensor.stride(1) == 1 else tensor.contiguous()

    return [prepare(tensor) for tensor in modulation]


def uniform_for_cuda(x: Tensor, *modulation: Tensor | None) -> list[Tensor | None]:
    """Modulation as the CUDA kernels read it: all float32, or all of the dtype of x; usually nothing is copied."""
    prepared = uniform(*modulation)
    dtype = next(tensor.dtype for tensor in prepared if tensor is not None)
    return prepared if dtype == x.dtype else [None if tensor is None else tensor.float() for tensor in prepared]


def ada_layer_norm_cuda(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """The CUDA op on arguments that ``why_not_cuda`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    y: Tensor = AdaLayerNorm.apply(
        x, *uniform_for_cuda(x, shift, scale, shift0, scale0), mask, eps, torch.ops.javis_cuda
    )
    return y


def ada_layer_norm_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """The Triton op on arguments that ``why_not_triton`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    y: Tensor = AdaLayerNorm.apply(x, *uniform(shift, scale, shift0, scale0), mask, eps, torch.ops.javis)
    return y


def dense(tensor: Tensor | None) -> Tensor | None:
    """Modulation [B, C] as the native kernels take it: small, so that one dtype and layout suffice there."""
    return None if tensor is None else tensor.float().contiguous()


def ada_layer_norm_native(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """The native op on arguments that ``why_not_cpu`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    y: Tensor = AdaLayerNorm.apply(
        x, dense(shift), dense(scale), dense(shift0), dense(scale0), mask, eps, torch.ops.javis_native
    )
    return y


class AdaLayerNorm(torch.autograd.Function):
    """The registered ops of one namespace, forward and backward; see api.py for the shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        shift0: Tensor | None,
        scale0: Tensor | None,
        frame_mask: Tensor | None,
        eps: float,
        ops: Any,
    ) -> Tensor:
        y, mean, rstd = ops.ada_layer_norm.default(x, shift, scale, shift0, scale0, frame_mask, eps)
        ctx.ops = ops
        ctx.save_for_backward(x, mean, rstd, scale, scale0, frame_mask)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dmodulation = ctx.ops.ada_layer_norm_backward.default(dy, *ctx.saved_tensors)
        if dmodulation.shape[0] == 2:
            return dx, dmodulation[0], dmodulation[1], None, None, None, None, None
        return dx, dmodulation[0], dmodulation[1], dmodulation[2], dmodulation[3], None, None, None


def _forward_shapes(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # new_empty, not empty_like: the kernels allocate dense outputs whatever the strides of x.
    statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sums = 2 if frame_mask is None else 4
    return x.new_empty(x.shape), scale.new_empty((sums, x.shape[0], x.shape[2]))


if native.WHY_NOT is None:
    torch.library.register_fake("javis_native::ada_layer_norm")(_forward_shapes)
    torch.library.register_fake("javis_native::ada_layer_norm_backward")(_backward_shapes)
if native.WHY_NOT_CUDA is None:
    torch.library.register_fake("javis_cuda::ada_layer_norm")(_forward_shapes)
    torch.library.register_fake("javis_cuda::ada_layer_norm_backward")(_backward_shapes)

torch.library.define(
    "javis::ada_layer_norm",
    "(Tensor x, Tensor shift, Tensor scale, Tensor? shift0, Tensor? scale0, Tensor? frame_mask, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "javis::ada_layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor? scale0, Tensor? frame_mask)"
    " -> (Tensor dx, Tensor dmodulation)",
)
torch.library.register_fake("javis::ada_layer_norm")(_forward_shapes)
torch.library.register_fake("javis::ada_layer_norm_backward")(_backward_shapes)


# Triton is imported by the first call.


@torch.library.impl("javis::ada_layer_norm", ("CPU", "CUDA"))
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.ada_layer_norm import triton_impl

    return triton_impl.ada_layer_norm(*args)


@torch.library.impl("javis::ada_layer_norm_backward", ("CPU", "CUDA"))
def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    from javis.kernels.ops.ada_layer_norm import triton_impl

    return triton_impl.ada_layer_norm_backward(*args)
