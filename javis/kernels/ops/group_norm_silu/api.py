"""group_norm_silu: GroupNorm and SiLU of the codecs' decoders, on channels-last tensors.

    xhat = (x - mean) / sqrt(var + eps)                 mean and (biased) variance over a group of channels, all places
    z = xhat * weight + bias,    y = z * sigmoid(z)

Two passes over memory: one that adds up, one that writes y. See docs/kernels/group_norm_silu.md.

Read next: reference.py (the maths), contract.py (what torch.compile sees), triton_impl.py (the kernels).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.group_norm_silu import contract
from javis.kernels.ops.group_norm_silu.reference import group_norm_silu_ref


def _always(*_: object) -> str | None:
    return None


CHECKS: dict[Backend, Check] = {
    Backend.TRITON: contract.why_not_triton,
    Backend.REFERENCE: _always,
}


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Return ``silu(GroupNorm(x) * weight + bias)``, computed in float32 (float64 for float64) and rounded once.

    Args:
        x: [B, C, H, W] or [B, C, T, H, W] (or any number of places). The Triton kernel takes channels-last tensors
            (``x.to(memory_format=torch.channels_last)`` or ``channels_last_3d``) and refuses others.
        num_groups: groups of channels, a divisor of C.
        weight, bias: [C], any floating dtype.
        eps: added to the variance.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        y, in shape, dtype and layout (channels-last or contiguous) like ``x``; differentiable in x, weight and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    if x.ndim < 3 or not x.dtype.is_floating_point or x.shape[1] == 0:
        raise ValueError(f"x must be a floating-point [B, C, places...] with C > 0, got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must be a divisor of the {channels} channels, got {num_groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (channels,) or not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating-point [{channels}], got {tensor.dtype} {tuple(tensor.shape)}")
    if select("group_norm_silu", CHECKS, x, num_groups, weight, bias, backend=backend) is Backend.TRITON:
        return contract.group_norm_silu_triton(x, num_groups, weight, bias, eps)
    return group_norm_silu_ref(x, num_groups, weight, bias, eps=eps)
