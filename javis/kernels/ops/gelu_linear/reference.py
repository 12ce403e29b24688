"""The maths of gelu_linear in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and result as in api.py.

    The product is the library's, in the dtype of ``x``: it accumulates in float32 and rounds once, and a product in
    float32 would take ten times as long on a GPU. GELU computes in float32 inside and rounds once.
    """
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
