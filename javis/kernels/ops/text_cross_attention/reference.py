"""The maths of text_cross_attention in plain PyTorch: that of prior_injection. No kernel imports this file."""

from __future__ import annotations

from javis.kernels.ops.prior_injection.reference import cross_attention_ref as text_cross_attention_ref

__all__ = ["text_cross_attention_ref"]
