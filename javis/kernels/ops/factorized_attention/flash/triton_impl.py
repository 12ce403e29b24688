"""Attention over long sequences in Triton: blocks of queries against blocks of keys, softmax online.

Norm and RoPE come before, by the kernel of qk_norm_rope: a block of keys is read by L / BLOCK_Q programs, each of which
would normalise it again between two matrix products. v, and q and k where there is nothing to do to them, are read in
place from the packed projections. Online softmax: arXiv 1805.02867; as blocks: arXiv 2205.14135.

The backward pass is two kernels, one over blocks of queries (dq) and one over blocks of keys (dk, dv), which computes
the scores once more than a single kernel with atomic additions would, and gives the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.triton_impl import rounded
from javis.kernels.ops.qk_norm_rope import triton_impl as prepare
from javis.kernels.ops.qk_norm_rope.triton_impl import (
    alignment,
    load_heads,
    mma,
    mma_heads,
    store_heads,
    tile_widths,
)
from javis.kernels.triton_support import AotSpec

LOG2E = tl.constexpr(1.4426950408889634)
# Queries and keys of one block, warps, stages: of the forward pass and of both kernels of the backward pass. 128 rows
# are one MMA of 64 rows for each of two groups of four warps, and 128 x (64 + 80) float32 accumulators are 72 registers
# a thread there. Not tuned on a GPU yet.
FORWARD = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _program(length, heads, BLOCK: tl.constexpr):
    """What this program works on, see grid(): head and sequence (pid), head, sequence, places, which of them exist."""
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0) // blocks
    places = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return pid, pid % heads, pid // heads, places, places < length


@triton.jit
def _start(n, inner, stride_1, stride_2, head, stride_h):
    return (n // inner).to(tl.int64) * stride_1 + (n % inner).to(tl.int64) * stride_2 + head.to(tl.int64) * stride_h


@triton.jit
def _rows(start, rows, stride_l, ALIGN: tl.constexpr):
    return tl.multiple_of(start + rows.to(tl.int64) * stride_l, ALIGN)


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, heads, length, inner, q_stride_1, q_stride_2, q_stride_l, q_stride_h,
    v_stride_1, v_stride_2, v_stride_l, v_stride_h, o_stride_1, o_stride_2, o_stride_l, o_stride_h, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    pid, h, n, rows, ok = _program(length, heads, BLOCK_Q)
    q_start = _start(n, inner, q_stride_1, q_stride_2, h, q_stride_h)
    v_start = _start(n, inner, v_stride_1, v_stride_2, h, v_stride_h)
    q_head, q_tail = load_heads(q, _rows(q_start, rows, q_stride_l, ALIGN), ok, HEAD, TAIL, SIZE)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    o_head = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    o_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else HEAD], tl.float32)
    for first in range(0, length, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        here = keys < length
        k_head, k_tail = load_heads(k, _rows(q_start, keys, q_stride_l, ALIGN), here, HEAD, TAIL, SIZE)
        scores = mma_heads(q_head, k_head, q_tail, k_tail, TAIL) * (scale * LOG2E)
        scores = tl.where(here[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v_head, v_tail = load_heads(v, _rows(v_start, keys, v_stride_l, ALIGN), here, HEAD, TAIL, SIZE)
        p = rounded(p, v_head.dtype)
        o_head = mma(p, v_head, o_head * shrink[:, None])
        if TAIL > 0:
            o_tail = mma(p, v_tail, o_tail * shrink[:, None])
        top = new_top
    to = _rows(_start(n, inner, o_stride_1, o_stride_2, h, o_stride_h), rows, o_stride_l, ALIGN)
    store_heads(out, to, ok, o_head / total[:, None], o_tail / total[:, None], HEAD, TAIL, SIZE)
    tl.store(lse + pid.to(tl.int64) * length + rows, top + tl.log2(total), mask=ok)


@triton.jit
def _backward_q_kernel(
    dout, q, k, v, out, lse, delta, dq, heads, length, inner, q_stride_1, q_stride_2, q_stride_l, q_stride_h,
    v_stride_1, v_stride_2, v_stride_l, v_stride_h, o_stride_1, o_stride_2, o_stride_l, o_stride_h,
    g_stride_1, g_stride_2, g_stride_l, g_stride_h, d_stride_1, d_stride_2, d_stride_l, d_stride_h, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum(out * dout) of each row, which the other kernel needs as well."""
    pid, h, n, rows, ok = _program(length, heads, BLOCK_Q)
    q_start = _start(n, inner, q_stride_1, q_stride_2, h, q_stride_h)
    v_start = _start(n, inner, v_stride_1, v_stride_2, h, v_stride_h)
    q_head, q_tail = load_heads(q, _rows(q_start, rows, q_stride_l, ALIGN), ok, HEAD, TAIL, SIZE)
    o_at = _rows(_start(n, inner, o_stride_1, o_stride_2, h, o_stride_h), rows, o_stride_l, ALIGN)
    g_at = _rows(_start(n, inner, g_stride_1, g_stride_2, h, g_stride_h), rows, g_stride_l, ALIGN)
    g_head, g_tail = load_heads(dout, g_at, ok, HEAD, TAIL, SIZE)
    o_head, o_tail = load_heads(out, o_at, ok, HEAD, TAIL, SIZE)
    d = tl.sum(o_head.to(tl.float32) * g_head.to(tl.float32), 1)
    if TAIL > 0:
        d += tl.sum(o_tail.to(tl.float32) * g_tail.to(tl.float32), 1)
    statistic = pid.to(tl.int64) * length + rows
    tl.store(delta + statistic, d, mask=ok)
    top = tl.load(lse + statistic, mask=ok, other=0.0)
    d_head = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    d_tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else HEAD], tl.float32)
    for first in range(0, length, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        here = keys < length
        k_head, k_tail = load_heads(k, _rows(q_start, keys, q_stride_l, ALIGN), here, HEAD, TAIL, SIZE)
        v_head, v_tail = load_heads(v, _rows(v_start, keys, v_stride_l, ALIGN), here, HEAD, TAIL, SIZE)
        scores = mma_heads(q_head, k_head, q_tail, k_tail, TAIL) * (scale * LOG2E)
        p = tl.where(here[None, :], tl.exp2(scores - top[:, None]), 0.0)
        ds = rounded(p * (mma_heads(g_head, v_head, g_tail, v_tail, TAIL) - d[:, None]), k_head.dtype)
        d_head = mma(ds, k_head, d_head)
        if TAIL > 0:
            d_tail = mma(ds, k_tail, d_tail)
    to = _rows(_start(n, inner, d_stride_1, d_stride_2, h, d_stride_h), rows, d_stride_l, ALIGN)
    store_heads(dq, to, ok, d_head * scale, d_tail * scale, HEAD, TAIL, SIZE)


@triton.jit
def _backward_kv_kernel(
    dout, q, k, v, lse, delta, dk, dv, heads, length, inner, q_stride_1, q_stride_2, q_stride_l, q_stride_h,
    v_stride_1, v_stride_2, v_stride_l, v_stride_h, g_stride_1, g_stride_2, g_stride_l, g_stride_h,
    d_stride_1, d_stride_2, d_stride_l, d_stride_h, e_stride_1, e_stride_2, e_stride_l, e_stride_h, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dk (strides d) and dv (strides e). Scores are computed transposed: rows are keys."""
    pid, h, n, keys, here = _program(length, heads, BLOCK_K)
    q_start = _start(n, inner, q_stride_1, q_stride_2, h, q_stride_h)
    g_start = _start(n, inner, g_stride_1, g_stride_2, h, g_stride_h)
    v_at = _rows(_start(n, inner, v_stride_1, v_stride_2, h, v_stride_h), keys, v_stride_l, ALIGN)
    k_head, k_tail = load_heads(k, _rows(q_start, keys, q_stride_l, ALIGN), here, HEAD, TAIL, SIZE)
    v_head, v_tail = load_heads(v, v_at, here, HEAD, TAIL, SIZE)
    dk_head = tl.zeros([BLOCK_K, HEAD], tl.float32)
    dk_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else HEAD], tl.float32)
    dv_head = tl.zeros([BLOCK_K, HEAD], tl.float32)
    dv_tail = tl.zeros([BLOCK_K, TAIL if TAIL > 0 else HEAD], tl.float32)
    for first in range(0, length, BLOCK_Q):
        rows = first + tl.arange(0, BLOCK_Q)
        ok = rows < length
        q_head, q_tail = load_heads(q, _rows(q_start, rows, q_stride_l, ALIGN), ok, HEAD, TAIL, SIZE)
        g_head, g_tail = load_heads(dout, _rows(g_start, rows, g_stride_l, ALIGN), ok, HEAD, TAIL, SIZE)
        statistic = pid.to(tl.int64) * length + rows
        top = tl.load(lse + statistic, mask=ok, other=0.0)
        d = tl.load(delta + statistic, mask=ok, other=0.0)
        # Rows beyond the length add nothing: their q and dout are 0.
        p = tl.exp2(mma_heads(k_head, q_head, k_tail, q_tail, TAIL) * (scale * LOG2E) - top[None, :])
        ds = rounded(p * (mma_heads(v_head, g_head, v_tail, g_tail, TAIL) - d[None, :]), q_head.dtype)
        p = rounded(p, q_head.dtype)
        dv_head = mma(p, g_head, dv_head)
        dk_head = mma(ds, q_head, dk_head)
        if TAIL > 0:
            dv_tail = mma(p, g_tail, dv_tail)
            dk_tail = mma(ds, q_tail, dk_tail)
    to = _rows(_start(n, inner, d_stride_1, d_stride_2, h, d_stride_h), keys, d_stride_l, ALIGN)
    e_to = _rows(_start(n, inner, e_stride_1, e_stride_2, h, e_stride_h), keys, e_stride_l, ALIGN)
    store_heads(dk, to, here, dk_head * scale, dk_tail * scale, HEAD, TAIL, SIZE)
    store_heads(dv, e_to, here, dv_head, dv_tail, HEAD, TAIL, SIZE)


def grid(length: int, block: int, sequences: int) -> tuple[int]:
    """Programs of a launch: all blocks of one head of one sequence, then of the next.

    One axis, because CUDA allows 65,535 programs on the second and third (2^31 - 1 on the first), and 16 heads of one
    long clip's places are more. Blocks come first: they read the same keys.
    """
    return (triton.cdiv(length, block) * sequences,)


def _prepared(
    q: Tensor, k: Tensor, weights: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k normalised and rotated, dense [N1, N2, L, H, D]; themselves where there is nothing to do."""
    if weights is None and cos is None:
        return q, k
    outer = q.shape[:2]
    q, k = prepare.forward(q, k, weights, cos, sin, eps)
    return q.unflatten(0, outer), k.unflatten(0, outer)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> Tensor:
    """Write ``out`` (a view [N1, N2, L, H, D]); return log2 of the sums of the softmax, float32 [N1 * N2 * H, L]."""
    outer, inner, length, heads, size = q.shape
    lse = q.new_empty((outer * inner * heads, length), dtype=torch.float32)
    if lse.numel() > 0:
        q, k = _prepared(q, k, weights, cos, sin, eps)
        head, tail = tile_widths(size)
        _forward_kernel[grid(length, FORWARD["BLOCK_Q"], lse.shape[0])](
            q, k, v, out, lse, heads, length, inner, *q.stride()[:4], *v.stride()[:4], *out.stride()[:4], size**-0.5,
            HEAD=head, TAIL=tail, SIZE=size, ALIGN=alignment(q, k, v, out), **FORWARD,
        )  # fmt: skip
    return lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> Tensor:
    """Write dq, dk, dv (views [N1, N2, L, H, D] of equal strides); return dweights [2, D]."""
    inner, length, heads, size = q.shape[1:]
    if lse.numel() == 0:
        return q.new_zeros((2, size), dtype=torch.float32)
    y_q, y_k = _prepared(q, k, weights, cos, sin, eps)
    raw = y_q is q
    dy_q, dy_k = (dq, dk) if raw else (torch.empty_like(y_q), torch.empty_like(y_k))
    delta = torch.empty_like(lse)
    head, tail = tile_widths(size)
    align = alignment(dout, y_q, y_k, v, out, dy_q, dy_k, dv)
    fixed = {"HEAD": head, "TAIL": tail, "SIZE": size, "ALIGN": align} | BACKWARD
    q_strides, v_strides, g_strides = y_q.stride()[:4], v.stride()[:4], dout.stride()[:4]
    d_strides, sizes = dy_q.stride()[:4], (heads, length, inner)
    _backward_q_kernel[grid(length, BACKWARD["BLOCK_Q"], lse.shape[0])](
        dout, y_q, y_k, v, out, lse, delta, dy_q, *sizes, *q_strides, *v_strides, *out.stride()[:4], *g_strides,
        *d_strides, size**-0.5, **fixed,
    )  # fmt: skip
    _backward_kv_kernel[grid(length, BACKWARD["BLOCK_K"], lse.shape[0])](
        dout, y_q, y_k, v, lse, delta, dy_k, dv, *sizes, *q_strides, *v_strides, *g_strides, *d_strides,
        *dv.stride()[:4], size**-0.5, **fixed,
    )  # fmt: skip
    if raw:
        return q.new_zeros((2, size), dtype=torch.float32)
    return prepare.backward(dy_q, dy_k, q, k, dq, dk, weights, cos, sin, eps)


def aot_specs() -> list[AotSpec]:
    """The full-size model: D = 72, S = 405, 1024 and 3600 are one loop, for the length is an argument."""
    strides = [f"stride_{name}" for name in "12lh"]
    specs = []
    for name, kernel, pointers, prefixes, blocks in (
        ("forward", _forward_kernel, ("q", "k", "v", "out"), "qvo", FORWARD),
        ("backward dq", _backward_q_kernel, ("dout", "q", "k", "v", "out", "dq"), "qvogd", BACKWARD),
        ("backward dk dv", _backward_kv_kernel, ("dout", "q", "k", "v", "dk", "dv"), "qvgde", BACKWARD),
    ):
        fixed = {key: value for key, value in blocks.items() if key.isupper()}
        fixed |= {"HEAD": 64, "TAIL": 16, "SIZE": 72, "ALIGN": 8}
        signature = {pointer: "*bf16" for pointer in pointers} | {"lse": "*fp32"}
        if "backward" in name:
            signature["delta"] = "*fp32"
        aligned = (*signature, *(f"{p}_{stride}" for p in prefixes for stride in strides[:3]))
        signature |= {n: "i32" for n in ("heads", "length", "inner", *(f"{p}_{s}" for p in prefixes for s in strides))}
        signature |= {"scale": "fp32"} | {key: "constexpr" for key in fixed}
        specs.append(
            AotSpec(
                name=f"{name} spatial S=405,1024,3600 D=72 bf16", kernel=kernel, signature=signature, constants=fixed,
                num_warps=blocks["num_warps"], num_stages=blocks["num_stages"], aligned=aligned,
            )
        )  # fmt: skip
    return specs
