"""Model operations for training on CPU under bf16 autocast.

Matrix products run in bf16 (about five times faster than float32 where the CPU has AVX512-BF16). Attention runs in
float32: the bf16 backward of the CPU's fused attention was five times slower than its float32 one (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from javis.model import ops
from javis.model.ops import ModelOps


def _in_float32(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        def wide(x: Any) -> Any:
            return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x

        with torch.autocast("cpu", enabled=False):
            return op(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})

    return run


def cpu_training_ops() -> ModelOps:
    """Plain PyTorch ops with attention in float32 whatever the autocast dtype."""
    return ModelOps(
        factorized_attention=_in_float32(ops.factorized_attention),
        text_cross_attention=_in_float32(ops.cross_attention),
        prior_injection=_in_float32(ops.cross_attention),
        bidirectional_attention=_in_float32(ops.bidirectional_attention),
    )
