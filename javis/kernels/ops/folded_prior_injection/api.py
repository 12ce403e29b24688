"""folded_prior_injection: what ``out(prior_injection(q(y), k, v))`` computes, in two products and a softmax.

    s[b, n, :]         = y[b, n, :] A[b] + a[b]               A_h = Wq_h K_h^T / sqrt(D), a_h = bq_h K_h^T / sqrt(D)
    o[b, n, :]         = sum_h softmax(s[b, n, h, :]) U[b, h]  U_h = V_h Wo_h + bo / H

The prior block has no norm between the projections, and its keys and values do not depend on the timestep: a clip pays
for A and U once (``fold_prior``), a step for 2 H M columns instead of 2 C and the attention. docs/kernels/
folded_prior_injection.md derives it and says when it wins.

Read next: reference.py (the maths and ``fold_prior``), contract.py, csrc/cpu/group_softmax_rows.cpp, triton_impl.py.
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.folded_prior_injection import contract
from javis.kernels.ops.folded_prior_injection.reference import FoldedPrior, fold_prior, folded_prior_injection_ref
from javis.kernels.ops.prior_injection.contract import autocasting

__all__ = ["CHECKS", "FoldedPrior", "fold_prior", "folded_prior_injection"]

CHECKS: dict[Backend, Check] = {
    Backend.TRITON: contract.why_not_triton_kernel,
    Backend.CPU: contract.why_not_cpu,
    Backend.REFERENCE: lambda *_: None,
}


def folded_prior_injection(
    y: Tensor,
    scores_weight: Tensor,
    scores_bias: Tensor,
    value: Tensor,
    *,
    heads: int,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Return ``softmax per head of (y @ scores_weight + scores_bias) @ value``.

    Args:
        y: tokens, [B, N, C].
        scores_weight: [B, C, H * M] and value: [B, H * M, C], in the dtype of ``y`` (under autocast any).
        scores_bias: [B, H * M], any floating dtype; -inf removes a key.
        heads: H, the number of groups of M neighbouring columns that a softmax runs over.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        [B, N, C] in the dtype of ``y``. Only the reference is differentiable: this is the form for sampling.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    _validate(y, scores_weight, scores_bias, value, heads)
    chosen = select("folded_prior_injection", CHECKS, y, scores_weight, scores_bias, value, heads, backend=backend)
    if chosen is Backend.TRITON:
        return contract.folded_triton(y, scores_weight, scores_bias, value, heads)
    if chosen is Backend.CPU:
        return contract.folded_native(y, scores_weight, scores_bias, value, heads)
    return folded_prior_injection_ref(y, scores_weight, scores_bias, value, heads=heads)


def _validate(y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, heads: int) -> None:
    if y.ndim != 3 or not y.dtype.is_floating_point:
        raise ValueError(f"y must be a floating-point [B, N, C], got {y.dtype} {tuple(y.shape)}")
    batch, _, width = y.shape
    fits = scores_weight.ndim == 3 and scores_weight.shape[:2] == (batch, width)
    if not fits or heads < 1 or scores_weight.shape[2] == 0 or scores_weight.shape[2] % heads:
        raise ValueError(
            f"scores_weight must be [{batch}, {width}, H * M] with H = heads = {heads} and M > 0, got "
            f"{tuple(scores_weight.shape)}"
        )
    columns = scores_weight.shape[2]
    if scores_bias.shape != (batch, columns) or not scores_bias.dtype.is_floating_point:
        raise ValueError(
            f"scores_bias must be a floating-point [{batch}, {columns}], got {scores_bias.dtype} "
            f"{tuple(scores_bias.shape)}"
        )
    if value.shape != (batch, columns, width):
        raise ValueError(f"value must be [{batch}, {columns}, {width}], got {tuple(value.shape)}")
    for name, tensor in (("scores_weight", scores_weight), ("value", value)):
        if tensor.dtype != y.dtype and not autocasting(y):
            raise ValueError(f"{name} must have the dtype of y, {y.dtype}, got {tensor.dtype}")
