"""What PyTorch knows of gated_residual_ada_layer_norm: when its kernels can run, their shapes, their gradient.

Native ops are in namespaces ``javis_native`` (CPU) and ``javis_cuda``, Triton ops in ``javis``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.kernels import native, triton_support
from javis.kernels.ops.ada_layer_norm import contract as norm
from javis.kernels.ops.ada_layer_norm.contract import MAX_TRITON_WIDTH, NATIVE_DTYPES, dense, uniform


def why_not_cpu(x: Tensor, h: Tensor, *others: Tensor | None) -> str | None:
    """Why the native CPU kernel cannot take this call, or None."""
    if native.WHY_NOT is not None:
        return native.WHY_NOT
    if x.device.type != "cpu":
        return f"needs CPU tensors, x is on {x.device}"
    if x.dtype not in NATIVE_DTYPES:
        return f"no {str(x.dtype).removeprefix('torch.')} kernel, only float32 and bfloat16"
    for tensor in (h, *others):
        if tensor is not None and tensor.device.type != "cpu":
            return f"needs CPU tensors, an argument is on {tensor.device}"
        if tensor is not None and tensor.dtype == torch.float64:
            return "an argument is float64, which the kernel would round to float32"
    if h.dtype != x.dtype and x.dtype != torch.float32:
        return f"h is {h.dtype}, which the kernel would round to the dtype of x, {x.dtype}"
    return None


def why_not_cuda(x: Tensor, h: Tensor, *others: Tensor | None) -> str | None:
    """Why the CUDA kernel cannot take this call, or None."""
    if h.dtype != x.dtype and x.dtype != torch.float32:
        return f"h is {h.dtype}, which the kernel would round to the dtype of x, {x.dtype}"
    return norm.why_not_cuda(x, h, *others)


def why_not_triton(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if x.shape[-1] > MAX_TRITON_WIDTH:
        return f"width {x.shape[-1]} is more than {MAX_TRITON_WIDTH}, one row in registers"
    return triton_support.why_not_triton(x, *others)


def gated_residual_ada_layer_norm_cuda(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The CUDA op on arguments that ``why_not_cuda`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    modulation = norm.uniform_for_cuda(x, gate, shift, scale, gate0, shift0, scale0)
    r, y = GatedResidualAdaLayerNorm.apply(x, h.to(x.dtype), *modulation, mask, eps, torch.ops.javis_cuda)
    return r, y


def gated_residual_ada_layer_norm_triton(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The Triton op on arguments that ``why_not_triton`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    modulation = uniform(gate, shift, scale, gate0, shift0, scale0)
    r, y = GatedResidualAdaLayerNorm.apply(x, h, *modulation, mask, eps, torch.ops.javis)
    return r, y


def gated_residual_ada_layer_norm_native(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The native op on arguments that ``why_not_cpu`` has accepted."""
    mask = None if frame_mask is None else frame_mask.bool().contiguous()
    modulation = [dense(tensor) for tensor in (gate, shift, scale, gate0, shift0, scale0)]
    r, y = GatedResidualAdaLayerNorm.apply(x, h.to(x.dtype), *modulation, mask, eps, torch.ops.javis_native)
    return r, y


class GatedResidualAdaLayerNorm(torch.autograd.Function):
    """The registered ops of one namespace, forward and backward; see api.py for the shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        gate0: Tensor | None,
        shift0: Tensor | None,
        scale0: Tensor | None,
        frame_mask: Tensor | None,
        eps: float,
        ops: Any,
    ) -> tuple[Tensor, Tensor]:
        r, y, mean, rstd = ops.gated_residual_ada_layer_norm.default(
            x, h, gate, shift, scale, gate0, shift0, scale0, frame_mask, eps
        )
        # Without a gate, dh is dx and nobody needs h again.
        ctx.save_for_backward(r, None if gate is None else h, mean, rstd, gate, scale, gate0, scale0, frame_mask)
        ctx.ops = ops
        return r, y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dr: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, frame_mask = ctx.saved_tensors[4], ctx.saved_tensors[8]
        op = ctx.ops.gated_residual_ada_layer_norm_backward.default
        dx, dh, sums = op(dr, dy, *ctx.saved_tensors)
        dshift, dscale = sums[0], sums[1]
        dgate = dgate0 = dshift0 = dscale0 = None
        if gate is None:
            dh = dx
        else:
            dgate = sums[2]
        if frame_mask is not None:
            rest = sums[sums.shape[0] // 2 :]
            dshift0, dscale0 = rest[0], rest[1]
            dgate0 = None if gate is None else rest[2]
        return dx, dh, dgate, dshift, dscale, dgate0, dshift0, dscale0, None, None, None


def _forward_shapes(
    x: Tensor, h: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # new_empty, not empty_like: the kernels allocate dense outputs whatever the strides of x.
    statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _backward_shapes(
    dr: Tensor,
    dy: Tensor,
    r: Tensor,
    h: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    gate0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = (2 if gate is None else 3) * (1 if frame_mask is None else 2)
    dh = r.new_empty(0) if gate is None or h is None else h.new_empty(h.shape)
    return r.new_empty(r.shape), dh, scale.new_empty((sums, r.shape[0], r.shape[2]))


if native.WHY_NOT is None:
    torch.library.register_fake("javis_native::gated_residual_ada_layer_norm")(_forward_shapes)
    torch.library.register_fake("javis_native::gated_residual_ada_layer_norm_backward")(_backward_shapes)
if native.WHY_NOT_CUDA is None:
    torch.library.register_fake("javis_cuda::gated_residual_ada_layer_norm")(_forward_shapes)
    torch.library.register_fake("javis_cuda::gated_residual_ada_layer_norm_backward")(_backward_shapes)

torch.library.define(
    "javis::gated_residual_ada_layer_norm",
    "(Tensor x, Tensor h, Tensor? gate, Tensor shift, Tensor scale, Tensor? gate0, Tensor? shift0, Tensor? scale0,"
    " Tensor? frame_mask, float eps) -> (Tensor r, Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "javis::gated_residual_ada_layer_norm_backward",
    "(Tensor dr, Tensor dy, Tensor r, Tensor? h, Tensor mean, Tensor rstd, Tensor? gate, Tensor scale, Tensor? gate0,"
    " Tensor? scale0, Tensor? frame_mask) -> (Tensor dx, Tensor dh, Tensor dmodulation)",
)
torch.library.register_fake("javis::gated_residual_ada_layer_norm")(_forward_shapes)
torch.library.register_fake("javis::gated_residual_ada_layer_norm_backward")(_backward_shapes)


# Triton is imported by the first call.


@torch.library.impl("javis::gated_residual_ada_layer_norm", ("CPU", "CUDA"))
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from javis.kernels.ops.gated_residual_ada_layer_norm import triton_impl

    return triton_impl.forward(*args)


@torch.library.impl("javis::gated_residual_ada_layer_norm_backward", ("CPU", "CUDA"))
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.gated_residual_ada_layer_norm import triton_impl

    return triton_impl.backward(*args)
