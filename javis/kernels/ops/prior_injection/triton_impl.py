"""Triton kernels of prior_injection. Imported on the first launch.

All M keys of a head fit into one tile of scores, so there is no loop over keys and no running maximum. A head of D = 72
is held as two tiles of 64 and 16 columns (8 of them used) instead of one of 128: 80 / 72 of the products instead of
128 / 72, and the same for registers.

Heads are the fastest axis of the grid: neighbouring programs read neighbouring 144-byte pieces of the same rows of q,
whose sectors (32 bytes) and cache lines they share in L2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.triton_support import AotSpec, interpreting

LOG2_E = 1.4426950408889634
# Tokens whose contributions to dk and dv one program adds up. Fixed, so that results do not depend on the device; at
# N = 15,360 and 16 heads it makes 480 programs a sample (an H100 has 132 SMs) and 9 MB of partial sums.
CHUNK = 512


def head_tiles(size: int) -> tuple[int, int]:
    """(columns of the first tile, of the second or 0) for heads of ``size``: 72 -> (64, 16), 64 -> (64, 0)."""
    main = max(16, 1 << (size.bit_length() - 1))
    rest = size - main
    return main, 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))


# Triton's interpreter (3.9) keeps bfloat16 as bare 16-bit integers and multiplies them as such in tl.dot.
_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``a @ b + total`` in float32, of operands of the same dtype, in Triton's interpreter too."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _load(base, rows, stride, row_mask, columns, SIZE: tl.constexpr):
    return tl.load(
        base + rows[:, None] * stride + columns[None, :],
        mask=row_mask[:, None] & (columns < SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def _store(base, rows, stride, row_mask, columns, value, SIZE: tl.constexpr):
    tl.store(
        base + rows[:, None] * stride + columns[None, :],
        value.to(base.dtype.element_ty),
        mask=row_mask[:, None] & (columns < SIZE)[None, :],
    )


@triton.jit
def _weights(scores, kept):
    """Softmax over the kept keys of scores in units of log 2; zeros where none is kept, NaN where a score is NaN."""
    scores = tl.where(kept[None, :], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - top[:, None])
    total = tl.sum(weights, axis=1)
    return weights / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _forward(
    q, k, v, mask, out,
    tokens, keys, q_batch, q_token, k_batch, k_head, k_key, v_batch, v_head, v_key, width, scale,
    HAS_MASK: tl.constexpr, SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = rows < tokens
    index = tl.arange(0, KEYS)
    kept = index < keys
    c0 = tl.arange(0, MAIN)
    q += batch * q_batch + head * SIZE
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    out += batch * tokens * width + head * SIZE

    k0 = _load(k, index, k_key, kept, c0, SIZE)
    scores = dot(_load(q, rows, q_token, there, c0, SIZE), tl.trans(k0), None, PRECISION)
    if REST > 0:
        c1 = MAIN + tl.arange(0, REST)
        k1 = _load(k, index, k_key, kept, c1, SIZE)
        scores = dot(_load(q, rows, q_token, there, c1, SIZE), tl.trans(k1), scores, PRECISION)
    if HAS_MASK:
        kept_keys = kept & (tl.load(mask + batch * keys + index, mask=kept, other=0) != 0)
    else:
        kept_keys = kept
    weights = _weights(scores * scale, kept_keys).to(v.dtype.element_ty)
    v0 = _load(v, index, v_key, kept, c0, SIZE)
    _store(out, rows, width, there, c0, dot(weights, v0, None, PRECISION), SIZE)
    if REST > 0:
        c1 = MAIN + tl.arange(0, REST)
        v1 = _load(v, index, v_key, kept, c1, SIZE)
        _store(out, rows, width, there, c1, dot(weights, v1, None, PRECISION), SIZE)


@triton.jit
def _backward(
    dy, q, k, v, mask, dq, partial,
    tokens, keys, dy_batch, dy_token, q_batch, q_token, k_batch, k_head, k_key, v_batch, v_head, v_key, width,
    scale, scale_log2, part_chunk, part_which,
    HAS_MASK: tl.constexpr, SIZE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS_PER_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the tokens of one chunk, and what they add to dk and dv of one head: partial[chunk, 0 or 1, b, h, m, :].

    dk and dv are kept transposed, [D, M]: with D = 64 rows the product is a warp-group one with both operands in shared
    memory, while 32 rows (keys) would hold them in registers, and spill.
    """
    head, chunk, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    dtype = q.dtype.element_ty
    index = tl.arange(0, KEYS)
    kept = index < keys
    c0 = tl.arange(0, MAIN)
    q += batch * q_batch + head * SIZE
    dy += batch * dy_batch + head * SIZE
    dq += batch * tokens * width + head * SIZE
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    k0 = _load(k, index, k_key, kept, c0, SIZE)
    v0 = _load(v, index, v_key, kept, c0, SIZE)
    dk0 = tl.zeros((MAIN, KEYS), tl.float32)
    dv0 = tl.zeros((MAIN, KEYS), tl.float32)
    if REST > 0:
        c1 = MAIN + tl.arange(0, REST)
        k1 = _load(k, index, k_key, kept, c1, SIZE)
        v1 = _load(v, index, v_key, kept, c1, SIZE)
        dk1 = tl.zeros((REST, KEYS), tl.float32)
        dv1 = tl.zeros((REST, KEYS), tl.float32)
    if HAS_MASK:
        kept_keys = kept & (tl.load(mask + batch * keys + index, mask=kept, other=0) != 0)
    else:
        kept_keys = kept

    first = chunk * TOKENS_PER_CHUNK
    for start in range(first, tl.minimum(first + TOKENS_PER_CHUNK, tokens), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there = rows < tokens  # a missing row has dy = 0, so that it adds nothing
        q0 = _load(q, rows, q_token, there, c0, SIZE)
        dy0 = _load(dy, rows, dy_token, there, c0, SIZE)
        scores = dot(q0, tl.trans(k0), None, PRECISION)
        dweights = dot(dy0, tl.trans(v0), None, PRECISION)
        if REST > 0:
            q1 = _load(q, rows, q_token, there, c1, SIZE)
            dy1 = _load(dy, rows, dy_token, there, c1, SIZE)
            scores = dot(q1, tl.trans(k1), scores, PRECISION)
            dweights = dot(dy1, tl.trans(v1), dweights, PRECISION)
        weights = _weights(scores * scale_log2, kept_keys)
        mean = tl.sum(weights * dweights, axis=1)
        dscores = (weights * (dweights - mean[:, None]) * scale).to(dtype)
        weights = weights.to(dtype)
        _store(dq, rows, width, there, c0, dot(dscores, k0, None, PRECISION), SIZE)
        dk0 = dot(tl.trans(q0), dscores, dk0, PRECISION)
        dv0 = dot(tl.trans(dy0), weights, dv0, PRECISION)
        if REST > 0:
            _store(dq, rows, width, there, c1, dot(dscores, k1, None, PRECISION), SIZE)
            dk1 = dot(tl.trans(q1), dscores, dk1, PRECISION)
            dv1 = dot(tl.trans(dy1), weights, dv1, PRECISION)

    heads = tl.num_programs(0)
    partial += chunk * part_chunk + (batch * heads + head) * keys * SIZE
    _store(partial, index, SIZE, kept, c0, tl.trans(dk0), SIZE)
    _store(partial + part_which, index, SIZE, kept, c0, tl.trans(dv0), SIZE)
    if REST > 0:
        _store(partial, index, SIZE, kept, c1, tl.trans(dk1), SIZE)
        _store(partial + part_which, index, SIZE, kept, c1, tl.trans(dv1), SIZE)


def _dense(tensor: Tensor) -> Tensor:
    """Values of one head must lie side by side; any stride will do between tokens, keys, heads and samples."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _constants(k: Tensor, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    main, rest = head_tiles(k.shape[3])
    return {
        "HAS_MASK": mask is not None,
        "SIZE": k.shape[3],
        "MAIN": main,
        "REST": rest,
        "KEYS": max(16, triton.next_power_of_2(k.shape[2])),
        # TF32 would round float32 inputs to 11 bits, far outside the error budget.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _forward_launch(dtype: torch.dtype, keys: int) -> dict[str, int]:
    """Forward: 128 tokens against 32 keys make a program move 37 kB of tokens for 9 kB of keys and values."""
    if dtype == torch.float32:  # products without tensor cores, operands in registers
        return {"BLOCK": 32 if keys <= 32 else 16, "num_warps": 4, "num_stages": 1}
    return {"BLOCK": 128 if keys <= 64 else 64, "num_warps": 4, "num_stages": 1}  # no loop to pipeline


def _backward_launch(dtype: torch.dtype, keys: int) -> dict[str, int]:
    """Backward: dk and dv of all keys stay in registers, which are shared by more warps where there are more keys."""
    warps = 4 if keys <= 32 else 8
    if dtype == torch.float32:
        return {"BLOCK": 16, "num_warps": warps, "num_stages": 1}
    return {"BLOCK": 64 if keys <= 64 else 32, "num_warps": warps, "num_stages": 2}  # two stages hide the loads


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The op ``javis::prior_injection``."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    mask = None if mask is None else mask.contiguous()
    batch, tokens, width = q.shape
    heads, keys, size = k.shape[1:]
    out = torch.empty((batch, tokens, width), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    launch = _forward_launch(q.dtype, keys)
    grid = (heads, triton.cdiv(tokens, launch["BLOCK"]), batch)
    _forward[grid](
        q, k, v, mask, out, tokens, keys, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], width,
        size**-0.5 * LOG2_E, **_constants(k, mask, q.dtype), **launch,
    )  # fmt: skip
    return out


def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``javis::prior_injection_backward``."""
    dy, q, k, v = _dense(dy), _dense(q), _dense(k), _dense(v)
    mask = None if mask is None else mask.contiguous()
    batch, tokens, width = q.shape
    heads, keys, size = k.shape[1:]
    dq = torch.empty((batch, tokens, width), dtype=q.dtype, device=q.device)
    chunks = triton.cdiv(tokens, CHUNK)
    partial = torch.empty((chunks, 2, batch, heads, keys, size), dtype=torch.float32, device=q.device)
    if partial.numel():
        launch = _backward_launch(q.dtype, keys)
        _backward[(heads, chunks, batch)](
            dy, q, k, v, mask, dq, partial,
            tokens, keys, dy.stride(0), dy.stride(1), q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], width,
            size**-0.5, size**-0.5 * LOG2_E, partial.stride(0), partial.stride(1),
            **_constants(k, mask, q.dtype), TOKENS_PER_CHUNK=CHUNK, **launch,
        )  # fmt: skip
    # The second stage; PyTorch adds in a fixed order. Two sums: the results of an op may not share memory.
    return dq, partial[:, 0].sum(0).to(k.dtype), partial[:, 1].sum(0).to(v.dtype)


