"""Triton kernel of folded_prior_injection: y @ A with the softmax of every head in the epilogue.

A tile of scores holds whole groups of M columns, so the softmax needs nothing from other tiles, and the scores stay in
float32 registers: they are neither rounded nor written to memory. The second product is the library's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from javis.kernels.triton_support import AotSpec, interpreting

# Triton's interpreter (3.9) keeps bfloat16 as bare 16-bit integers and multiplies them as such in tl.dot.
_INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def _weights(
    y, weight, bias, out,
    tokens, width, keys, groups, y_batch, y_token, y_value, w_batch, w_row, w_column,
    KEYS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, n, g * keys + m] for BLOCK tokens and GROUPS groups, each padded to KEYS columns of the tile."""
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, GROUPS * KEYS)
    group, key = tl.program_id(0) * GROUPS + index // KEYS, index % KEYS
    columns = group * keys + key
    row_there, column_there = rows < tokens, (group < groups) & (key < keys)
    depth = tl.arange(0, DEPTH)
    y += batch * y_batch
    weight += batch * w_batch
    total = tl.zeros((BLOCK, GROUPS * KEYS), tl.float32)
    for start in range(0, width, DEPTH):
        inside = start + depth < width
        a = tl.load(
            y + rows[:, None] * y_token + (start + depth)[None, :] * y_value,
            mask=row_there[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + (start + depth)[:, None] * w_row + columns[None, :] * w_column,
            mask=inside[:, None] & column_there[None, :],
            other=0.0,
        )
        if _INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    total += tl.load(bias + batch * groups * keys + columns, mask=column_there, other=float("-inf"))[None, :]
    scores = tl.reshape(total, (BLOCK, GROUPS, KEYS))
    top = tl.max(scores, axis=2)
    top = tl.where(top == float("-inf"), 0.0, top)  # all keys removed: all weights 0
    scores = tl.exp2((scores - top[:, :, None]) * 1.4426950408889634)
    sums = tl.sum(scores, axis=2)
    scores = scores / tl.where(sums == 0.0, 1.0, sums)[:, :, None]
    tl.store(
        out + (batch * tokens + rows)[:, None] * (groups * keys) + columns[None, :],
        tl.reshape(scores, (BLOCK, GROUPS * KEYS)).to(out.dtype.element_ty),
        mask=row_there[:, None] & column_there[None, :],
    )


def _launch(dtype: torch.dtype, keys: int) -> dict[str, Any]:
    """Tiles of 128 x 128: with 512 columns and 15,360 tokens 480 programs, two at a time on each of 132 SMs.

    Eight warps, so that the softmax has registers beside the 64 of the accumulator; three stages of 32 kB, so that two
    programs share an SM and one computes while the other is in its epilogue.
    """
    padded = max(16, triton.next_power_of_2(keys))
    if dtype == torch.float32:  # products without tensor cores; TF32 would leave the error budget
        return {"KEYS": padded, "GROUPS": max(1, 64 // padded), "BLOCK": 32, "DEPTH": 32, "PRECISION": "ieee",
                "num_warps": 4, "num_stages": 2}  # fmt: skip
    return {"KEYS": padded, "GROUPS": max(1, 128 // padded), "BLOCK": 128, "DEPTH": 64, "PRECISION": "tf32",
            "num_warps": 8, "num_stages": 3}  # fmt: skip


def weights(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, heads: int) -> Tensor:
    """The op ``javis::folded_prior_weights``: [B, N, H * M], softmax per head."""
    batch, tokens, width = y.shape
    columns = scores_weight.shape[2]
    out = torch.empty((batch, tokens, columns), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    bias = scores_bias.float().contiguous()
    keys = columns // heads
    launch = _launch(y.dtype, keys)
    grid = (triton.cdiv(heads, launch["GROUPS"]), triton.cdiv(tokens, launch["BLOCK"]), batch)
    _weights[grid](
        y, scores_weight, bias, out, tokens, width, keys, heads, *y.stride(), *scores_weight.stride(), **launch
    )
    return out


def aot_specs() -> list[AotSpec]:
    """The full-size model: C = 1152, 16 heads, 32 keys (64: the union of a guided pair), bfloat16; and float32."""
    specs = []
    sizes = ("tokens", "width", "keys", "groups", "y_batch", "y_token", "w_batch", "w_row")
    for dtype, code in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for keys in (32, 64):
            launch = _launch(dtype, keys)
            warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
            constants = launch | {"y_value": 1, "w_column": 1}  # what a launch makes of a stride of 1
            specs.append(
                AotSpec(
                    name=f"weights C=1152 M={keys} {code[1:]}",
                    kernel=_weights,
                    signature=dict.fromkeys(("y", "weight", "out"), code)
                    | {"bias": "*fp32"}
                    | dict.fromkeys(sizes, "i32")
                    | dict.fromkeys(constants, "constexpr"),
                    constants=constants,
                    num_warps=warps,
                    num_stages=stages,
                    aligned=("y", "weight", "bias", "out", *sizes),
                    default=dtype == torch.bfloat16,
                )
            )
    return specs
