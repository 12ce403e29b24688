"""ada_layer_norm_fp8: ada_layer_norm whose output is float8 for the matrix product that follows.

    y = LayerNorm(x) * (1 + scale) + shift            as ada_layer_norm, in float32
    q = e4m3(clamp(y / y_scale, -448, 448))           to nearest, ties to even

``y_scale`` is one number for the tensor (static: chosen beforehand, or delayed: from earlier steps), or one per row:
``max |y[b, n, :]| / 448``. A product with q is to be multiplied by y_scale, which ``torch._scaled_mm`` takes.

Values beyond 448 * y_scale saturate, infinities included; e4m3 has none. NaN gives NaN; with one scale per row, a NaN
makes its whole row and the row's scale NaN. A row of zeros has scale 1.

Read next: reference.py (the maths), contract.py, and ../ada_layer_norm/triton_impl.py (the kernel, with FP8 set).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.ada_layer_norm.api import validate
from javis.kernels.ops.ada_layer_norm_fp8 import contract
from javis.kernels.ops.ada_layer_norm_fp8.reference import ada_layer_norm_fp8_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: contract.why_not_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.REFERENCE: _always,
}


def ada_layer_norm_fp8(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None = None,
    *,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return ``q`` and ``y_scale`` with ``LayerNorm(x) * (1 + scale) + shift ~ q * y_scale``. Forward only.

    Args:
        x: tokens in (time, space) order, [B, N, C] with N = T * S.
        shift, scale: modulation of timestep t, [B, C], any floating dtype.
        y_scale: scale of the output, positive float32 [] or [1]; None: one per row is computed.
        shift0, scale0: modulation of timestep 0, [B, C]; used only with ``frame_mask``.
        frame_mask: bool [B, T]; True: the frame takes (shift, scale), False: (shift0, scale0). None: all True.
        eps: added to the variance.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        q, float8_e4m3fn [B, N, C], and the scale: ``y_scale`` as given, or float32 [B, N].

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call, or a gradient is wanted; the message says why.
    """
    validate(x, shift, scale, shift0, scale0, frame_mask)
    validate_scale(y_scale)
    if frame_mask is None:
        shift0 = scale0 = None
    tensors = (x, shift, scale, y_scale, shift0, scale0, frame_mask)
    refuse_gradients("ada_layer_norm_fp8", tensors)
    chosen = select("ada_layer_norm_fp8", CHECKS, *tensors, backend=backend)
    if chosen is Backend.CUDA:
        return contract.ada_layer_norm_fp8_cuda(*tensors, eps)
    if chosen is Backend.TRITON:
        return contract.ada_layer_norm_fp8_triton(*tensors, eps)
    return ada_layer_norm_fp8_ref(
        x, shift, scale, y_scale, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps
    )


def validate_scale(y_scale: Tensor | None) -> None:
    """Raise ValueError unless ``y_scale`` is None or one float32 number."""
    if y_scale is not None and (y_scale.dtype != torch.float32 or tuple(y_scale.shape) not in ((), (1,))):
        raise ValueError(f"y_scale must be a float32 [] or [1], got {y_scale.dtype} {tuple(y_scale.shape)}")


def refuse_gradients(op: str, tensors: tuple[Any, ...]) -> None:
    """Raise UsageError where autograd would need a backward pass."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise UsageError(f"{op}: has no backward pass; call it under torch.no_grad(), or use the op without float8")
