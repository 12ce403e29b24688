"""The computation of the official JavisDiT with our own weights and code: what it costs to do it that way.

``as_upstream(model)`` turns a JavisDiT into one that computes as the official code does where that costs most:

- The prior tokens are repeated, the spatial ones for every frame and the temporal ones for every place, projected to
  keys and values in all their copies, and, as no mask is given, attended to as *one* sequence over the whole batch:
  B*T*S queries by B*T*Ms and by B*S*Mt keys. At 512x512 with guidance that is 30,720 queries by 65,536 keys.
- The streams are copied into [B*S, T, C] before temporal attention and priors, and back after each.
- Queries and keys are normalised and rotated by one elementwise operation after another.

What depends on the prompt alone is computed in every step: time ``model(...)``, which is ``condition`` and ``denoise``.
Where the official code has a choice of attention, this takes PyTorch's fused one, so the baseline is a kind one.

A softmax over n equal copies of the keys equals the softmax over one, so at batch 1 the result is that of our model; in
a larger batch every sample attends to the priors of all (our ``prior_scope="batch"``).
tests/test_upstream_equivalent.py holds both against our model and against a recorded run of the official code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.model.blocks import PriorAttention, SelfAttention
from javis.model.config import PriorScope
from javis.model.dit import JavisDiT
from javis.model.ops import Rope


def as_upstream(model: JavisDiT) -> JavisDiT:
    """Make ``model`` compute as the official code does, in place: same parameters, other forward passes."""
    for module in model.modules():
        if type(module) is PriorAttention and module.mode == "cross_attn":
            module.__class__ = UpstreamPriorAttention
        elif type(module) is SelfAttention:
            module.__class__ = UpstreamSelfAttention
    return model


def places_first(x: Tensor, frames: int) -> Tensor:
    """[B, T*S, C] -> a copy [B*S, T, C]."""
    return x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def frames_first(x: Tensor, batch: int) -> Tensor:
    """[B*S, T, C] -> a copy [B, T*S, C]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2).contiguous()


class UpstreamPriorAttention(PriorAttention):
    """Prior tokens repeated for every frame or place, and one softmax over all copies of all samples."""

    def condition(self, tokens: Tensor, length: int, scope: PriorScope) -> Tensor:
        """Nothing is done once per clip. ``scope`` has no say: the official code sees the whole batch."""
        return tokens

    def forward(self, y: Tensor, told: Tensor, frames: int, spatial: bool) -> Tensor:  # type: ignore[override]
        batch, tokens, width = y.shape
        copies = frames if spatial else tokens // frames
        x = y if spatial else places_first(y, frames)
        repeated = told.repeat_interleave(copies, dim=0)  # [B*T or B*S, M, C]
        heads = self.attn.heads
        q = self.attn.q(x).view(1, batch * tokens, heads, -1).transpose(1, 2)
        k, v = self.attn.kv(repeated).view(1, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out = self.attn.proj(out)
        return out if spatial else frames_first(out, batch)


class UpstreamSelfAttention(SelfAttention):
    """The stream is rearranged before the projection and after it; q and k are normalised and rotated step by step."""

    def forward(self, x: Tensor, frames: int, rope: Rope) -> Tensor:
        batch, temporal = len(x), self.axis == "temporal"
        rows = places_first(x, frames) if temporal else x.unflatten(1, (frames, -1)).flatten(0, 1)
        q, k, v = self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm.weight), rms_norm(k, self.k_norm.weight)
        if temporal:
            q, k = rotate(q, rope), rotate(k, rope)
        out = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return frames_first(out, batch) if temporal else out.reshape(batch, -1, out.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Over the last axis, in float32 (float64 for float64), as separate operations."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Interleaved RoPE as ``x * cos + swapped(x) * sin`` over the full width."""
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in rope)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin).to(x.dtype)
