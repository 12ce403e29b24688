"""The maths of folded_prior_injection in plain PyTorch. No kernel imports this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FoldedPrior(NamedTuple):
    """Keys and values of a clip's prior with the projections of queries and outputs in them; see ``fold_prior``."""

    scores_weight: Tensor  # [B, C, H * M]
    scores_bias: Tensor  # [B, H * M], float32 or wider
    value: Tensor  # [B, H * M, C]


def fold_prior(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
) -> FoldedPrior:
    """Fold ``Linear_out(attention(Linear_q(y), k, v))`` into two matrices per sample, once per clip.

    Computed in float32 (float64 for float64) and rounded once to the dtype of ``q_weight``.

    Args:
        k, v: keys and values, [B, H, M, D].
        q_weight, out_weight: [C, C] with C = H * D, as ``nn.Linear`` keeps them; q_bias, out_bias: [C] or None.
        mask: bool [B, M], False = removed key. None: all are there.
    """
    batch, heads, keys, size = k.shape
    dtype = q_weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        k, v, q_weight, out_weight = (x.to(wide) for x in (k * size**-0.5, v, q_weight, out_weight))
        per_head = q_weight.unflatten(0, (heads, size))  # [H, D, C]
        weight = (k @ per_head).flatten(1, 2).mT  # [B, H, M, C] -> [B, C, H * M]
        if q_bias is None:
            bias = weight.new_zeros(batch, heads * keys)
        else:
            bias = (k @ q_bias.to(wide).view(heads, size, 1)).flatten(1)
        value = v @ out_weight.t().unflatten(0, (heads, size))  # [B, H, M, C]
        if out_bias is not None:  # the weights of a head add up to 1, so one H-th of it in every row gives all of it
            value = value + out_bias.to(wide) / heads
        value = value.flatten(1, 2)
        if mask is not None:
            told = mask.any(dim=-1, keepdim=True)
            removed = (told & ~mask).repeat(1, heads)
            bias = bias.masked_fill(removed, float("-inf"))
            # A sample without keys attends to nothing, which leaves the bias of the output projection.
            nothing = value.new_zeros(value.shape[-1]) if out_bias is None else out_bias.to(wide) / heads
            value = torch.where(told[:, :, None], value, nothing)
    return FoldedPrior(weight.to(dtype).contiguous(), bias, value.to(dtype).contiguous())


def folded_prior_injection_ref(
    y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, *, heads: int
) -> Tensor:
    """Arguments and result as in api.py. Products in the dtype of ``y``, as the library does them; softmax wide."""
    wide = torch.promote_types(y.dtype, torch.float32)
    scores = (y @ scores_weight).to(wide) + scores_bias.to(wide)[:, None]
    weights = scores.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)
    return weights.to(value.dtype) @ value
