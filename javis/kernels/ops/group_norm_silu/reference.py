"""The maths of group_norm_silu in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu_ref(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Arguments and result as in api.py; computes in float32, or float64 for float64 inputs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(wide).reshape(x.shape[0], num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    xhat = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).view(x.shape)
    channel = (1, -1, *[1] * (x.ndim - 2))
    y = F.silu(xhat * weight.to(wide).view(channel) + bias.to(wide).view(channel)).to(x.dtype)
    if channels_last(x):  # the layout of the input
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether the channels of each place lie side by side, and all places one after the other."""
    return x.movedim(1, -1).is_contiguous()
