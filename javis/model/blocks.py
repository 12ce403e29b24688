"""The blocks of JavisDiT (arXiv 2503.23377, figure 2 and section 3.2).

Streams are [B, N, C] with N = T*S tokens in (time, space) order. Parameters that depend only on the condition (keys and
values of captions and priors) are computed once per clip by ``condition`` methods; ``forward`` is what every step does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.config import JavisDiTConfig, PriorMode, PriorScope
from javis.model.embed import Linear, Mlp
from javis.model.ops import FoldedPrior, ModelOps, Rope, apply_rope, fold_prior

Stream = Literal["video", "audio"]


class KeyValue(NamedTuple):
    """Keys and values of condition tokens, each [B, H, M, D]."""

    k: Tensor
    v: Tensor


# Outputs of a block's attentions, by name, that a cache keeps across steps (javis/sample/cache.py). A block computes
# what is None and puts it here; it keeps nothing that has no place here.
Held = dict[str, Tensor | None]


def _kept(held: Held | None, name: str) -> Tensor | None:
    return None if held is None else held.get(name)


def _keep(held: Held | None, name: str, value: Tensor) -> Tensor:
    if held is not None and name in held:
        held[name] = value
    return value


# What a prior attention keeps of a clip: keys and values, or those with the projections in them, or resampled tokens.
PriorCondition = KeyValue | FoldedPrior | Tensor


class Modulation(NamedTuple):
    """One adaLN step: vectors [B, C] of timestep t, and of timestep 0 where a condition mask needs them."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    shift0: Tensor | None = None
    scale0: Tensor | None = None
    gate0: Tensor | None = None


@dataclass(frozen=True)
class StepState:
    """What a denoising step shares between blocks of one modality.

    Attributes:
        frames: T, latent frames (patches in time).
        time, prior_time: modulation by timestep t of the blocks [B, 6C] and of the prior blocks [B, 9C].
        time0, prior_time0: the same for timestep 0; None without masks.
        frame_mask: bool [B, T] or None; False = clean (given) frame, modulated as at timestep 0.
        rope: (cos, sin) over T.
    """

    frames: int
    time: Tensor | None
    prior_time: Tensor | None
    time0: Tensor | None
    prior_time0: Tensor | None
    frame_mask: Tensor | None
    rope: Rope


def modulations(table: Tensor, time: Tensor | None, time0: Tensor | None) -> list[Modulation]:
    """Rows (shift, scale, gate), (shift, scale, gate), ... of ``table`` [3n, C] plus the time embedding [B, 3nC]."""
    assert time is not None
    rows = (table + time.unflatten(-1, table.shape)).unbind(1)
    rows0: Sequence[Tensor | None] = [None] * len(rows)
    if time0 is not None:
        rows0 = (table + time0.unflatten(-1, table.shape)).unbind(1)
    return [Modulation(*rows[i : i + 3], *rows0[i : i + 3]) for i in range(0, len(rows), 3)]