def aot_specs() -> list[AotSpec]:
    """The full-size model: C = 1152, D = 72, 32 keys (64: the union of a guided pair), bfloat16; and float32."""
    specs = []
    sizes = ("tokens", "keys")
    strides = ("q_batch", "q_token", "k_batch", "k_head", "k_key", "v_batch", "v_head", "v_key", "width")
    for dtype, code in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for keys in (32, 64):
            fixed = _constants(torch.empty(1, 16, keys, 72, device="meta"), None, dtype) | {"mask": None}
            launches = {"forward": _forward_launch(dtype, keys), "backward": _backward_launch(dtype, keys)}
            arguments = {
                "forward": {
                    **dict.fromkeys(("q", "k", "v", "mask", "out"), code),
                    **dict.fromkeys((*sizes, *strides), "i32"),
                    "scale": "fp32",
                },
                "backward": {
                    **dict.fromkeys(("dy", "q", "k", "v", "mask", "dq"), code),
                    "partial": "*fp32",
                    **dict.fromkeys((*sizes, "dy_batch", "dy_token", *strides), "i32"),
                    "scale": "fp32",
                    "scale_log2": "fp32",
                    **dict.fromkeys(("part_chunk", "part_which"), "i32"),
                },
            }
            for way, kernel in (("forward", _forward), ("backward", _backward)):
                constants = fixed | {"BLOCK": launches[way]["BLOCK"]}
                if way == "backward":
                    constants["TOKENS_PER_CHUNK"] = CHUNK
                specs.append(
                    AotSpec(
                        name=f"{way} D=72 M={keys} {code[1:]}",
                        kernel=kernel,
                        signature=arguments[way] | dict.fromkeys(constants, "constexpr"),
                        constants=constants,
                        num_warps=launches[way]["num_warps"],
                        num_stages=launches[way]["num_stages"],
                        # The number of keys itself, and the stride of a key inside packed keys and values, are 32 n.
                        aligned=tuple(n for n, kind in arguments[way].items() if kind != "fp32" and n not in constants),
                        default=dtype == torch.bfloat16,
                    )
                )
    return specs
