"""qk_norm_rope in Triton, and the functions on tiles that the attention kernels share with it.

A head of D values is held as two tiles: the first HEAD columns (the largest power of two in D) and a TAIL for the rest
(a power of two from 16 up, or none): D = 72 is 64 + 16, where one tile would be 128 wide. HEAD is even, so a pair of
RoPE never straddles the two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.ops.ada_layer_norm.triton_impl import INTERPRETED, rounded
from javis.kernels.triton_support import AotSpec

# Rows (token, head) of one program: 64 x 80 values on 4 warps are 40 registers a thread for each tile that is alive.
ROWS = 64


def tile_widths(size: int) -> tuple[int, int]:
    """(HEAD, TAIL) for heads of ``size`` values."""
    head = max(16, 1 << (size.bit_length() - 1))
    return head, max(16, triton.next_power_of_2(size - head)) if size > head else 0


def alignment(*tensors: Tensor) -> int:
    """8 if every row of heads starts at a multiple of 8 values and 16 bytes, else 1.

    Triton knows of a stride only whether 16 divides it, and 16 does not divide 72: told nothing, it would load a row of
    144 bytes value by value.
    """
    strides = {stride for tensor in tensors for stride in tensor.stride()[:-1]}
    even = all(stride % 8 == 0 for stride in strides) and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return 8 if even else 1


@triton.jit
def mma(a, b, total=None):
    """a @ b (+ total) in float32, with exact products for float32 (never TF32)."""
    if INTERPRETED:  # it keeps bfloat16 as bare 16-bit integers, and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def mma_heads(a_head, b_head, a_tail, b_tail, TAIL: tl.constexpr):
    """a @ b.T, summed over both tiles of the heads."""
    product = mma(a_head, tl.trans(b_head))
    if TAIL > 0:
        product = mma(a_tail, tl.trans(b_tail), product)
    return product


@triton.jit
def load_heads(base, offsets, ok, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr):
    """Both tiles of rows of heads. Without TAIL the second is the first again, and means nothing."""
    head = load_tile(base, offsets, ok, 0, HEAD, SIZE)
    tail = head
    if TAIL > 0:
        tail = load_tile(base, offsets, ok, HEAD, TAIL, SIZE)
    return head, tail


@triton.jit
def store_heads(base, offsets, ok, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr):
    store_tile(base, offsets, ok, head, 0, HEAD, SIZE)
    if TAIL > 0:
        store_tile(base, offsets, ok, tail, HEAD, TAIL, SIZE)


@triton.jit
def load_tile(base, offsets, ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of the rows at base + offsets; 0 where the row is not ok or the column >= SIZE."""
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(base + offsets[:, None] + columns[None, :], mask=ok[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def store_tile(base, offsets, ok, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    mask = ok[:, None] & (columns < SIZE)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], rounded(tile, base.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(base, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    return tl.load(base + columns, mask=columns < SIZE, other=0.0)[None, :]


@triton.jit
def store_weight(base, row, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    tl.store(base + columns, row, mask=columns < SIZE)


@triton.jit
def rotate(
    tile, cos, sin, places, ok, SIGN: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """Rotate the pairs (2i, 2i + 1) of rows by SIGN times the angle of their places; cos, sin: dense [L, SIZE / 2]."""
    rows = places.to(tl.int64) * (SIZE // 2)
    c = load_tile(cos, rows, ok, FIRST // 2, WIDTH // 2, SIZE // 2)
    s = load_tile(sin, rows, ok, FIRST // 2, WIDTH // 2, SIZE // 2) * SIGN
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], WIDTH // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (tile.shape[0], WIDTH))


@triton.jit
def inverse_norm(head, tail, ok, eps, TAIL: tl.constexpr, SIZE: tl.constexpr):
    """1 / RMS of every row, and 0 for the rows that only pad the tile (there eps = 0 would give infinity)."""
    squares = tl.sum(head * head, 1)
    if TAIL > 0:
        squares += tl.sum(tail * tail, 1)
    return tl.where(ok, 1.0 / tl.sqrt(squares / SIZE + eps), 0.0)[:, None]


@triton.jit
def norm_rope(
    head, tail, weight, cos, sin, places, ok, eps,
    HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Rows as loaded -> float32, normalised, times the weight, rotated. Without TAIL the second tile means nothing."""
    head, tail = head.to(tl.float32), tail.to(tl.float32)
    if NORM:
        inverse = inverse_norm(head, tail, ok, eps, TAIL, SIZE)
        head = head * inverse * load_weight(weight, 0, HEAD, SIZE)
        if TAIL > 0:
            tail = tail * inverse * load_weight(weight, HEAD, TAIL, SIZE)
    if ROPE:
        head = rotate(head, cos, sin, places, ok, 1.0, 0, HEAD, SIZE)
        if TAIL > 0:
            tail = rotate(tail, cos, sin, places, ok, 1.0, HEAD, TAIL, SIZE)
    return head, tail


@triton.jit
def norm_rope_backward(
    d_head, d_tail, head, tail, weight, cos, sin, places, ok, eps,
    HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows and, summed over them, of the weight: (d_head, d_tail, dweight_head, dweight_tail)."""
    head, tail = head.to(tl.float32), tail.to(tl.float32)
    if ROPE:
        d_head = rotate(d_head, cos, sin, places, ok, -1.0, 0, HEAD, SIZE)
        if TAIL > 0:
            d_tail = rotate(d_tail, cos, sin, places, ok, -1.0, HEAD, TAIL, SIZE)
    w_head = tl.zeros([HEAD], tl.float32)
    w_tail = tl.zeros([TAIL if TAIL > 0 else HEAD], tl.float32)
    if NORM:
        inverse = inverse_norm(head, tail, ok, eps, TAIL, SIZE)
        head *= inverse
        w_head = tl.sum(d_head * head, 0)
        d_head *= load_weight(weight, 0, HEAD, SIZE)
        dot = tl.sum(d_head * head, 1)
        if TAIL > 0:
            tail *= inverse
            w_tail = tl.sum(d_tail * tail, 0)
            d_tail *= load_weight(weight, HEAD, TAIL, SIZE)
            dot += tl.sum(d_tail * tail, 1)
        mean = dot[:, None] / SIZE
        d_head = inverse * (d_head - head * mean)
        if TAIL > 0:
            d_tail = inverse * (d_tail - tail * mean)
    return d_head, d_tail, w_head, w_tail


@triton.jit
def row_offsets(rows, heads, length, inner, stride_1, stride_2, stride_l, stride_h, ALIGN: tl.constexpr):
    """Rows (n1, n2, l, h), h fastest -> offsets into a strided tensor, and l. Division in int32, products in int64."""
    h, token = rows % heads, rows // heads
    place, n = token % length, token // length
    offsets = (n // inner).to(tl.int64) * stride_1 + (n % inner).to(tl.int64) * stride_2
    offsets += place.to(tl.int64) * stride_l + h.to(tl.int64) * stride_h
    return tl.multiple_of(offsets, ALIGN), place


@triton.jit
def _forward_kernel(
    q, k, q_out, k_out, weights, cos, sin, count, heads, length, inner,
    stride_1, stride_2, stride_l, stride_h, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1)  # 0: q, 1: k
    if which == 0:
        x, y = q, q_out
    else:
        x, y = k, k_out
    ok = rows < count
    offsets, places = row_offsets(rows, heads, length, inner, stride_1, stride_2, stride_l, stride_h, ALIGN)
    head, tail = load_heads(x, offsets, ok, HEAD, TAIL, SIZE)
    weight = weights
    if NORM:
        weight += which * SIZE
    head, tail = norm_rope(head, tail, weight, cos, sin, places, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE)
    dense = rows.to(tl.int64) * SIZE
    store_heads(y, dense, ok, head, tail, HEAD, TAIL, SIZE)


@triton.jit
def _backward_kernel(
    dq_out, dk_out, q, k, dq, dk, partial, weights, cos, sin, count, heads, length, inner,
    stride_1, stride_2, stride_l, stride_h, d_stride_1, d_stride_2, d_stride_l, d_stride_h, eps,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    which = tl.program_id(1)  # 0: q, 1: k
    if which == 0:
        x, dy, dx = q, dq_out, dq
    else:
        x, dy, dx = k, dk_out, dk
    rows = pid * ROWS + tl.arange(0, ROWS)
    ok = rows < count
    offsets, places = row_offsets(rows, heads, length, inner, stride_1, stride_2, stride_l, stride_h, ALIGN)
    to, _ = row_offsets(rows, heads, length, inner, d_stride_1, d_stride_2, d_stride_l, d_stride_h, ALIGN)
    dense = rows.to(tl.int64) * SIZE
    head, tail = load_heads(x, offsets, ok, HEAD, TAIL, SIZE)
    d_head, d_tail = load_heads(dy, dense, ok, HEAD, TAIL, SIZE)
    d_head, d_tail = d_head.to(tl.float32), d_tail.to(tl.float32)
    weight = weights
    if NORM:
        weight += which * SIZE
    d_head, d_tail, w_head, w_tail = norm_rope_backward(
        d_head, d_tail, head, tail, weight, cos, sin, places, ok, eps, HEAD, TAIL, SIZE, NORM, ROPE
    )
    store_heads(dx, to, ok, d_head, d_tail, HEAD, TAIL, SIZE)
    if NORM:
        mine = partial + (pid.to(tl.int64) * 2 + which) * SIZE
        store_weight(mine, w_head, 0, HEAD, SIZE)
        if TAIL > 0:
            store_weight(mine, w_tail, HEAD, TAIL, SIZE)


def _grid(x: Tensor) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Number of programs, (count, heads, length, inner) and constants for x [N1, N2, L, H, D]."""
    outer, inner, length, heads, size = x.shape
    count = outer * inner * length * heads
    head, tail = tile_widths(size)
    constants = {"ROWS": ROWS, "HEAD": head, "TAIL": tail, "SIZE": size, "num_warps": 4}
    return triton.cdiv(count, ROWS), (count, heads, length, inner), constants


def forward(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q, k [N1, N2, L, H, D] of equal strides, inner stride 1 -> dense [N1 * N2, L, H, D]."""
    shape = (q.shape[0] * q.shape[1], *q.shape[2:])
    q_out, k_out = q.new_empty(shape), k.new_empty(shape)
    programs, sizes, constants = _grid(q)
    if programs > 0:
        _forward_kernel[(programs, 2)](
            q, k, q_out, k_out, weights, cos, sin, *sizes, *q.stride()[:4], eps,
            NORM=weights is not None, ROPE=cos is not None, ALIGN=alignment(q, k), **constants,
        )  # fmt: skip
    return q_out, k_out


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    dq: Tensor,
    dk: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> Tensor:
    """Write dq and dk (shaped like q and k, equal strides) from dense dq_out and dk_out; return dweights [2, D]."""
    programs, sizes, constants = _grid(q)
    partial = q.new_empty((programs if weights is not None else 0, 2, q.shape[-1]), dtype=torch.float32)
    if programs > 0:
        _backward_kernel[(programs, 2)](
            dq_out, dk_out, q, k, dq, dk, partial, weights, cos, sin, *sizes,
            *q.stride()[:4], *dq.stride()[:4], eps, NORM=weights is not None, ROPE=cos is not None,
            ALIGN=alignment(q, k, dq, dk), **constants,
        )  # fmt: skip
    return partial.sum(0)  # second stage; the number of programs does not depend on the device


def aot_specs() -> list[AotSpec]:
    """The full-size model: D = 72, q and k inside packed projections; norm only (spatial) and norm with RoPE."""
    constants = {"ROWS": ROWS, "HEAD": 64, "TAIL": 16, "SIZE": 72, "NORM": True, "ALIGN": 8}
    tables = {"weights": "*fp32", "cos": "*fp32", "sin": "*fp32"}
    numbers = {name: "i32" for name in ("count", "heads", "length", "inner")}
    strides = {f"stride_{name}": "i32" for name in "12lh"}
    aligned = (
        "q",
        "k",
        "q_out",
        "k_out",
        "dq_out",
        "dk_out",
        "dq",
        "dk",
        "partial",
        *tables,
        "stride_1",
        "stride_2",
        "stride_l",
    )
    specs = []
    for rope in (False, True):
        fixed = constants | {"ROPE": rope}
        suffix = "norm, rope" if rope else "norm"
        tail = {"eps": "fp32"} | {name: "constexpr" for name in fixed}
        pointers = {name: "*bf16" for name in ("q", "k", "q_out", "k_out")}
        specs.append(
            AotSpec(
                name=f"forward D=72 bf16 {suffix}", kernel=_forward_kernel, constants=fixed, num_warps=4,
                signature=pointers | tables | numbers | strides | tail,
                aligned=tuple(n for n in aligned if n in pointers | tables | strides),
            )
        )  # fmt: skip
        pointers = {name: "*bf16" for name in ("dq_out", "dk_out", "q", "k", "dq", "dk")} | {"partial": "*fp32"}
        d_strides = {f"d_{name}": kind for name, kind in strides.items()}
        specs.append(
            AotSpec(
                name=f"backward D=72 bf16 {suffix}", kernel=_backward_kernel, constants=fixed, num_warps=4,
                signature=pointers | tables | numbers | strides | d_strides | tail,
                aligned=(
                    *(n for n in aligned if n in pointers | tables | strides), "d_stride_1", "d_stride_2", "d_stride_l",
                ),
            )
        )  # fmt: skip
    return specs
