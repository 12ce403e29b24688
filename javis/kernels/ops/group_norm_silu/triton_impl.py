"""Triton kernels of group_norm_silu on x [B, places, C].

Each direction takes two passes. The first adds up over places, channel by channel, in fixed chunks; the small sums
[B, chunks, C] are then joined to groups in PyTorch, in a fixed order: no atomics. The second writes the result.

The variance must not cancel where the mean is large: the sums are of x - x0, where x0 is the channel's first value, and
channels are joined by their means and their squared deviations from them (Chan et al.).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.triton_impl import rounded
from javis.kernels.triton_support import AotSpec

# 64 channels are one 128-byte line of bfloat16; 32 places of them are 16 values a thread of 4 warps.
CHANNELS, PLACES = 64, 32


@triton.jit
def _tile(chunks, width, PLACES: tl.constexpr, CHANNELS: tl.constexpr):
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return b, pid % chunks, cols, cols < width


@triton.jit
def _values(b, tile, places, width, cols, inside, PLACES: tl.constexpr):
    """Which values of a tile of places exist, and their offsets."""
    place = tile.to(tl.int64) * PLACES + tl.arange(0, PLACES)
    return (place < places)[:, None] & inside[None, :], (b * places + place)[:, None] * width + cols[None, :]


@triton.jit
def _row(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0)[None, :]


@triton.jit
def _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, cols, inside):
    mean, rstd = _row(mean_ptr, group, inside), _row(rstd_ptr, group, inside)
    return mean, rstd, _row(weight_ptr, cols, inside), _row(bias_ptr, cols, inside)


@triton.jit
def _store_sums(to, first, second, width, inside):
    tl.store(to, tl.sum(first, axis=0), mask=inside)
    tl.store(to + width, tl.sum(second, axis=0), mask=inside)


@triton.jit
def forward_sums(
    x_ptr, sums_ptr, places, width, chunks, steps, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums [B, chunks, 2, width]: of x - x0 and of its square, over ``steps`` tiles of places."""
    b, chunk, cols, inside = _tile(chunks, width, PLACES, CHANNELS)
    x0 = tl.load(x_ptr + b * places * width + cols, mask=inside, other=0.0).to(tl.float32)
    first = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    second = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    for i in range(0, steps):
        here, at = _values(b, chunk * steps + i, places, width, cols, inside, PLACES)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        d = tl.where(here, x - x0[None, :], 0.0)
        first += d
        second += d * d
    _store_sums(sums_ptr + (b * chunks + chunk) * 2 * width + cols, first, second, width, inside)


@triton.jit
def forward_apply(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, places, width, groups, chunks, steps,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, chunk, cols, inside = _tile(chunks, width, PLACES, CHANNELS)
    group = b * groups + cols // (width // groups)
    mean, rstd, weight, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, cols, inside)
    for i in range(0, steps):
        here, at = _values(b, chunk * steps + i, places, width, cols, inside, PLACES)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        z = (x - mean) * rstd * weight + bias
        y = z / (1.0 + tl.exp(-z))
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _dz(dy, x, mean, rstd, weight, bias):
    xhat = (x - mean) * rstd
    z = xhat * weight + bias
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return xhat, dy * sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def backward_sums(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, sums_ptr, places, width, groups, chunks, steps,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums [B, chunks, 2, width]: of dz and of dz * xhat."""
    b, chunk, cols, inside = _tile(chunks, width, PLACES, CHANNELS)
    group = b * groups + cols // (width // groups)
    mean, rstd, weight, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, cols, inside)
    first = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    second = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    for i in range(0, steps):
        here, at = _values(b, chunk * steps + i, places, width, cols, inside, PLACES)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        xhat, dz = _dz(dy, x, mean, rstd, weight, bias)
        dz = tl.where(here, dz, 0.0)
        first += dz
        second += tl.where(here, dz * xhat, 0.0)
    _store_sums(sums_ptr + (b * chunks + chunk) * 2 * width + cols, first, second, width, inside)


@triton.jit
def backward_apply(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, mean_g_ptr, mean_gx_ptr, dx_ptr,
    places, width, groups, chunks, steps, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dz * weight, means over the group."""
    b, chunk, cols, inside = _tile(chunks, width, PLACES, CHANNELS)
    group = b * groups + cols // (width // groups)
    mean, rstd, weight, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, cols, inside)
    mean_g, mean_gx = _row(mean_g_ptr, group, inside), _row(mean_gx_ptr, group, inside)
    for i in range(0, steps):
        here, at = _values(b, chunk * steps + i, places, width, cols, inside, PLACES)
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        xhat, dz = _dz(dy, x, mean, rstd, weight, bias)
        dx = rstd * (dz * weight - mean_g - xhat * mean_gx)
        tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=here)


