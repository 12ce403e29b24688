"""Calls of text_cross_attention that are tested and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from javis.kernels.ops.prior_injection.cases import CrossAttentionCase


@dataclass(frozen=True, kw_only=True)
class TextCrossAttentionCase(CrossAttentionCase):
    """Tokens [batch, tokens, heads * size] over captions of up to ``keys`` tokens."""

    op: str = field(default="text_cross_attention", init=False)


def cases() -> list[TextCrossAttentionCase]:
    """Shapes of the full-size model (2 s clips, captions of at most 300 tokens) and of the built-in one."""
    sizes: dict[str, dict[str, Any]] = {
        "video-512x512": {"tokens": 15 * 1024, "keys": 300, "masked": True},
        "video-512x512-trimmed": {"tokens": 15 * 1024, "keys": 40},  # a prompt of 40 tokens, cut by condition
        "audio-2s": {"tokens": 224, "keys": 300, "masked": True},
        "demo": {"batch": 2, "tokens": 1024, "keys": 24, "heads": 4, "size": 32, "masked": True},
    }
    return [
        TextCrossAttentionCase(name=f"{name}-{str(dtype).removeprefix('torch.')}", dtype=dtype, **size)
        for name, size in sizes.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]
