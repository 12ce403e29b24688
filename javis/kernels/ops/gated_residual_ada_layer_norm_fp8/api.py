"""gated_residual_ada_layer_norm_fp8: the residual update and the next norm, whose output is float8.

    r = x + gate * h
    y = LayerNorm(r) * (1 + scale) + shift            as gated_residual_ada_layer_norm
    q = e4m3(clamp(y / y_scale, -448, 448))           to nearest, ties to even

Saturation, NaN and the two kinds of ``y_scale`` are those of ada_layer_norm_fp8 (its api.py). The residual stream r
keeps its dtype.

Read next: reference.py (the maths), contract.py, and ../ada_layer_norm/triton_impl.py (the kernel, with FP8 set).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.ada_layer_norm_fp8.api import refuse_gradients, validate_scale
from javis.kernels.ops.gated_residual_ada_layer_norm.api import validate
from javis.kernels.ops.gated_residual_ada_layer_norm_fp8 import contract
from javis.kernels.ops.gated_residual_ada_layer_norm_fp8.reference import gated_residual_ada_layer_norm_fp8_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: contract.why_not_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.REFERENCE: _always,
}


def gated_residual_ada_layer_norm_fp8(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    y_scale: Tensor | None = None,
    *,
    gate0: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``r = x + gate * h``, and ``q`` and ``y_scale`` with ``q * y_scale ~ LayerNorm(r) * (1 + scale) + shift``.

    Forward only. ``r`` is rounded to the dtype of ``x`` before it is normalised.

    Args:
        x: residual stream in (time, space) order, [B, N, C] with N = T * S.
        h: output of the block, [B, N, C], any floating dtype.
        gate: [B, C], any floating dtype; None: 1, then ``gate0`` is ignored.
        shift, scale: modulation of timestep t, [B, C], any floating dtype.
        y_scale: scale of the output, positive float32 [] or [1]; None: one per row is computed.
        gate0, shift0, scale0: modulation of timestep 0, [B, C]; used only with ``frame_mask``.
        frame_mask: bool [B, T]; True: the frame takes (gate, shift, scale), False: those of timestep 0. None: all True.
        eps: added to the variance.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        r, [B, N, C] in the dtype of ``x``; q, float8_e4m3fn [B, N, C]; the scale: as given, or float32 [B, N].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        UsageError: the named backend cannot run this call, or a gradient is wanted; the message says why.
    """
    validate(x, h, gate, shift, scale, gate0, shift0, scale0, frame_mask)
    validate_scale(y_scale)
    if frame_mask is None:
        gate0 = shift0 = scale0 = None
    if gate is None:
        gate0 = None
    tensors = (x, h, gate, shift, scale, y_scale, gate0, shift0, scale0, frame_mask)
    refuse_gradients("gated_residual_ada_layer_norm_fp8", tensors)
    chosen = select("gated_residual_ada_layer_norm_fp8", CHECKS, *tensors, backend=backend)
    if chosen is Backend.CUDA:
        return contract.gated_residual_ada_layer_norm_fp8_cuda(*tensors, eps)
    if chosen is Backend.TRITON:
        return contract.gated_residual_ada_layer_norm_fp8_triton(*tensors, eps)
    return gated_residual_ada_layer_norm_fp8_ref(
        x, h, gate, shift, scale, y_scale, gate0=gate0, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps
    )