# Launches ---------------------------------------------------------------------------------------------------------


def _grid(x: Tensor) -> tuple[tuple[int, int], int, int]:
    """Grid, chunks of a sample, tiles in a chunk: about 1024 programs, eight for each SM of a large GPU."""
    batch, places, width = x.shape
    tiles, columns = triton.cdiv(places, PLACES), triton.cdiv(width, CHANNELS)
    steps = max(1, batch * tiles * columns // 1024)
    chunks = triton.cdiv(tiles, steps)
    return (batch * chunks, columns), chunks, steps


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """javis::group_norm_silu: y, mean, rstd."""
    batch, places, width = x.shape
    y, mean = x.new_empty(x.shape), x.new_zeros((batch, num_groups), dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, torch.zeros_like(mean)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    grid, chunks, steps = _grid(x)
    sums = x.new_empty((batch, chunks, 2, width), dtype=torch.float32)
    tile = {"PLACES": PLACES, "CHANNELS": CHANNELS, "num_warps": 4}
    forward_sums[grid](x, sums, places, width, chunks, steps, **tile)
    first, second = (sums.sum(1) / places).unbind(1)  # [B, C]: means of x - x0 and of its square
    channel_mean = (x[:, 0].float() + first).unflatten(1, (num_groups, -1))
    channel_var = (second - first.square()).clamp(min=0).unflatten(1, (num_groups, -1))
    mean = channel_mean.mean(-1)
    var = channel_var.mean(-1) + (channel_mean - mean[..., None]).square().mean(-1)
    rstd = torch.rsqrt(var + eps)
    forward_apply[grid](x, mean, rstd, weight, bias, y, places, width, num_groups, chunks, steps, **tile)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """javis::group_norm_silu_backward: dx, dweight, dbias."""
    batch, places, width = x.shape
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    dy, x, weight, bias = dy.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous()
    grid, chunks, steps = _grid(x)
    sums = x.new_empty((batch, chunks, 2, width), dtype=torch.float32)
    tile = {"PLACES": PLACES, "CHANNELS": CHANNELS, "num_warps": 4}
    shape = (places, width, num_groups, chunks, steps)
    backward_sums[grid](dy, x, mean, rstd, weight, bias, sums, *shape, **tile)
    of_dz, of_dzx = sums.sum(1).unbind(1)  # [B, C]
    mean_g, mean_gx = (
        ((value * weight).unflatten(1, (num_groups, -1)).mean(-1) / places).contiguous() for value in (of_dz, of_dzx)
    )
    backward_apply[grid](dy, x, mean, rstd, weight, bias, mean_g, mean_gx, dx, *shape, **tile)
    return dx, of_dzx.sum(0), of_dz.sum(0)


def aot_specs() -> list[AotSpec]:
    """Channels of the video decoder (128 to 512), whose number is a runtime argument, in bfloat16."""
    small = {name: "*fp32" for name in ("mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "mean_g_ptr", "mean_gx_ptr")}
    kinds = small | {"x_ptr": "*bf16", "y_ptr": "*bf16", "dy_ptr": "*bf16", "dx_ptr": "*bf16", "sums_ptr": "*fp32"}
    kinds |= dict.fromkeys(("places", "width", "groups", "chunks", "steps"), "i32")
    kinds |= dict.fromkeys(("PLACES", "CHANNELS"), "constexpr")
    specs = []
    for name, kernel in (
        ("forward sums", forward_sums),
        ("forward apply", forward_apply),
        ("backward sums", backward_sums),
        ("backward apply", backward_apply),
    ):
        names = kernel.arg_names
        specs.append(
            AotSpec(
                name=f"{name} bf16",
                kernel=kernel,
                signature={argument: kinds[argument] for argument in names},
                constants={"PLACES": PLACES, "CHANNELS": CHANNELS},
                num_warps=4,
                aligned=(*(argument for argument in names if argument.endswith("_ptr")), "width"),
            )
        )
    return specs
