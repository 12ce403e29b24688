"""factorized_attention in Triton: short sequences (the temporal axis) whole in one tile; launches of both kinds.

One program of the short kernel owns one head of one sequence: it reads q, k and v in place from the packed projections
(three strided reads, nothing rearranged), normalises and rotates them in registers, and writes its columns of the
output. Neighbouring programs own neighbouring heads, so what one leaves of a 32-byte sector the next finds in the L2.
Longer sequences take flash/triton_impl.py. Heads are split into two tiles, see ../qk_norm_rope/triton_impl.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.triton_impl import rounded
from javis.kernels.ops.factorized_attention.flash import triton_impl as flash
from javis.kernels.ops.qk_norm_rope.triton_impl import (
    alignment,
    load_heads,
    mma,
    mma_heads,
    norm_rope,
    norm_rope_backward,
    store_heads,
    store_weight,
    tile_widths,
)
from javis.kernels.triton_support import AotSpec

MAX_SHORT = 128  # places of a sequence that fit one tile
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _probabilities(q_head, q_tail, k_head, k_tail, length, scale, ROWS: tl.constexpr, TAIL: tl.constexpr):
    """exp(score - row maximum) and its row sums, keys beyond the length left out."""
    scores = mma_heads(q_head, k_head, q_tail, k_tail, TAIL) * (scale * LOG2E)
    scores = tl.where((tl.arange(0, ROWS) < length)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _sequence(n, inner, stride_1, stride_2, stride_l, head, stride_h, rows, ALIGN: tl.constexpr):
    """Offsets of the rows of one head of sequence n = (n1, n2); products in int64."""
    start = (n // inner).to(tl.int64) * stride_1 + (n % inner).to(tl.int64) * stride_2 + head.to(tl.int64) * stride_h
    return tl.multiple_of(start + rows.to(tl.int64) * stride_l, ALIGN)


@triton.jit
def _forward_kernel(
    q, k, v, out, weights, cos, sin, heads, length, inner, stride_1, stride_2, stride_l, stride_h,
    out_stride_1, out_stride_2, out_stride_l, out_stride_h, scale, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    rows = tl.arange(0, ROWS)
    ok = rows < length
    at = _sequence(n, inner, stride_1, stride_2, stride_l, h, stride_h, rows, ALIGN)
    q_head, q_tail = load_heads(q, at, ok, HEAD, TAIL, SIZE)
    k_head, k_tail = load_heads(k, at, ok, HEAD, TAIL, SIZE)
    v_head, v_tail = load_heads(v, at, ok, HEAD, TAIL, SIZE)
    k_weight = weights
    if NORM:
        k_weight += SIZE
    dtype = v_head.dtype
    q_head, q_tail = norm_rope(q_head, q_tail, weights, cos, sin, rows, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE)
    k_head, k_tail = norm_rope(k_head, k_tail, k_weight, cos, sin, rows, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE)
    q_head, q_tail = rounded(q_head, dtype), rounded(q_tail, dtype)
    k_head, k_tail = rounded(k_head, dtype), rounded(k_tail, dtype)
    p, total = _probabilities(q_head, q_tail, k_head, k_tail, length, scale, ROWS, TAIL)
    # Divided at the end: p as it is lies in [0, 1] with its maximum exact in any dtype.
    p = rounded(p, dtype)
    o_head = mma(p, v_head) / total[:, None]
    o_tail = o_head
    if TAIL > 0:
        o_tail = mma(p, v_tail) / total[:, None]
    to = _sequence(n, inner, out_stride_1, out_stride_2, out_stride_l, h, out_stride_h, rows, ALIGN)
    store_heads(out, to, ok, o_head, o_tail, HEAD, TAIL, SIZE)


@triton.jit
def _backward_kernel(
    dout, q, k, v, dq, dk, dv, partial, weights, cos, sin, heads, length, inner,
    stride_1, stride_2, stride_l, stride_h, d_stride_1, d_stride_2, d_stride_l, d_stride_h,
    o_stride_1, o_stride_2, o_stride_l, o_stride_h, scale, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Recomputes the probabilities from q and k; nothing but the projections was kept by the forward pass."""
    pid = tl.program_id(0)
    n, h = pid // heads, pid % heads
    rows = tl.arange(0, ROWS)
    ok = rows < length
    at = _sequence(n, inner, stride_1, stride_2, stride_l, h, stride_h, rows, ALIGN)
    to = _sequence(n, inner, d_stride_1, d_stride_2, d_stride_l, h, d_stride_h, rows, ALIGN)
    o_at = _sequence(n, inner, o_stride_1, o_stride_2, o_stride_l, h, o_stride_h, rows, ALIGN)
    k_weight = weights
    if NORM:
        k_weight += SIZE
    dtype = q.dtype.element_ty
    q_head, q_tail = load_heads(q, at, ok, HEAD, TAIL, SIZE)
    k_head, k_tail = load_heads(k, at, ok, HEAD, TAIL, SIZE)
    q_head, q_tail = norm_rope(q_head, q_tail, weights, cos, sin, rows, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE)
    k_head, k_tail = norm_rope(k_head, k_tail, k_weight, cos, sin, rows, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE)
    q_head, q_tail = rounded(q_head, dtype), rounded(q_tail, dtype)
    k_head, k_tail = rounded(k_head, dtype), rounded(k_tail, dtype)
    p, total = _probabilities(q_head, q_tail, k_head, k_tail, length, scale, ROWS, TAIL)
    p /= total[:, None]

    g_head, g_tail = load_heads(dout, o_at, ok, HEAD, TAIL, SIZE)
    v_head, v_tail = load_heads(v, at, ok, HEAD, TAIL, SIZE)
    dp = mma_heads(g_head, v_head, g_tail, v_tail, TAIL)
    p_t = tl.trans(rounded(p, dtype))
    d_head = mma(p_t, g_head)
    d_tail = d_head
    if TAIL > 0:
        d_tail = mma(p_t, g_tail)
    store_heads(dv, to, ok, d_head, d_tail, HEAD, TAIL, SIZE)

    ds = rounded(p * (dp - tl.sum(p * dp, 1)[:, None]) * scale, dtype)
    for which in tl.static_range(2):
        # q, k as the forward pass read them are read once more (from the L1): held, they would cost registers.
        if which == 0:
            d_head = mma(ds, k_head)
            d_tail = d_head
            if TAIL > 0:
                d_tail = mma(ds, k_tail)
            x_head, x_tail = load_heads(q, at, ok, HEAD, TAIL, SIZE)
            weight, dx = weights, dq
        else:
            ds_t = tl.trans(ds)
            d_head = mma(ds_t, q_head)
            d_tail = d_head
            if TAIL > 0:
                d_tail = mma(ds_t, q_tail)
            x_head, x_tail = load_heads(k, at, ok, HEAD, TAIL, SIZE)
            weight, dx = k_weight, dk
        d_head, d_tail, w_head, w_tail = norm_rope_backward(
            d_head, d_tail, x_head, x_tail, weight, cos, sin, rows, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE
        )
        store_heads(dx, to, ok, d_head, d_tail, HEAD, TAIL, SIZE)
        if NORM:
            mine = partial + (pid.to(tl.int64) * 2 + which) * SIZE
            store_weight(mine, w_head, 0, HEAD, SIZE)
            if TAIL > 0:
                store_weight(mine, w_tail, HEAD, TAIL, SIZE)


