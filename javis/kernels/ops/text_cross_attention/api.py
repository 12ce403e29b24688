"""text_cross_attention: every token attends to the valid tokens of its sample's caption.

    o[b, n, h, :] = sum_l softmax_l( q[b, n, h, :] . k[b, h, l, :] / sqrt(D) ) v[b, h, l, :]     over l with mask[b, l]

On a GPU a library's attention: captions are long enough (up to 300 tokens) for it, and there is nothing to fuse. On a
CPU one of our own (../../dense_attention.py), or PyTorch's where a gradient is wanted.

Read next: reference.py (the maths), contract.py (native, libraries), and ``JavisDiT.condition``, which drops tokens
that no sample has before they ever get here.
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.prior_injection.contract import attention_sdpa, validate, why_not_sdpa
from javis.kernels.ops.text_cross_attention import contract
from javis.kernels.ops.text_cross_attention.reference import text_cross_attention_ref

CHECKS: dict[Backend, Check] = {
    Backend.CPU: contract.why_not_cpu,
    Backend.SDPA: why_not_sdpa,
    Backend.FLASH_ATTN: contract.why_not_flash_attn,
    Backend.REFERENCE: lambda *_: None,
}


def text_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Return softmax attention of every token to the caption of its sample, accumulated in float32.

    Args:
        q: queries, [B, N, C] with C = H * D, head by head.
        k, v: keys and values, [B, H, L, D], in the dtype of ``q`` (under autocast any).
        mask: bool [B, L], False = no token, which must still hold finite numbers. None: all are there. A sample without
            a token gets zeros.
        backend: ``"auto"`` picks the fastest that needs no synchronisation; any other value runs or raises.

    Returns:
        [B, N, C] in the dtype of ``q``, differentiable in q, k and v.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    validate(q, k, v, mask)
    chosen = select("text_cross_attention", CHECKS, q, k, v, mask, backend=backend)
    if chosen is Backend.CPU:
        return contract.attention_native(q, k, v, mask)
    if chosen is Backend.FLASH_ATTN:
        return contract.attention_flash(q, k, v, mask)
    if chosen is Backend.SDPA:
        return attention_sdpa(q, k, v, mask)
    return text_cross_attention_ref(q, k, v, mask=mask)
