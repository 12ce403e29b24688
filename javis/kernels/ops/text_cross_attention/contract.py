"""The native attention and the flash_attn package, which loads on the first call that names it, as backends."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.kernels import dense_attention


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn") is not None
    except ModuleNotFoundError:  # an import hook hides it
        return False


HAS_FLASH_ATTN = _installed()


def _tokens_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, N, H, D] and [B, L, H, D]."""
    return q.unflatten(-1, (k.shape[1], k.shape[3])), k.transpose(1, 2), v.transpose(1, 2)


def why_not_cpu(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    """Why the native attention cannot take this call, or None."""
    return dense_attention.why_not(q, k, v)


def why_not_cpu_auto(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    """Why ``auto`` leaves to PyTorch what the native attention could compute, or None."""
    return dense_attention.why_not_auto(q, k, v)


why_not_cpu.why_not_auto = why_not_cpu_auto  # type: ignore[attr-defined]


def attention_native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The native attention on arguments that ``why_not_cpu`` has accepted."""
    return dense_attention.dense_attention(*_tokens_first(q, k, v), mask).flatten(2)


def why_not_flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why flash_attn cannot take this call, or None."""
    if not HAS_FLASH_ATTN:
        return "flash_attn is not installed (pip install 'javis[gpu]')"
    if q.device.type != "cuda":
        return f"needs a CUDA device, got {q.device}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if k.shape[3] > 256 or k.shape[3] % 8:
        return f"needs a head size that is a multiple of 8 up to 256, got {k.shape[3]}"
    if mask is not None and torch.compiler.is_compiling():
        return "packed captions have shapes that depend on data, which cannot be compiled: use sdpa"
    return None


def attention_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """flash_attn on arguments that ``why_not_flash_attn`` has accepted.

    With a mask the valid keys of all samples are packed one after the other. How many there are is known on the device
    alone, so every call waits for it, which is why ``auto`` prefers sdpa.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    heads, size = k.shape[1], k.shape[3]
    queries, keys, values = q.unflatten(-1, (heads, size)), k.transpose(1, 2), v.transpose(1, 2)  # [B, N or L, H, D]
    if mask is None or q.numel() == 0:
        return flash_attn_func(queries, keys, values).flatten(2)  # type: ignore[no-any-return]
    batch, tokens = q.shape[:2]
    lengths = mask.sum(dim=1, dtype=torch.int32)
    ends = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        queries.flatten(0, 1), keys[mask], values[mask], starts, ends, tokens, int(lengths.max())
    )
    return out.unflatten(0, (batch, tokens)).flatten(2)  # type: ignore[no-any-return]