class RMSNormWeight(nn.Module):
    """Holds the weight of a per-head RMS norm; the norm itself happens inside ``factorized_attention``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class SelfAttention(nn.Module):
    """Multi-head self-attention along one axis."""

    def __init__(self, config: JavisDiTConfig, ops: ModelOps, axis: str) -> None:
        super().__init__()
        self.ops, self.axis, self.heads = ops, axis, config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, ops)
        self.proj = Linear(config.hidden_size, config.hidden_size, ops)
        self.q_norm = RMSNormWeight(config.head_size) if config.qk_norm else None
        self.k_norm = RMSNormWeight(config.head_size) if config.qk_norm else None

    def forward(self, x: Tensor, frames: int, rope: Rope) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unflatten(1, (frames, -1))
        out = self.ops.factorized_attention(
            qkv,
            self.axis,
            q_weight=None if self.q_norm is None else self.q_norm.weight,
            k_weight=None if self.k_norm is None else self.k_norm.weight,
            rope=rope if self.axis == "temporal" else None,
        )
        return self.proj(out)


class CrossAttention(nn.Module):
    """Queries from the stream, keys and values from condition tokens; no q/k norm."""

    def __init__(self, width: int, heads: int, ops: ModelOps) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, ops)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = Linear(width, width, ops)

    def key_value(self, tokens: Tensor) -> KeyValue:
        """[B, M, C] -> keys and values [B, H, M, D]."""
        return KeyValue(*self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))


class TransformerBlock(nn.Module):
    """Factorized self-attention, caption cross-attention, MLP (the ST-DiT block of Open-Sora).

    ``x += gate * attn(mod(x)); x += text(x); x += gate * mlp(mod(x))``: the caption enters un-normalised and un-gated.
    """

    def __init__(self, config: JavisDiTConfig, ops: ModelOps, axis: str) -> None:
        super().__init__()
        c, self.ops = config, ops
        self.mlp_ops = ops  # of the norm before the MLP and of the MLP; javis/precision.py lets that norm write float8
        self.modulation = nn.Parameter(torch.randn(6, c.hidden_size) / c.hidden_size**0.5)
        self.attn = SelfAttention(c, ops, axis)
        self.text = CrossAttention(c.hidden_size, c.num_heads, ops)
        self.mlp = Mlp(c.hidden_size, c.mlp_size, c.hidden_size, ops)

    def modulated(self, x: Tensor, step: StepState) -> Tensor:
        """What enters the self-attention: ``x`` [B, N, C], normalised and modulated by the timestep."""
        return self._modulated(x, step, modulations(self.modulation, step.time, step.time0)[0])

    def _modulated(self, x: Tensor, step: StepState, a: Modulation) -> Tensor:
        return self.ops.ada_layer_norm(
            x, a.shift, a.scale, shift0=a.shift0, scale0=a.scale0, frame_mask=step.frame_mask
        )

    def forward(
        self, x: Tensor, step: StepState, text: KeyValue, text_mask: Tensor | None, held: Held | None = None
    ) -> Tensor:
        """One step of the stream x [B, N, C]. ``held`` may keep "attention" and "text", [B, N, C] before the gate."""
        ops, mask = self.ops, step.frame_mask
        a, m = modulations(self.modulation, step.time, step.time0)
        h = _kept(held, "attention")
        if h is None:
            h = _keep(held, "attention", self.attn(self._modulated(x, step, a), step.frames, step.rope))
        x = ops.gated_residual(x, h, a.gate, gate0=a.gate0, frame_mask=mask)
        told = _kept(held, "text")
        if told is None:
            told = self.text.proj(ops.text_cross_attention(self.text.q(x), text.k, text.v, mask=text_mask))
            _keep(held, "text", told)
        x, y = self.mlp_ops.gated_residual_ada_layer_norm(
            x, told, None, m.shift, m.scale, shift0=m.shift0, scale0=m.scale0, frame_mask=mask
        )
        h = self.mlp.fc2(self.mlp_ops.gelu_linear(y, self.mlp.fc1.weight, self.mlp.fc1.bias))
        return ops.gated_residual(x, h, m.gate, gate0=m.gate0, frame_mask=mask)


class PriorAttention(nn.Module):
    """One prior step in one of three forms (section 3.3): cross_attn, addition, modulate.

    Keys are the unique prior tokens of the sample. The official code repeats them per frame or per place; a softmax
    over n equal copies equals the softmax over one, so nothing changes but the cost.
    """

    def __init__(self, config: JavisDiTConfig, ops: ModelOps) -> None:
        super().__init__()
        self.ops, self.mode = ops, config.prior_mode
        c = config.hidden_size
        if self.mode == "cross_attn":
            self.attn = CrossAttention(c, config.num_heads, ops)
        else:
            self.proj = nn.Linear(c, 2 * c if self.mode == "modulate" else c)

    def condition(self, tokens: Tensor, length: int, scope: PriorScope) -> PriorCondition:
        """Once per clip. ``length``: places S (spatial step) or frames T (temporal step) for the resampled forms.

        Without gradients (sampling) the projections are folded into keys and values where that saves work: a token then
        costs 4 C HM FLOPs instead of 4 C^2 for the projections and 4 C M for the attention between them.
        """
        if self.mode != "cross_attn":
            if tokens.shape[1] != length:
                tokens = F.interpolate(tokens.transpose(1, 2), size=length, mode="nearest").transpose(1, 2)
            return self.proj(tokens)
        kv = self.attn.key_value(tokens)
        if scope == "batch":  # the official code lets every sample see the union of the batch's priors
            kv = KeyValue(*(x.transpose(0, 1).flatten(1, 2)[None].expand(len(x), -1, -1, -1) for x in kv))
        width, keys = tokens.shape[-1], kv.k.shape[2]
        if not torch.is_grad_enabled() and self.attn.heads * keys < width + keys:
            q, out = self.attn.q, self.attn.proj
            return fold_prior(kv.k, kv.v, q.weight, q.bias, out.weight, out.bias)
        return kv

    def forward(self, y: Tensor, told: PriorCondition, frames: int, spatial: bool) -> Tensor:
        """y: modulated stream [B, N, C] -> update [B, N, C]."""
        if isinstance(told, FoldedPrior):
            return self.ops.folded_prior_injection(y, *told, heads=self.attn.heads)
        if isinstance(told, KeyValue):
            return self.attn.proj(self.ops.prior_injection(self.attn.q(y), told.k, told.v))
        told = told[:, None] if spatial else told[:, :, None]  # [B, 1, S, .] or [B, T, 1, .]
        grid = y.unflatten(1, (frames, -1))
        if self.mode == "addition":
            return told.expand(grid.shape).flatten(1, 2)
        shift, scale = told.chunk(2, dim=-1)
        return (grid * scale + shift).flatten(1, 2)


class PriorBlock(nn.Module):
    """Spatial prior step, temporal prior step, MLP; each modulated and gated."""

    def __init__(self, config: JavisDiTConfig, ops: ModelOps) -> None:
        super().__init__()
        c, self.ops = config, ops
        self.mlp_ops = ops  # as in TransformerBlock
        self.modulation = nn.Parameter(torch.randn(9, c.hidden_size) / c.hidden_size**0.5)
        self.spatial = PriorAttention(c, ops)
        self.temporal = PriorAttention(c, ops)
        self.mlp = Mlp(c.hidden_size, c.mlp_size, c.hidden_size, ops)

    def forward(
        self,
        x: Tensor,
        step: StepState,
        spatial: PriorCondition,
        temporal: PriorCondition,
        held: Held | None = None,
    ) -> Tensor:
        """One step of the stream x [B, N, C]. ``held`` may keep "spatial" and "temporal", [B, N, C] before gating."""
        ops, mask = self.ops, step.frame_mask
        s, t, m = modulations(self.modulation, step.prior_time, step.prior_time0)
        y = ops.ada_layer_norm(x, s.shift, s.scale, shift0=s.shift0, scale0=s.scale0, frame_mask=mask)
        for attention, told, spatially, now, after, norm in (
            (self.spatial, spatial, True, s, t, ops),
            (self.temporal, temporal, False, t, m, self.mlp_ops),
        ):
            name = "spatial" if spatially else "temporal"
            h = _kept(held, name)
            if h is None:
                h = _keep(held, name, attention(y, told, step.frames, spatially))
            x, y = norm.gated_residual_ada_layer_norm(
                x,
                h,
                now.gate,
                after.shift,
                after.scale,
                gate0=now.gate0,
                shift0=after.shift0,
                scale0=after.scale0,
                frame_mask=mask,
            )
        h = self.mlp.fc2(self.mlp_ops.gelu_linear(y, self.mlp.fc1.weight, self.mlp.fc1.bias))
        return ops.gated_residual(x, h, m.gate, gate0=m.gate0, frame_mask=mask)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels without affine parameters, [B, N, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class BidirectionalBlock(nn.Module):
    """Bidirectional cross-attention between the streams (section 3.2): one score matrix, both softmaxes.

    Not modulated; LayerNorm without affine before, learned per-channel scales after.
    """

    def __init__(self, config: JavisDiTConfig, ops: ModelOps) -> None:
        super().__init__()
        self.ops, self.heads = ops, config.bidirectional_heads
        # javis/precision.py lets them write float8, for the products that follow.
        self.video_norm: Callable[[Tensor], Any] = layer_norm
        self.audio_norm: Callable[[Tensor], Any] = layer_norm
        c, inner = config.hidden_size, config.bidirectional_size
        self.video_scale = nn.Parameter(torch.full((c,), 1e-4))
        self.audio_scale = nn.Parameter(torch.full((c,), 1e-4))
        self.video_q, self.audio_q = Linear(c, inner, ops), Linear(c, inner, ops)
        self.video_v, self.audio_v = Linear(c, inner, ops), Linear(c, inner, ops)
        self.video_out, self.audio_out = Linear(inner, c, ops), Linear(inner, c, ops)

    def align_in_time(self) -> None:
        """Start where the streams attend to the same moment.

        Equal constant queries and keys, rotated by the clock, agree best at equal times. The outputs start at zero with
        full scale, so that learning is not slowed by a tiny one.
        """
        for linear in (self.video_q, self.audio_q):
            nn.init.constant_(linear.bias, 1.5)
        for linear in (self.video_out, self.audio_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.video_scale)
        nn.init.ones_(self.audio_scale)

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        return apply_rope(x.unflatten(-1, (self.heads, -1)).transpose(1, 2), rope).transpose(1, 2).flatten(2)

    def forward(self, video: Tensor, audio: Tensor, clock: tuple[Rope, Rope] | None = None) -> tuple[Tensor, Tensor]:
        """[B, Nv, C], [B, Na, C] -> the same shapes; ``clock``: RoPE tables of the video's and the audio's tokens."""
        v, a = self.video_norm(video), self.audio_norm(audio)
        q_video, q_audio = self.video_q(v), self.audio_q(a)
        if clock is not None:
            q_video, q_audio = self._rotate(q_video, clock[0]), self._rotate(q_audio, clock[1])
        to_video, to_audio = self.ops.bidirectional_attention(
            q_video, q_audio, self.video_v(v), self.audio_v(a), self.heads
        )
        video = video + self.video_scale * self.video_out(to_video)
        return video, audio + self.audio_scale * self.audio_out(to_audio)


__all__ = [
    "FoldedPrior",
    "Held",
    "KeyValue",
    "Modulation",
    "PriorCondition",
    "PriorMode",
    "StepState",
    "Stream",
    "modulations",
]
