"""The operations of the model as a record of callables, with plain PyTorch defaults.

Blocks call ``self.ops.<op>(...)``, so the whole model runs without a single kernel; ``javis.kernels`` offers the same
signatures. Shapes: B batch, T time, S space (frequency for audio), N = T*S tokens, C width, H heads, D head size.
Low-precision inputs are normalised in float32 inside and returned in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def per_frame(on: Tensor, off: Tensor | None, frame_mask: Tensor | None) -> Tensor:
    """Spread [B, C] over frames: ``on`` where the mask is True, else ``off`` -> [B, T or 1, 1, C]."""
    if frame_mask is None:
        return on[:, None, None]
    if off is None:
        raise ValueError("a frame mask needs the modulation of timestep 0 beside that of timestep t")
    return torch.where(frame_mask[:, :, None], on[:, None], off[:, None])[:, :, None]


def _frames(x: Tensor, frame_mask: Tensor | None) -> Tensor:
    frames = 1 if frame_mask is None else frame_mask.shape[1]
    return x.reshape(x.shape[0], frames, -1, x.shape[-1])


def ada_layer_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` without affine parameters (adaLN, DiT).

    Args:
        x: tokens, [B, N, C] in (time, space) order.
        shift, scale: modulation of timestep t, [B, C].
        shift0, scale0: modulation of timestep 0, [B, C]; for frames whose ``frame_mask`` is False.
        frame_mask: bool [B, T], True = noisy frame. None: all frames are.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = _frames(F.layer_norm(x.to(wide), x.shape[-1:], eps=eps), frame_mask)
    y = y * (1 + per_frame(scale, scale0, frame_mask)) + per_frame(shift, shift0, frame_mask)
    return y.reshape(x.shape).to(x.dtype)


def gated_residual(
    x: Tensor, h: Tensor, gate: Tensor | None, *, gate0: Tensor | None = None, frame_mask: Tensor | None = None
) -> Tensor:
    """``x + gate * h`` with x, h [B, N, C] and gate [B, C] (None: 1); ``gate0`` for frames whose mask is False."""
    if gate is None:
        return x + h
    y = _frames(x, frame_mask) + per_frame(gate, gate0, frame_mask) * _frames(h, frame_mask)
    return y.reshape(x.shape).to(x.dtype)


def gated_residual_ada_layer_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    gate0: Tensor | None = None,
    shift0: Tensor | None = None,
    scale0: Tensor | None = None,
    frame_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Residual update and the next adaLN: ``r = x + gate * h``; returns ``(r, LayerNorm(r) * (1 + scale) + shift)``."""
    r = gated_residual(x, h, gate, gate0=gate0, frame_mask=frame_mask)
    return r, ada_layer_norm(r, shift, scale, shift0=shift0, scale0=scale0, frame_mask=frame_mask, eps=eps)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate interleaved pairs (2i, 2i+1) of the last axis. x [..., L, D]; rope = (cos, sin), each [L, D/2]."""
    cos, sin = rope
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def factorized_attention(
    qkv: Tensor,
    axis: str,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: Rope | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Self-attention along one axis of packed projections, with per-head RMS norm of q and k and RoPE.

    Args:
        qkv: [B, T, S, 3, H, D].
        axis: "temporal" (over T, for each place) or "spatial" (over S, in each frame).
        q_weight, k_weight: RMS norm weights, [D]; None: no norm.
        rope: (cos, sin), each [length of the axis, D/2]; None: no rotation.

    Returns:
        [B, T*S, H*D].
    """
    batch, frames, places, _, heads, size = qkv.shape
    order = (3, 0, 1, 4, 2, 5) if axis == "spatial" else (3, 0, 2, 4, 1, 5)
    q, k, v = qkv.permute(order).flatten(1, 2).unbind(0)  # each [B*T, H, S, D] or [B*S, H, T, D]
    if q_weight is not None and k_weight is not None:
        q, k = F.rms_norm(q, (size,), q_weight, eps), F.rms_norm(k, (size,), k_weight, eps)
    if rope is not None:
        q, k = apply_rope(q, rope), apply_rope(k, rope)
    out = F.scaled_dot_product_attention(q, k, v)
    if axis == "spatial":
        out = out.unflatten(0, (batch, frames)).permute(0, 1, 3, 2, 4)
    else:
        out = out.unflatten(0, (batch, places)).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, frames * places, heads * size)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Attention of tokens q [B, N, C] over keys and values [B, H, M, D]; mask bool [B, M], False = removed.

    Serves the caption (``text_cross_attention``) and, with unique keys, the priors (``prior_injection``).
    """
    batch, tokens, width = q.shape
    heads, size = k.shape[1], k.shape[3]
    q = q.view(batch, tokens, heads, size).transpose(1, 2)
    bias = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).reshape(batch, tokens, width)


class FoldedPrior(NamedTuple):
    """One prior attention of a clip with the projections of queries and outputs in its keys and values."""

    scores_weight: Tensor  # [B, C, H * M]
    scores_bias: Tensor  # [B, H * M], float32 or wider
    value: Tensor  # [B, H * M, C]


def fold_prior(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> FoldedPrior:
    """Fold ``out(prior_injection(q(y), k, v))`` into ``folded_prior_injection(y, *folded)``: exact algebra.

    ``A_h = Wq_h K_h^T / sqrt(D)``, ``a_h = bq_h K_h^T / sqrt(D)``, ``U_h = V_h Wo_h + bo / H`` (the weights of a head
    add up to 1, so every head brings its share of bo). Computed in float32 and rounded once.

    Args:
        k, v: [B, H, M, D].
        q_weight, out_weight: [C, C] with C = H * D, as ``nn.Linear`` keeps them; q_bias, out_bias: [C].
    """
    heads, size = k.shape[1], k.shape[3]
    dtype = q_weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu" if k.is_meta else k.device.type, enabled=False):
        k, v, q_weight, q_bias, out_weight, out_bias = (
            x.to(wide) for x in (k * size**-0.5, v, q_weight, q_bias, out_weight, out_bias)
        )
        weight = (k @ q_weight.unflatten(0, (heads, size))).flatten(1, 2).mT
        bias = (k @ q_bias.view(heads, size, 1)).flatten(1)
        value = (v @ out_weight.t().unflatten(0, (heads, size)) + out_bias / heads).flatten(1, 2)
    return FoldedPrior(weight.to(dtype).contiguous(), bias, value.to(dtype).contiguous())


def folded_prior_injection(
    y: Tensor, scores_weight: Tensor, scores_bias: Tensor, value: Tensor, *, heads: int
) -> Tensor:
    """Prior attention with its projections folded in (see ``fold_prior``), [B, N, C] -> [B, N, C]; for sampling."""
    scores = torch.promote_types(y.dtype, torch.float32)
    weights = ((y @ scores_weight).to(scores) + scores_bias[:, None]).unflatten(-1, (heads, -1)).softmax(-1)
    return weights.flatten(-2).to(y.dtype) @ value


def bidirectional_attention(
    q_video: Tensor, q_audio: Tensor, v_video: Tensor, v_audio: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """One score matrix for both directions (JavisDiT section 3.2, multi-modal bidirectional cross-attention).

    Args:
        q_video, v_video: [B, Nv, E]; q_audio, v_audio: [B, Na, E] with E = heads * head size.

    Returns:
        What audio says to video [B, Nv, E] (row softmax) and video to audio [B, Na, E] (column softmax).
    """
    qv, qa, vv, va = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_video, q_audio, v_video, v_audio))
    scores = (qv * qv.shape[-1] ** -0.5) @ qa.transpose(-1, -2)  # [B, H, Nv, Na]
    wide = torch.promote_types(scores.dtype, torch.float32)
    to_video = scores.softmax(-1, dtype=wide).to(va.dtype) @ va
    to_audio = scores.transpose(-1, -2).softmax(-1, dtype=wide).to(vv.dtype) @ vv
    return to_video.transpose(1, 2).flatten(2), to_audio.transpose(1, 2).flatten(2)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu_tanh(x @ weight.T + bias)``."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; see ``javis.model.embed.Linear``."""
    return F.linear(x, weight, bias)


@dataclass(frozen=True, kw_only=True)
class ModelOps:
    """The operations a JavisDiT is built on. Replace a field to run the model on other kernels."""

    ada_layer_norm: Callable[..., Tensor] = ada_layer_norm
    gated_residual: Callable[..., Tensor] = gated_residual
    gated_residual_ada_layer_norm: Callable[..., tuple[Tensor, Tensor]] = gated_residual_ada_layer_norm
    factorized_attention: Callable[..., Tensor] = factorized_attention
    text_cross_attention: Callable[..., Tensor] = cross_attention
    prior_injection: Callable[..., Tensor] = cross_attention
    folded_prior_injection: Callable[..., Tensor] = folded_prior_injection
    bidirectional_attention: Callable[..., tuple[Tensor, Tensor]] = bidirectional_attention
    gelu_linear: Callable[..., Tensor] = gelu_linear
    linear: Callable[..., Tensor] = linear

    @classmethod
    def fused(cls) -> ModelOps:
        """The same operations on ``javis.kernels``: each call runs on the fastest backend that can take it.

        The only place from which the model reaches a kernel, and only when it is asked to.
        """
        from javis.kernels import fused_ops

        return cls(**fused_ops())