def _short_constants(length: int, size: int, *, backward: bool = False) -> dict[str, Any]:
    """Tile of a whole sequence, and warps by its rows.

    A tile of 16 x 80 float32 values on one warp is 40 registers a thread. The backward pass keeps about twice as many
    tiles alive as the forward pass; with two warps for 16 rows it spilled, as did four for 32 rows.
    """
    rows = max(16, triton.next_power_of_2(length))
    head, tail = tile_widths(size)
    warps = {16: 4, 32: 8, 64: 8, 128: 16}[rows] if backward else rows // 16
    return {"ROWS": rows, "HEAD": head, "TAIL": tail, "SIZE": size, "num_warps": warps}


def _heads(x: Tensor, places: tuple[int, int], heads: int, temporal: bool) -> Tensor:
    """Tokens [B, T * S, H * D] -> view [N1, N2, L, H, D]."""
    y = x.unflatten(1, places).unflatten(3, (heads, -1))
    return y.transpose(1, 2) if temporal else y


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    temporal: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q, k, v: views [N1, N2, L, H, D] of equal strides -> (out [B, T * S, H * D], lse; empty for short sequences)."""
    outer, inner, length, heads, size = q.shape
    places = (length, inner) if temporal else (inner, length)
    out = q.new_empty((outer, inner * length, heads * size))
    if length > MAX_SHORT:
        return out, flash.forward(q, k, v, _heads(out, places, heads, temporal), weights, cos, sin, eps)
    if out.numel() > 0:
        view = _heads(out, places, heads, temporal)
        _forward_kernel[(outer * inner * heads,)](
            q, k, v, out, weights, cos, sin, heads, length, inner, *q.stride()[:4], *view.stride()[:4], size**-0.5, eps,
            NORM=weights is not None, ROPE=cos is not None, ALIGN=alignment(q, k, v, view),
            **_short_constants(length, size),
        )  # fmt: skip
    return out, q.new_empty((0,), dtype=torch.float32)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    temporal: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(dqkv [B, T, S, 3, H, D], dweights [2, D]); ``out`` is needed only for long sequences."""
    outer, inner, length, heads, size = q.shape
    places = (length, inner) if temporal else (inner, length)
    dqkv = q.new_empty((outer, *places, 3, heads, size))
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    g = _heads(dout, places, heads, temporal)
    dq, dk, dv = (dqkv.transpose(1, 2) if temporal else dqkv).unbind(3)
    if length > MAX_SHORT:
        assert out is not None
        o = _heads(out, places, heads, temporal)
        return dqkv, flash.backward(g, q, k, v, o, lse, dq, dk, dv, weights, cos, sin, eps)
    programs = outer * inner * heads if dqkv.numel() > 0 else 0
    partial = q.new_empty((programs if weights is not None else 0, 2, size), dtype=torch.float32)
    if programs > 0:
        _backward_kernel[(programs,)](
            g, q, k, v, dq, dk, dv, partial, weights, cos, sin, heads, length, inner,
            *q.stride()[:4], *dq.stride()[:4], *g.stride()[:4], size**-0.5, eps,
            NORM=weights is not None, ROPE=cos is not None, ALIGN=alignment(g, q, k, v, dq, dk, dv),
            **_short_constants(length, size),
        )  # fmt: skip
    return dqkv, partial.sum(0)  # second stage; the number of programs does not depend on the device


