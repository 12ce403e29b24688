"""Kernels that show what the gates of javis.kernels.aot see. Imported without TRITON_INTERPRET only."""

from __future__ import annotations

import triton
import triton.language as tl

from javis.kernels.triton_support import AotSpec


@triton.jit
def row_sum(x_ptr, y_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.sum(x, 0))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, steps, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        at = index + step * SIZE * SIZE
        total = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), total)
    tl.store(c_ptr + index, total)


def row_sum_spec(block: int = 512, **change: object) -> AotSpec:
    """A small kernel in which nothing is wrong, unless ``change`` says otherwise."""
    fields: dict[str, object] = {
        "name": f"row_sum {block}",
        "kernel": row_sum,
        "signature": {"x_ptr": "*bf16", "y_ptr": "*fp32", "columns": "i32", "BLOCK": "constexpr"},
        "constants": {"BLOCK": block},
        "aligned": ("x_ptr", "y_ptr", "columns"),
    }
    return AotSpec(**(fields | change))  # type: ignore[arg-type]


def product_spec(stages: int = 2, warps: int = 8, default: bool = True) -> AotSpec:
    """Two tiles of 128 x 128 in bf16 are 64 KiB for each stage; the sums are 512 registers a thread with one warp."""
    return AotSpec(
        name=f"product, {stages} stages, {warps} warps",
        kernel=product,
        signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "steps": "i32", "SIZE": "constexpr"},
        constants={"SIZE": 128},
        num_warps=warps,
        num_stages=stages,
        aligned=("a_ptr", "b_ptr", "c_ptr"),
        default=default,
    )
