"""What PyTorch's convolutions on a CPU hold beside their inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cpu_workspace(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    out: Tensor,
) -> int:
    """Bytes that PyTorch's convolution on a CPU holds beside its inputs and its output (2.13, float32).

    oneDNN copies input and weights into layouts of its own; small convolutions (ConvParams::use_mkldnn of ATen) unfold
    their input instead. Transposed ones are not counted.
    """
    if transposed or x.dtype != torch.float32:
        return 0
    sizes, kernel = list(x.shape), list(weight.shape[2:])
    if x.ndim == 3:  # computed as an image of height 1
        sizes, kernel = [*sizes[:2], 1, sizes[2]], [1, *kernel]
    pointwise = kernel[-1] == 1 and kernel[-2] == 1
    special = any(n > 1 for n in (*stride, *dilation)) or sizes[0] >= 16 or torch.get_num_threads() > 1
    large = groups > 1 or min(kernel[-2:]) > 3 or sizes[0] > 1 or math.prod(sizes[:4]) > 20480
    if (special or not pointwise) and large:
        return x.nbytes + weight.nbytes
    return 0 if math.prod(kernel) == 1 else math.prod(weight.shape[1:]) * math.prod(out.shape[2:]) * x.itemsize
