"""qk_norm_rope: make packed projections ready for an attention of a library: norm and rotate q and k, hand v on.

    n[d] = x[d] / sqrt(mean(x^2) + eps) * weight[d]                    per head, mean over its D values
    y[2i], y[2i+1] = n[2i] cos - n[2i+1] sin, n[2i+1] cos + n[2i] sin  angle (place along the axis) * frequency i

RMS norm of queries and keys: arXiv 2302.05442, section 2; rotary embedding: arXiv 2104.09864, with interleaved pairs.

Read next: reference.py (the maths), triton_impl.py and csrc/cpu/qk_norm_rope_rows.cpp (the kernels),
../factorized_attention/library.py (who calls it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.backend import Backend, Check, select, why_not_auto
from javis.kernels.ops.qk_norm_rope import contract
from javis.kernels.ops.qk_norm_rope.reference import qk_norm_rope_ref


def _no_cuda(*_: object) -> str | None:
    return "no CUDA kernel in this version"


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.CUDA: _no_cuda,
    Backend.TRITON: contract.why_not_triton,
    Backend.CPU: contract.why_not_cpu,
    Backend.REFERENCE: _always,
}


def qk_norm_rope(
    qkv: Tensor,
    axis: str,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v with q and k normalised and rotated in float32 (float64 for float64), rounded once.

    Args:
        qkv: packed projections, [B, T, S, 3, H, D].
        axis: "temporal": sequences over T, one for each place; "spatial": over S, one for each frame.
        q_weight, k_weight: RMS norm weights, [D]; both None: no norm.
        rope: (cos, sin), each [length of the axis, D/2]; None: no rotation. Constants: no gradient flows to them.
        eps: added to the mean square.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        q, k, v in the dtype of ``qkv``: [B*S, T, H, D] for "temporal", [B*T, S, H, D] for "spatial", the layout of
        flash-attn; ``transpose(1, 2)`` is the one of ``F.scaled_dot_product_attention``, which takes the view as it is.
        v is a view of ``qkv`` where its strides allow.

    Raises:
        ValueError: an unknown axis, shapes or dtypes that do not fit together, one weight without the other.
        UsageError: the named backend cannot run this call; the message says why.
    """
    validate(qkv, axis, q_weight, k_weight, rope)
    chosen = select("qk_norm_rope", CHECKS, qkv, axis, q_weight, k_weight, rope, backend=backend)
    return _run(chosen, qkv, axis, q_weight, k_weight, rope, eps)


def prepare(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest that can run, whatever backend is the default: that one speaks of the op which calls this."""
    args = (qkv, axis, q_weight, k_weight, rope)
    chosen = next(backend for backend in CHECKS if why_not_auto(CHECKS, backend, *args) is None)
    return _run(chosen, *args, eps)


def _run(
    backend: Backend,
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if rope is not None:
        rope = (rope[0].detach(), rope[1].detach())
    if backend in (Backend.TRITON, Backend.CPU):
        native = backend is Backend.CPU
        return contract.qk_norm_rope_fused(qkv, axis, q_weight, k_weight, rope, eps, native=native)
    return qk_norm_rope_ref(qkv, axis, q_weight=q_weight, k_weight=k_weight, rope=rope, eps=eps)


def validate(
    qkv: Tensor,
    axis: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
) -> None:
    """Raise ValueError unless these arguments fit together; shared with factorized_attention."""
    if axis not in ("temporal", "spatial"):
        raise ValueError(f'axis must be "temporal" or "spatial", got {axis!r}')
    if qkv.ndim != 6 or qkv.shape[3] != 3 or not qkv.dtype.is_floating_point or 0 in qkv.shape[4:]:
        raise ValueError(f"qkv must be a floating-point [B, T, S, 3, H, D], got {qkv.dtype} {tuple(qkv.shape)}")
    size, length = qkv.shape[5], qkv.shape[1 if axis == "temporal" else 2]
    if (q_weight is None) is not (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(f"{missing} is missing: give both weights (norm) or none (no norm)")
    tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    tensors = {"q_weight": (q_weight, (size,)), "k_weight": (k_weight, (size,))}
    if rope is not None:
        if not isinstance(rope, (tuple, list)) or len(rope) != 2 or size % 2:
            raise ValueError(
                f"rope must be (cos, sin) for heads of an even size, got {type(rope).__name__}, D = {size}"
            )
        tensors |= {"rope[0] (cos)": (rope[0], (length, size // 2)), "rope[1] (sin)": (rope[1], (length, size // 2))}
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point {list(shape)}, got {getattr(tensor, 'dtype', type(tensor).__name__)} "
                f"{tuple(getattr(tensor, 'shape', ()))}"
            )
        if tensor.device != qkv.device:
            raise ValueError(f"{name} must be on {qkv.device} like qkv, got {tensor.device}")
