"""ada_layer_norm: normalise each token without learned weights, then scale and shift it by the timestep's modulation.

    xhat[b, n, :] = (x[b, n, :] - mean) / sqrt(var + eps)          mean and (biased) variance over C
    y[b, n, :]    = xhat[b, n, :] * (1 + scale[b, :]) + shift[b, :]

With a frame mask, tokens of the frames that are given (not generated) take the modulation of timestep 0 instead.
This is the adaLN of DiT (arXiv 2212.09748, section 3.2) with the per-frame choice of Open-Sora and JavisDiT.

Read next: reference.py (the maths), contract.py (what torch.compile sees), triton_impl.py (the kernel),
csrc/cpu/ada_layer_norm_rows.cpp (the loops of the native op), csrc/cuda/norm_forward.cuh (the CUDA kernel).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.ada_layer_norm import contract
from javis.kernels.ops.ada_layer_norm.reference import ada_layer_norm_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: contract.why_not_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.CPU: contract.why_not_cpu,
    Backend.REFERENCE: _always,
}


def ada_layer_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Return ``LayerNorm(x) * (1 + scale) + shift``, computed in float32 (float64 for float64) and rounded once.

    Args:
        x: tokens in (time, space) order, [B, N, C] with N = T * S.
        shift, scale: modulation of timestep t, [B, C], any floating dtype.
        shift0, scale0: modulation of timestep 0, [B, C]; used only with ``frame_mask``.
        frame_mask: bool [B, T]; True: the frame takes (shift, scale), False: (shift0, scale0). None: all True.
        eps: added to the variance.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        [B, N, C] in the dtype of ``x``, differentiable in all tensors but the mask.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    validate(x, shift, scale, shift0, scale0, frame_mask)
    if frame_mask is None:
        shift0 = scale0 = None
    chosen = select("ada_layer_norm", CHECKS, x, shift, scale, shift0, scale0, frame_mask, backend=backend)
    if chosen is Backend.CUDA:
        return contract.ada_layer_norm_cuda(x, shift, scale, shift0, scale0, frame_mask, eps)
    if chosen is Backend.TRITON:
        return contract.ada_layer_norm_triton(x, shift, scale, shift0, scale0, frame_mask, eps)
    if chosen is Backend.CPU:
        return contract.ada_layer_norm_native(x, shift, scale, shift0, scale0, frame_mask, eps)
    return ada_layer_norm_ref(x, shift, scale, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps)


def validate(
    x: Tensor, shift: Tensor, scale: Tensor, shift0: Tensor | None, scale0: Tensor | None, frame_mask: Tensor | None
) -> None:
    """Raise ValueError unless the arguments fit together."""
    if x.ndim != 3 or not x.dtype.is_floating_point or x.shape[2] == 0:
        raise ValueError(f"x must be a floating-point [B, N, C] with C > 0, got {x.dtype} {tuple(x.shape)}")
    batch, tokens, width = x.shape
    modulation = {"shift": shift, "scale": scale}
    if frame_mask is not None:
        if shift0 is None or scale0 is None:
            raise ValueError("frame_mask needs shift0 and scale0, the modulation of the frames where it is False")
        modulation.update(shift0=shift0, scale0=scale0)
        if frame_mask.dtype.is_floating_point or frame_mask.dtype.itemsize != 1 or frame_mask.ndim != 2:
            raise ValueError(f"frame_mask must be a bool [B, T], got {frame_mask.dtype} {tuple(frame_mask.shape)}")
        frames = frame_mask.shape[1]
        if frame_mask.shape[0] != batch or frames == 0 or tokens % frames:
            raise ValueError(
                f"frame_mask {tuple(frame_mask.shape)} does not fit x {tuple(x.shape)}: expected [{batch}, T] with T "
                f"dividing {tokens}"
            )
    for name, tensor in modulation.items():
        if tuple(tensor.shape) != (batch, width) or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point [{batch}, {width}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
