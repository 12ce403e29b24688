"""Triton kernels of bidirectional_attention. The formulas are in docs/kernels/bidirectional_attention.md.

Both softmaxes are kept in base 2: with S scaled by log2(e), exp2 is the exponential and ``lse`` a logarithm of base 2.
A head size that is no power of two is held as two tiles (72 = 64 + 16), not padded to the next one (128).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl

from javis.kernels.triton_support import AotSpec, interpreting

# The interpreter's numpy has no bfloat16: it cannot multiply it, and cuts float32 off where hardware rounds.
INTERPRETED = tl.constexpr(interpreting())
MAX_STRIDE = 2**23  # between tokens, kept by launch.py: offsets in a tile of up to 128 tokens fit into 32 bits


@triton.jit
def _at(base, first, count, stride, ROWS: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Pointers and mask of a tile: ROWS tokens from ``first`` of one head, its columns FROM ... FROM + WIDTH.

    The first token's offset is 64 bits wide; within a tile 32 do, because of MAX_STRIDE.
    """
    rows, columns = tl.arange(0, ROWS), FROM + tl.arange(0, WIDTH)
    mask = rows[:, None] < count - first
    if FROM + WIDTH > D:
        mask = mask & (columns[None, :] < D)
    return base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :]), mask


@triton.jit
def _tile(base, first, count, stride, ROWS: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[ROWS, WIDTH], with 0 outside."""
    pointers, mask = _at(base, first, count, stride, ROWS, FROM, WIDTH, D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(
    base, first, count, stride, value,
    ROWS: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    pointers, mask = _at(base, first, count, stride, ROWS, FROM, WIDTH, D)
    tl.store(pointers, _cast(value, base.dtype.element_ty), mask=mask)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _dot(a, b):
    """a @ b summed in float32. float32 inputs are multiplied as such: TF32 would cost 13 bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _finite(maximum):
    """What to subtract from scores of this maximum: 0 while all are -inf, because -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def forward_kernel(
    qv, qa, vv, va, out, lse, part_acc, part_max, part_sum,
    qv_b, qv_n, qa_b, qa_n, vv_b, vv_n, va_b, va_n,
    heads, n_video, n_audio, tiles_per_split, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BV: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """One split of the video against all audio: rows are finished here, columns are left as (max, sum, acc) per split.

    The parts of the columns stay in the split's own workspace, which this program alone reads and writes.
    """
    split, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    qv += b * qv_b + h * D
    qa += b * qa_b + h * D
    vv += b * vv_b + h * D
    va += b * va_b + h * D
    width = heads * D
    out += b * n_video * width + h * D
    lse += bh.to(tl.int64) * n_video
    part = bh.to(tl.int64) * tl.num_programs(0) + split
    part_acc += part * n_audio * D
    part_max += part * n_audio
    part_sum += part * n_audio

    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(n_video, BV))
    for tile in range(first_tile, last_tile):
        rows = tile * BV + tl.arange(0, BV)
        q0 = _tile(qv, tile * BV, n_video, qv_n, BV, 0, D0, D)
        v0 = _tile(vv, tile * BV, n_video, vv_n, BV, 0, D0, D)
        acc0 = tl.zeros((BV, D0), tl.float32)
        if D1 > 0:
            q1 = _tile(qv, tile * BV, n_video, qv_n, BV, D0, D1, D)
            v1 = _tile(vv, tile * BV, n_video, vv_n, BV, D0, D1, D)
            acc1 = tl.zeros((BV, D1), tl.float32)
        row_max = tl.full((BV,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BV,), tl.float32)
        for start in range(0, n_audio, BA):
            columns = start + tl.arange(0, BA)
            k0 = _tile(qa, start, n_audio, qa_n, BA, 0, D0, D)
            w0 = _tile(va, start, n_audio, va_n, BA, 0, D0, D)
            s = _dot(q0, tl.trans(k0))
            if D1 > 0:
                k1 = _tile(qa, start, n_audio, qa_n, BA, D0, D1, D)
                w1 = _tile(va, start, n_audio, va_n, BA, D0, D1, D)
                s += _dot(q1, tl.trans(k1))
            s *= scale

            # Rows: the online softmax of flash attention.
            x = tl.where(columns[None, :] < n_audio, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(x, 1))
            keep = tl.exp2(row_max - _finite(new_max))
            p = tl.exp2(x - _finite(new_max)[:, None])
            row_max = new_max
            row_sum = row_sum * keep + tl.sum(p, 1)
            p = _cast(p, qv.dtype.element_ty)
            acc0 = acc0 * keep[:, None] + _dot(p, w0)
            if D1 > 0:
                acc1 = acc1 * keep[:, None] + _dot(p, w1)

            # Columns: the same down the video, with the running values in memory.
            # Inside a branch, loads are left where they stand: pipelined ones could come before the stores they follow.
            old_max = tl.full((BA,), float("-inf"), tl.float32)
            old_sum = tl.zeros((BA,), tl.float32)
            if tile > first_tile:
                old_max = tl.load(part_max + columns, mask=columns < n_audio, other=float("-inf"))
                old_sum = tl.load(part_sum + columns, mask=columns < n_audio, other=0.0)
            x = tl.where(rows[:, None] < n_video, s, float("-inf"))
            new_max = tl.maximum(old_max, tl.max(x, 0))
            keep = tl.exp2(old_max - _finite(new_max))
            p = tl.exp2(x - _finite(new_max)[None, :])
            tl.store(part_max + columns, new_max, mask=columns < n_audio)
            tl.store(part_sum + columns, old_sum * keep + tl.sum(p, 0), mask=columns < n_audio)
            p = tl.trans(_cast(p, qv.dtype.element_ty))
            col0 = _dot(p, v0)
            if tile > first_tile:
                col0 += _tile(part_acc, start, n_audio, D, BA, 0, D0, D) * keep[:, None]
            _store(part_acc, start, n_audio, D, col0, BA, 0, D0, D)
            if D1 > 0:
                col1 = _dot(p, v1)
                if tile > first_tile:
                    col1 += _tile(part_acc, start, n_audio, D, BA, D0, D1, D) * keep[:, None]
                _store(part_acc, start, n_audio, D, col1, BA, D0, D1, D)

        _store(out, tile * BV, n_video, width, acc0 / row_sum[:, None], BV, 0, D0, D)
        if D1 > 0:
            _store(out, tile * BV, n_video, width, acc1 / row_sum[:, None], BV, D0, D1, D)
        tl.store(lse + rows, row_max + tl.log2(row_sum), mask=rows < n_video)
        tl.debug_barrier()  # other threads of this program read the workspace next


@triton.jit
def merge_kernel(
    part_acc, part_max, part_sum, out, lse, heads, n_audio, splits,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Merge what the splits left for BA audio tokens of one head, in order."""
    bh = tl.program_id(1).to(tl.int64)
    width = heads * D
    first = tl.program_id(0) * BA
    columns = first + tl.arange(0, BA)
    inside = columns < n_audio
    running_max = tl.full((BA,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BA,), tl.float32)
    acc0 = tl.zeros((BA, D0), tl.float32)
    if D1 > 0:
        acc1 = tl.zeros((BA, D1), tl.float32)
    for split in range(splits):
        part = (bh * splits + split) * n_audio
        new_max = tl.load(part_max + part + columns, mask=inside, other=0.0)
        new_sum = tl.load(part_sum + part + columns, mask=inside, other=1.0)
        top = tl.maximum(running_max, new_max)
        keep, take = tl.exp2(running_max - _finite(top)), tl.exp2(new_max - _finite(top))
        running_max = top
        running_sum = running_sum * keep + new_sum * take
        acc0 = acc0 * keep[:, None] + _tile(part_acc + part * D, first, n_audio, D, BA, 0, D0, D) * take[:, None]
        if D1 > 0:
            acc1 = acc1 * keep[:, None] + _tile(part_acc + part * D, first, n_audio, D, BA, D0, D1, D) * take[:, None]
    out += (bh // heads) * n_audio * width + (bh % heads) * D
    _store(out, first, n_audio, width, acc0 / running_sum[:, None], BA, 0, D0, D)
    if D1 > 0:
        _store(out, first, n_audio, width, acc1 / running_sum[:, None], BA, D0, D1, D)
    tl.store(lse + bh * n_audio + columns, running_max + tl.log2(running_sum), mask=inside)


@triton.jit
def delta_kernel(
    out, dout, delta, out_b, out_n, dout_b, dout_n, heads, tokens,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * dout: what both softmaxes subtract from the gradient of a probability."""
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    rows = first + tl.arange(0, BLOCK)
    out += (bh // heads) * out_b + (bh % heads) * D
    dout += (bh // heads) * dout_b + (bh % heads) * D
    x, y = _tile(out, first, tokens, out_n, BLOCK, 0, D0, D), _tile(dout, first, tokens, dout_n, BLOCK, 0, D0, D)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    if D1 > 0:
        x, y = _tile(out, first, tokens, out_n, BLOCK, D0, D1, D), _tile(dout, first, tokens, dout_n, BLOCK, D0, D1, D)
        total += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + bh * tokens + rows, total, mask=rows < tokens)


@triton.jit
def backward_kernel(
    q, k, v, w, do, dp, lse, klse, delta, kdelta, dq, dv,
    q_b, q_n, k_b, k_n, v_b, v_n, w_b, w_n, do_b, do_n, dp_b, dp_n,
    heads, tokens, others, tiles_per_split, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of q and v of one stream, for BM of its tokens, summed over one split of the other stream.

    The op is symmetric in the streams, so one kernel serves both. Own stream: q, v, do (gradient of its result), lse,
    delta. Other stream: k, w, dp, klse, kdelta in the same roles.
    """
    split, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    q += b * q_b + h * D
    k += b * k_b + h * D
    v += b * v_b + h * D
    w += b * w_b + h * D
    do += b * do_b + h * D
    dp += b * dp_b + h * D
    klse += bh * others
    kdelta += bh * others
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    own_lse = tl.load(lse + bh * tokens + rows, mask=rows < tokens, other=0.0)[:, None]
    own_delta = tl.load(delta + bh * tokens + rows, mask=rows < tokens, other=0.0)[:, None]
    q0 = _tile(q, first, tokens, q_n, BM, 0, D0, D)
    v0 = _tile(v, first, tokens, v_n, BM, 0, D0, D)
    do0 = _tile(do, first, tokens, do_n, BM, 0, D0, D)
    dq0, dv0 = tl.zeros((BM, D0), tl.float32), tl.zeros((BM, D0), tl.float32)
    if D1 > 0:
        q1 = _tile(q, first, tokens, q_n, BM, D0, D1, D)
        v1 = _tile(v, first, tokens, v_n, BM, D0, D1, D)
        do1 = _tile(do, first, tokens, do_n, BM, D0, D1, D)
        dq1, dv1 = tl.zeros((BM, D1), tl.float32), tl.zeros((BM, D1), tl.float32)

    begin = split * tiles_per_split * BN
    for start in range(begin, tl.minimum(begin + tiles_per_split * BN, others), BN):
        columns = start + tl.arange(0, BN)
        inside = columns < others
        k0 = _tile(k, start, others, k_n, BN, 0, D0, D)
        w0 = _tile(w, start, others, w_n, BN, 0, D0, D)
        dp0 = _tile(dp, start, others, dp_n, BN, 0, D0, D)
        s = _dot(q0, tl.trans(k0))
        own = _dot(do0, tl.trans(w0))
        other = _dot(v0, tl.trans(dp0))
        if D1 > 0:
            k1 = _tile(k, start, others, k_n, BN, D0, D1, D)
            w1 = _tile(w, start, others, w_n, BN, D0, D1, D)
            dp1 = _tile(dp, start, others, dp_n, BN, D0, D1, D)
            s += _dot(q1, tl.trans(k1))
            own += _dot(do1, tl.trans(w1))
            other += _dot(v1, tl.trans(dp1))
        # A score outside would be 0, and exp2(0 - lse) may overflow, so it must not survive into a product with 0.
        s = tl.where(inside[None, :], s * scale, float("-inf"))
        other_lse = tl.load(klse + columns, mask=inside, other=0.0)[None, :]
        other_delta = tl.load(kdelta + columns, mask=inside, other=0.0)[None, :]
        p = tl.exp2(s - other_lse)
        ds = tl.exp2(s - own_lse) * (own - own_delta) + p * (other - other_delta)
        p, ds = _cast(p, q.dtype.element_ty), _cast(ds, q.dtype.element_ty)
        dv0 += _dot(p, dp0)
        dq0 += _dot(ds, k0)
        if D1 > 0:
            dv1 += _dot(p, dp1)
            dq1 += _dot(ds, k1)

    width = heads * D
    at = ((split.to(tl.int64) * (tl.num_programs(2) // heads) + b) * tokens) * width + h * D
    factor = scale * 0.6931471805599453  # scale carries log2(e), the gradient does not
    _store(dq + at, first, tokens, width, dq0 * factor, BM, 0, D0, D)
    _store(dv + at, first, tokens, width, dv0, BM, 0, D0, D)
    if D1 > 0:
        _store(dq + at, first, tokens, width, dq1 * factor, BM, D0, D1, D)
        _store(dv + at, first, tokens, width, dv1, BM, D0, D1, D)


# Configurations -------------------------------------------------------------------------------------------------


def head_tiles(size: int) -> dict[str, int]:
    """D as a power of two and what is left, tiles of at least 16 as the tensor cores need."""
    first = max(16, 1 << (size.bit_length() - 1))
    rest = size - first
    return {"D": size, "D0": first, "D1": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0}


def forward_config(dtype: torch.dtype, hopper: bool) -> dict[str, int]:
    """Tiles and warps; see docs/kernels/bidirectional_attention.md for why."""
    if dtype == torch.float32:
        return {"BV": 32, "BA": 32, "num_warps": 4, "num_stages": 1}
    return {"BV": 128, "BA": 64 if hopper else 32, "num_warps": 8, "num_stages": 2}


def backward_config(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
    return {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 2}


_SIZES = ("heads", "n_video", "n_audio", "tiles_per_split", "splits", "tokens", "others")
_FLOATS = ("lse", "klse", "delta", "kdelta", "part_acc", "part_max", "part_sum")


def aot_specs() -> list[AotSpec]:
    """What the full-size model launches in bfloat16: 8 heads of size 72."""
    half = torch.bfloat16
    small = {"num_warps": 4, "num_stages": 3}
    sums = {"dq", "dv"}  # in float32 where a stream is split
    return [
        _spec("forward", forward_kernel, forward_config(half, hopper=True)),
        _spec("forward, not Hopper", forward_kernel, forward_config(half, hopper=False), default=False),
        _spec("merge", merge_kernel, {"BA": 16, **small}),
        _spec("delta", delta_kernel, {"BLOCK": 64, **small}),
        _spec("backward", backward_kernel, backward_config(half)),
        _spec("backward, split", backward_kernel, backward_config(half), sums),
    ]


def _spec(
    name: str, kernel: Any, config: dict[str, int], floats: Collection[str] = (), *, default: bool = True
) -> AotSpec:
    given = head_tiles(72) | config
    constants = {key: value for key, value in given.items() if key in kernel.arg_names}
    signature, aligned = {}, []
    for argument in kernel.arg_names:
        size = argument in _SIZES or argument.endswith(("_b", "_n"))
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "scale":
            signature[argument] = "fp32"
        elif size:
            signature[argument] = "i32"
        else:
            signature[argument] = "*fp32" if argument in (*_FLOATS, *floats) else "*bf16"
        if argument not in (*constants, "scale", "heads", "tiles_per_split", "splits"):
            aligned.append(argument)
    return AotSpec(
        name=f"{name} D=72 bf16",
        kernel=kernel,
        signature=signature,
        constants=constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        aligned=tuple(aligned),
        default=default,
    )
