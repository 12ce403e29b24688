"""prior_injection: every token attends to the few prior tokens of its sample (JavisDiT, arXiv 2503.23377, section 3.3).

    o[b, n, h, :] = sum_m softmax_m( q[b, n, h, :] . k[b, h, m, :] / sqrt(D) ) v[b, h, m, :]

The keys are the *unique* prior tokens. The official code repeats the spatial ones once per frame and the temporal ones
once per place; a softmax over n equal copies equals the softmax over one, so both axes are this one function. This is
the training form; sampling folds the projections into keys and values (ops/folded_prior_injection).

Read next: reference.py (the maths), contract.py (what torch.compile sees), triton_impl.py (the kernels).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.prior_injection import contract
from javis.kernels.ops.prior_injection.reference import cross_attention_ref

CHECKS: dict[Backend, Check] = {
    Backend.TRITON: contract.why_not_triton_kernel,
    Backend.SDPA: contract.why_not_sdpa,
    Backend.REFERENCE: lambda *_: None,
}


def prior_injection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Return softmax attention of every token to the unique keys of its sample, accumulated in float32.

    Args:
        q: queries, [B, N, C] with C = H * D, head by head.
        k, v: keys and values, [B, H, M, D], in the dtype of ``q`` (under autocast any); M is 32 at official size.
        mask: bool [B, M], False = removed key, which must still hold finite numbers. None: all are there. A sample
            without a key gets zeros.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        [B, N, C] in the dtype of ``q``, differentiable in q, k and v.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    contract.validate(q, k, v, mask)
    chosen = select("prior_injection", CHECKS, q, k, v, mask, backend=backend)
    if chosen is Backend.TRITON:
        return contract.prior_injection_triton(q, k, v, mask)
    if chosen is Backend.SDPA:
        return contract.attention_sdpa(q, k, v, mask)
    return cross_attention_ref(q, k, v, mask=mask)
