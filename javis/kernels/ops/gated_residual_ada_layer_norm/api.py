"""gated_residual_ada_layer_norm: add a block's output to the stream, and normalise the sum for the next block.

    r[b, n, :] = x[b, n, :] + gate[b, :] * h[b, n, :]
    y[b, n, :] = LayerNorm(r[b, n, :]) * (1 + scale[b, :]) + shift[b, :]

One pass over memory makes both: separately, the norm would read r again, which is a third of the bytes (two reads and
two writes instead of three and two). With a frame mask, given frames take the modulation of timestep 0.

Read next: reference.py (the maths), contract.py (what torch.compile sees), triton_impl.py and
csrc/cpu/gated_residual_ada_layer_norm_rows.cpp (the kernels).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.gated_residual_ada_layer_norm import contract
from javis.kernels.ops.gated_residual_ada_layer_norm.reference import gated_residual_ada_layer_norm_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: contract.why_not_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.CPU: contract.why_not_cpu,
    Backend.REFERENCE: _always,
}


def gated_residual_ada_layer_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    gate0: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return ``r = x + gate * h`` and ``y = LayerNorm(r) * (1 + scale) + shift``.

    Computed in float32 (float64 for float64). ``r`` is rounded to the dtype of ``x`` before it is normalised, so that
    ``y`` belongs to the ``r`` that later ops see.

    Args:
        x: residual stream in (time, space) order, [B, N, C] with N = T * S.
        h: output of the block, [B, N, C], any floating dtype.
        gate: [B, C], any floating dtype; None: 1, then ``gate0`` is ignored.
        shift, scale: modulation of timestep t, [B, C], any floating dtype.
        gate0, shift0, scale0: modulation of timestep 0, [B, C]; used only with ``frame_mask``.
        frame_mask: bool [B, T]; True: the frame takes (gate, shift, scale), False: those of timestep 0. None: all True.
        eps: added to the variance.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        r and y, each [B, N, C] in the dtype of ``x``, differentiable in all tensors but the mask.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    validate(x, h, gate, shift, scale, gate0, shift0, scale0, frame_mask)
    if frame_mask is None:
        gate0 = shift0 = scale0 = None
    if gate is None:
        gate0 = None
    tensors = (x, h, gate, shift, scale, gate0, shift0, scale0, frame_mask)
    chosen = select("gated_residual_ada_layer_norm", CHECKS, *tensors, backend=backend)
    if chosen is Backend.CUDA:
        return contract.gated_residual_ada_layer_norm_cuda(*tensors, eps)
    if chosen is Backend.TRITON:
        return contract.gated_residual_ada_layer_norm_triton(*tensors, eps)
    if chosen is Backend.CPU:
        return contract.gated_residual_ada_layer_norm_native(*tensors, eps)
    return gated_residual_ada_layer_norm_ref(
        x, h, gate, shift, scale, gate0=gate0, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps
    )


def validate(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments fit together."""
    if x.ndim != 3 or not x.dtype.is_floating_point or x.shape[2] == 0:
        raise ValueError(f"x must be a floating-point [B, N, C] with C > 0, got {x.dtype} {tuple(x.shape)}")
    if h.shape != x.shape or not h.dtype.is_floating_point:
        raise ValueError(f"h must be a floating-point {list(x.shape)} like x, got {h.dtype} {tuple(h.shape)}")
    batch, tokens, width = x.shape
    modulation: dict[str, Tensor | None] = {"shift": shift, "scale": scale}
    if gate is not None:
        modulation["gate"] = gate
    if frame_mask is not None:
        if shift0 is None or scale0 is None or (gate is not None and gate0 is None):
            needs = "shift0 and scale0" if gate is None else "gate0, shift0 and scale0"
            raise ValueError(f"frame_mask needs {needs}, the modulation of the frames where it is False")
        modulation |= {"shift0": shift0, "scale0": scale0} | ({} if gate is None else {"gate0": gate0})
        if frame_mask.dtype.is_floating_point or frame_mask.dtype.itemsize != 1 or frame_mask.ndim != 2:
            raise ValueError(f"frame_mask must be a bool [B, T], got {frame_mask.dtype} {tuple(frame_mask.shape)}")
        frames = frame_mask.shape[1]
        if frame_mask.shape[0] != batch or frames == 0 or tokens % frames:
            raise ValueError(
                f"frame_mask {tuple(frame_mask.shape)} does not fit x {tuple(x.shape)}: expected [{batch}, T] with T "
                f"dividing {tokens}"
            )
    for name, tensor in modulation.items():
        assert tensor is not None
        if tuple(tensor.shape) != (batch, width) or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point [{batch}, {width}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
