"""Triton kernels of the norm with modulation, with and without the gated residual before it.

One program works on some rows of one frame, so that the frame mask is one scalar and the modulation is read once per
program. The row sits in registers: mean and variance take two passes over it without reading memory again. The rows of
x (and h) are fetched one ahead of the arithmetic.

The backward kernel adds up dshift, dscale and dgate over its rows and writes one partial sum; a second kernel adds the
partial sums of a sample in a fixed order. No atomics: the same input gives the same bits.

The ops gated_residual_ada_layer_norm and the FP8 forms launch the same kernels. See docs/kernels/ada_layer_norm.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.ops.ada_layer_norm import aot_specs as specs
from javis.kernels.triton_support import AotSpec, interpreting

MAX_WIDTH = 16384  # one row in the registers of 16 warps

# The interpreter cuts float32 off where hardware rounds to nearest even, so there the kernel rounds by itself.
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, near.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _chosen(on_ptr, off_ptr, on_stride, off_stride, b, on, cols, inside, MASKED: tl.constexpr):
    """One row of modulation in float32: of timestep t where ``on``, else of timestep 0."""
    if MASKED:
        if on:
            row = tl.load(on_ptr + b * on_stride + cols, mask=inside, other=0.0)
        else:
            row = tl.load(off_ptr + b * off_stride + cols, mask=inside, other=0.0)
    else:
        row = tl.load(on_ptr + b * on_stride + cols, mask=inside, other=0.0)
    return row.to(tl.float32)


@triton.jit
def e4m3_bits(value, HARDWARE: tl.constexpr):
    """float32 in [-448, 448] or NaN to the byte of the nearest e4m3 value, ties to even."""
    if HARDWARE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Normal numbers: round at bit 20, then move the exponent's bias from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the values are multiples of 2^-9: adding 2^14 leaves that multiple, rounded, in the last bits.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    code = tl.where(size < 0x3C800000, small, normal)
    return (sign | tl.where(value == value, code, 0x7F)).to(tl.uint8)


@triton.jit
def forward_rows(
    x_ptr, h_ptr, gate_ptr, gate0_ptr, shift_ptr, shift0_ptr, scale_ptr, scale0_ptr, mask_ptr,
    r_ptr, y_ptr, mean_ptr, rstd_ptr, fp8_scale_ptr,
    x_b, x_n, h_b, h_n, gate_b, gate0_b, shift_b, shift0_b, scale_b, scale0_b,
    frames, places, chunks, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_H: tl.constexpr, HAS_GATE: tl.constexpr, MASKED: tl.constexpr,
    FP8: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """y = xhat * (1 + scale) + shift of the rows r = x (+ gate * h).

    FP8: "" writes y in its own dtype, with mean and rstd for the backward pass; "static" writes e4m3(y / fp8_scale[0]);
    "rows" writes e4m3(y / s) and s = max|y| / 448 of each row to fp8_scale.
    """
    pid = tl.program_id(0)
    frame = (pid // chunks).to(tl.int64)  # b * T + t; int64 from here on: offsets pass 2^31
    b = frame // frames
    place = (pid % chunks) * ROWS
    stop = tl.minimum(place + ROWS, places)
    n = (frame % frames) * places + place
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH

    on = True
    if MASKED:
        on = tl.load(mask_ptr + frame) != 0
    shift = _chosen(shift_ptr, shift0_ptr, shift_b, shift0_b, b, on, cols, inside, MASKED)
    gain = 1.0 + _chosen(scale_ptr, scale0_ptr, scale_b, scale0_b, b, on, cols, inside, MASKED)
    if HAS_GATE:
        gate = _chosen(gate_ptr, gate0_ptr, gate_b, gate0_b, b, on, cols, inside, MASKED)
    if FP8 == "static":
        inverse = 1.0 / tl.load(fp8_scale_ptr)

    x_row = x_ptr + b * x_b + n * x_n
    x_next = tl.load(x_row + cols, mask=inside, other=0.0)
    if HAS_H:
        h_row = h_ptr + b * h_b + n * h_n
        h_next = tl.load(h_row + cols, mask=inside, other=0.0)
    out_row = b * frames * places + n
    for i in range(0, ROWS):
        live = place + i < stop
        here = cols < tl.where(live, WIDTH, 0)
        x = x_next.to(tl.float32)
        more = cols < tl.where(place + i + 1 < stop, WIDTH, 0)
        x_row += x_n
        x_next = tl.load(x_row + cols, mask=more, other=0.0)
        if HAS_H:
            h = h_next.to(tl.float32)
            h_row += h_n
            h_next = tl.load(h_row + cols, mask=more, other=0.0)
            if HAS_GATE:
                h = gate * h
            r = rounded(x + h, r_ptr.dtype.element_ty)
            tl.store(r_ptr + out_row * WIDTH + cols, r, mask=here)
            x = r.to(tl.float32)  # the norm sees what later ops see

        mean = tl.sum(x, axis=0) / WIDTH
        d = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(d * d, axis=0) / WIDTH + eps)
        y = d * rstd * gain + shift
        if FP8 == "":
            tl.store(y_ptr + out_row * WIDTH + cols, rounded(y, y_ptr.dtype.element_ty), mask=here)
            tl.store(mean_ptr + out_row, mean, mask=live)
            tl.store(rstd_ptr + out_row, rstd, mask=live)
        else:
            if FP8 == "rows":
                # max() drops a NaN; here one spoils the scale, and with it the row, and so it shows.
                size = tl.max(tl.abs(y), axis=0)
                size = tl.where(tl.max((y != y).to(tl.int32), axis=0) == 1, float("nan"), size)
                tl.store(fp8_scale_ptr + out_row, tl.where(size == 0.0, 1.0, size / 448.0), mask=live)
                inverse = tl.where(size == 0.0, 1.0, 448.0 / size)
            q = tl.clamp(y * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(y_ptr + out_row * WIDTH + cols, e4m3_bits(q, HARDWARE), mask=here)
        out_row += 1


@triton.jit
def backward_rows(
    dr_ptr, dy_ptr, r_ptr, h_ptr, gate_ptr, gate0_ptr, scale_ptr, scale0_ptr, mask_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr, partial_ptr,
    dr_b, dr_n, dy_b, dy_n, r_b, r_n, h_b, h_n, gate_b, gate0_b, scale_b, scale0_b,
    frames, places, chunks, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_H: tl.constexpr, HAS_GATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dx and dh of some rows of one frame, and their part of dshift, dscale (and dgate): [programs, 2 or 3, WIDTH]."""
    pid = tl.program_id(0)
    frame = (pid // chunks).to(tl.int64)
    b = frame // frames
    place = (pid % chunks) * rows
    stop = tl.minimum(place + rows, places)
    n = (frame % frames) * places + place
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH

    on = True
    if MASKED:
        on = tl.load(mask_ptr + frame) != 0
    gain = 1.0 + _chosen(scale_ptr, scale0_ptr, scale_b, scale0_b, b, on, cols, inside, MASKED)
    if HAS_GATE:
        gate = _chosen(gate_ptr, gate0_ptr, gate_b, gate0_b, b, on, cols, inside, MASKED)
        dgate = tl.zeros([BLOCK], dtype=tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)

    out_row = b * frames * places + n
    for i in range(0, rows):
        live = place + i < stop
        here = cols < tl.where(live, WIDTH, 0)
        dy = tl.load(dy_ptr + b * dy_b + (n + i) * dy_n + cols, mask=here, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + b * r_b + (n + i) * r_n + cols, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + out_row + i, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + out_row + i, mask=live, other=0.0)
        xhat = tl.where(inside, (r - mean) * rstd, 0.0)
        g = dy * gain
        mean_g = tl.sum(g, axis=0) / WIDTH
        mean_gx = tl.sum(g * xhat, axis=0) / WIDTH
        dx = rstd * (g - mean_g - xhat * mean_gx)
        dshift += dy
        dscale += dy * xhat
        if HAS_H:
            dx += tl.load(dr_ptr + b * dr_b + (n + i) * dr_n + cols, mask=here, other=0.0).to(tl.float32)
            if HAS_GATE:
                h = tl.load(h_ptr + b * h_b + (n + i) * h_n + cols, mask=here, other=0.0).to(tl.float32)
                dgate += dx * h
                dh = rounded(gate * dx, dh_ptr.dtype.element_ty)
                tl.store(dh_ptr + (out_row + i) * WIDTH + cols, dh, mask=here)
        tl.store(dx_ptr + (out_row + i) * WIDTH + cols, rounded(dx, dx_ptr.dtype.element_ty), mask=here)

    SUMS: tl.constexpr = 3 if HAS_GATE else 2
    partial = partial_ptr + pid.to(tl.int64) * SUMS * WIDTH + cols
    tl.store(partial, dshift, mask=inside)
    tl.store(partial + WIDTH, dscale, mask=inside)
    if HAS_GATE:
        tl.store(partial + 2 * WIDTH, dgate, mask=inside)


@triton.jit
def sum_partials(
    partial_ptr, mask_ptr, out_ptr, batch, frames, chunks,
    WIDTH: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add partial [batch, frames * chunks, SUMS, WIDTH] over its second axis -> out [SUMS, batch, WIDTH].

    MASKED: out is [2 * SUMS, batch, WIDTH], first the sums over frames whose mask is True, then the others.
    """
    b = (tl.program_id(0) // SUMS).to(tl.int64)
    which = tl.program_id(0) % SUMS
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < WIDTH
    parts = frames * chunks
    base = partial_ptr + (b * parts * SUMS + which) * WIDTH
    on_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    off_sum = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        value = tl.load(
            base + part.to(tl.int64)[:, None] * (SUMS * WIDTH) + cols[None, :],
            mask=(part < parts)[:, None] & inside[None, :],
            other=0.0,
        )
        if MASKED:
            on = tl.load(mask_ptr + b * frames + part // chunks, mask=part < parts, other=0) != 0
            on_sum += tl.where(on[:, None], value, 0.0)
            off_sum += tl.where(on[:, None], 0.0, value)
        else:
            on_sum += value
    out = out_ptr + (which * batch + b) * WIDTH + cols
    dtype = out_ptr.dtype.element_ty
    tl.store(out, rounded(tl.sum(on_sum, axis=0), dtype), mask=inside)
    if MASKED:
        tl.store(out + SUMS * batch * WIDTH, rounded(tl.sum(off_sum, axis=0), dtype), mask=inside)


# Launches ---------------------------------------------------------------------------------------------------------


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last axis has a stride: rows and samples may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def row_options(width: int) -> dict[str, int]:
    """One row per program at a time: 16 values a thread at the model's width (2048 / 128), 4 warps."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def forward_rows_per_program(tokens: int) -> int:
    """Rows that share one reading of the modulation, as many as leave every SM of a large GPU about 16 programs."""
    return 8 if tokens >= 32768 else 4 if tokens >= 8192 else 1


def backward_rows_per_program(tokens: int, places: int) -> int:
    """Rows per partial sum: about 512 programs (4 on each SM of an H100), and never more than a frame has."""
    wanted = triton.next_power_of_2(max(triton.cdiv(tokens, 512), 1))
    return min(max(wanted, 4), 64, triton.next_power_of_2(places))


def _stride(tensor: Tensor | None, axis: int) -> int:
    return 0 if tensor is None else tensor.stride(axis)


def launch_forward(
    x: Tensor,
    h: Tensor | None,
    on: tuple[Tensor | None, Tensor, Tensor],
    off: tuple[Tensor | None, Tensor | None, Tensor | None],
    frame_mask: Tensor | None,
    eps: float,
    *,
    r: Tensor | None,
    y: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    fp8: str = "",
    fp8_scale: Tensor | None = None,
) -> None:
    """Fill r, y and the statistics. ``on`` and ``off`` are (gate, shift, scale) of timestep t and 0, rows dense."""
    batch, tokens, width = x.shape
    if x.numel() == 0:
        return
    x, h = dense_rows(x), None if h is None else dense_rows(h)
    frames = 1 if frame_mask is None else frame_mask.shape[1]
    places = tokens // frames
    rows = forward_rows_per_program(batch * tokens)
    chunks = triton.cdiv(places, rows)
    (gate, shift, scale), (gate0, shift0, scale0) = on, off
    forward_rows[(batch * frames * chunks,)](
        x, h, gate, gate0, shift, shift0, scale, scale0, frame_mask,
        r, y, mean, rstd, fp8_scale,
        x.stride(0), x.stride(1), _stride(h, 0), _stride(h, 1), _stride(gate, 0), _stride(gate0, 0),
        shift.stride(0), _stride(shift0, 0), scale.stride(0), _stride(scale0, 0),
        frames, places, chunks, eps,
        WIDTH=width, ROWS=rows, HAS_H=h is not None, HAS_GATE=gate is not None, MASKED=frame_mask is not None,
        FP8=fp8, HARDWARE=x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9),
        **row_options(width),
    )  # fmt: skip


def launch_backward(
    dr: Tensor | None,
    dy: Tensor,
    r: Tensor,
    h: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    gate0: Tensor | None,
    scale: Tensor,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    *,
    dx: Tensor,
    dh: Tensor | None,
    dmodulation: Tensor,
) -> None:
    """Fill dx, dh (with a gate) and dmodulation [k, B, C] or [2k, B, C]: k = 2 (dshift, dscale) or 3 (and dgate)."""
    batch, tokens, width = r.shape
    if r.numel() == 0:
        dmodulation.zero_()
        return
    dr, dy, r, h = (None if t is None else dense_rows(t) for t in (dr, dy, r, h))  # type: ignore[assignment]
    masked = frame_mask is not None
    frames = 1 if frame_mask is None else frame_mask.shape[1]
    places = tokens // frames
    rows = backward_rows_per_program(batch * tokens, places)
    chunks = triton.cdiv(places, rows)
    sums = 2 if gate is None else 3
    partial = r.new_empty((batch * frames * chunks, sums, width), dtype=torch.float32)
    backward_rows[(batch * frames * chunks,)](
        dr, dy, r, h, gate, gate0, scale, scale0, frame_mask, mean, rstd, dx, dh, partial,
        _stride(dr, 0), _stride(dr, 1), dy.stride(0), dy.stride(1), r.stride(0), r.stride(1), _stride(h, 0),
        _stride(h, 1), _stride(gate, 0), _stride(gate0, 0), scale.stride(0), _stride(scale0, 0),
        frames, places, chunks, rows,
        WIDTH=width, HAS_H=dr is not None, HAS_GATE=gate is not None, MASKED=masked, **row_options(width),
    )  # fmt: skip
    # 32 columns are one full sector of each partial row, and make enough programs for a sum this small.
    columns = 32
    sum_partials[(batch * sums, triton.cdiv(width, columns))](
        partial, frame_mask, dmodulation, batch, frames, chunks,
        WIDTH=width, SUMS=sums, ROWS=32, BLOCK=columns, MASKED=masked, num_warps=4,
    )  # fmt: skip


def ada_layer_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """javis::ada_layer_norm: y, mean, rstd."""
    y, mean = x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    on, off = (None, shift, scale), (None, shift0, scale0)
    launch_forward(x, None, on, off, frame_mask, eps, r=None, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def ada_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """javis::ada_layer_norm_backward: dx, dmodulation [2 or 4, B, C]."""
    dx = x.new_empty(x.shape)
    dmodulation = scale.new_empty((2 if frame_mask is None else 4, *scale.shape))
    launch_backward(
        None, dy, x, None, mean, rstd, None, None, scale, scale0, frame_mask, dx=dx, dh=None, dmodulation=dmodulation
    )
    return dx, dmodulation


def aot_specs() -> list[AotSpec]:
    """The configurations of the full-size model (C = 1152, bfloat16), without and with a frame mask."""
    return [
        *specs.forward(forward_rows, "forward", row_options(specs.WIDTH)),
        *specs.backward(backward_rows, sum_partials, "backward", row_options(specs.WIDTH)),
    ]
