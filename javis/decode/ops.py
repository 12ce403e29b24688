"""The operations that the decoders are made of: where each one is a kernel of ours, and where the library's.

`group_norm_silu` is handed in (`NormSilu`), as `ModelOps` does for the model. The upsampling is exact algebra, see
`upsample_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError

# (x, groups, weight, bias, eps) -> silu(GroupNorm(x) * weight + bias), in the layout of x.
NormSilu = Callable[[Tensor, int, Tensor, Tensor, float], Tensor]
Norms = Literal["auto", "kernel", "library"]


def library_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's own group norm, and SiLU in its result."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=True)


def kernel_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The op `javis.kernels.group_norm_silu`; ``auto`` among its backends."""
    from javis.kernels import group_norm_silu

    # A library's convolution may choose its layout; the Triton kernel takes this one only.
    x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return group_norm_silu(x, groups, weight, bias, eps=eps)


def norm_silu_for(norms: Norms, device: torch.device) -> NormSilu:
    """The function for a device. ``auto``: the kernel on a GPU with Triton; the library elsewhere, where the kernel
    would be the op's reference, which is written for clarity."""
    if norms == "library":
        return library_norm_silu
    if norms == "kernel":
        return kernel_norm_silu
    if norms != "auto":
        raise UsageError(f"norms must be auto, kernel or library, got {norms!r}")
    from javis.kernels.triton_support import HAS_TRITON

    return kernel_norm_silu if device.type == "cuda" and HAS_TRITON else library_norm_silu


def upsample_kernel(weight: Tensor) -> Tensor:
    """Kernel [in, out, 4, 4] with which one transposed convolution of stride 2 and padding 1 is a 2x nearest-neighbour
    upsampling followed by the 3x3 convolution ``weight`` [out, in, 3, 3] with padding 1.

    Nearest-neighbour upsampling is itself the transposed convolution with a 2x2 kernel of ones, so both together are
    the one with the full correlation of the two kernels. Each output pixel then takes 2x2 products for each pair of
    channels instead of 3x3, and the upsampled tensor never exists. Exact up to rounding, borders included: zeros around
    the picture are zeros around the upsampled picture. The sums are made in float64; the result has weight's dtype.
    """
    # The transposed convolution adds kernel[a] * x[i] to output 2 i + a - 1. There the convolution reads with weight[d]
    # pixel (2 i + a + d - 2) // 2, which is i for d = 2 - a and d = 3 - a: kernel[a] = weight[2 - a] + weight[3 - a].
    rows = F.pad(weight.double().flip(-2, -1), (0, 0, 1, 1))
    rows = rows[..., :-1, :] + rows[..., 1:, :]
    columns = F.pad(rows, (1, 1))
    return (columns[..., :-1] + columns[..., 1:]).to(weight.dtype).transpose(0, 1)


def fused_upsample(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C, H, W] -> [B, out, 2 H, 2 W] with a kernel of `upsample_kernel`."""
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def plain_upsample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in two steps, as the library does it."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def fused_upsample_rows(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """`fused_upsample` of rows 1 .. n of x [B, C, n + 2, W], with the rows before and after them as neighbours."""
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=(3, 1))


def plain_upsample_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`plain_upsample` of the same rows."""
    up = F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, 1:-1]
    return F.conv2d(up, weight, bias, padding=(0, 1))


def placed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weight as a decode wants it: in ``dtype``, and on a GPU channels-last, which saves the library a
    conversion at each call. On a CPU the library reorders it anyway, and a weight that fits is taken as it is."""
    if weight.device.type != "cuda":
        return weight.detach().to(dtype)
    last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    return weight.detach().to(dtype, memory_format=last)


def attention(x: Tensor, qkv: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], *, block: int | None = None) -> Tensor:
    """One-head self-attention over the places of x [B, C, H, W], projections included, without norm and residual.

    ``block``: queries of one call, to bound the memory of a backend that writes the scores; None: all at once.
    """
    batch, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    q, k, v = F.linear(tokens, *qkv).unsqueeze(1).chunk(3, dim=-1)  # [B, 1, places, C]
    del tokens
    if block is None or block >= height * width:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(block, dim=2)], dim=2)
    del q, k, v
    return F.linear(mixed.squeeze(1), *out).view(batch, height, width, channels).permute(0, 3, 1, 2)