def aot_specs() -> list[AotSpec]:
    """The full-size model: T = 15, 30, 60 in one tile with norm and RoPE; S = 405, 1024, 3600 as one kind of loop."""
    specs = flash.aot_specs()
    tables = {"weights": "*fp32", "cos": "*fp32", "sin": "*fp32"}
    strides = [f"stride_{name}" for name in "12lh"]
    for length in (15, 30, 60):
        numbers = {name: "i32" for name in ("heads", "length", "inner", *strides)}
        aligned = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "partial", *tables)
        for name, kernel, pointers, prefixes in (
            ("forward", _forward_kernel, ("q", "k", "v", "out"), ("out_",)),
            ("backward", _backward_kernel, ("dout", "q", "k", "v", "dq", "dk", "dv"), ("d_", "o_")),
        ):
            fixed = _short_constants(length, 72, backward=name == "backward")
            fixed |= {"NORM": True, "ROPE": True, "ALIGN": 8}
            warps = fixed.pop("num_warps")
            signature = {p: "*bf16" for p in pointers} | tables | numbers
            signature |= {prefix + stride: "i32" for prefix in prefixes for stride in strides}
            signature |= {"scale": "fp32", "eps": "fp32"} | {key: "constexpr" for key in fixed}
            if name == "backward":
                signature["partial"] = "*fp32"
            coarse = tuple(n for n in signature if n.endswith(("stride_1", "stride_2", "stride_l")))
            specs.append(
                AotSpec(
                    name=f"{name} temporal T={length} D=72 bf16", kernel=kernel, signature=signature,
                    constants=fixed, num_warps=warps, aligned=tuple(n for n in (*aligned, *coarse) if n in signature),
                )
            )  # fmt: skip
    return specs
