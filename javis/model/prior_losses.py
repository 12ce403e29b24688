"""Contrastive supervision of the HiST-Sypo estimator (JavisDiT section 3.3): audio-video embeddings and the losses.

Shapes: B batch, P pairs per sample (the positive one first), N prior tokens (Ns spatial or Nt temporal), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.embed import Mlp
from javis.model.ops import bidirectional_attention


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class BidirectionalMerge(nn.Module):
    """Projections around :func:`javis.model.ops.bidirectional_attention`; m1 is video, m2 is audio."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.m1_proj = nn.Linear(width, width)
        self.m2_proj = nn.Linear(width, width)
        self.values_m1_proj = nn.Linear(width, width)
        self.values_m2_proj = nn.Linear(width, width)
        self.out_m1_proj = nn.Linear(width, width)
        self.out_m2_proj = nn.Linear(width, width)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """video [B, Lv, C] and audio [B, La, C] -> both, updated by each other."""
        to_video, to_audio = bidirectional_attention(
            self.m1_proj(video),
            self.m2_proj(audio),
            self.values_m1_proj(video),
            self.values_m2_proj(audio),
            self.num_heads,
        )
        return self.out_m1_proj(to_video), self.out_m2_proj(to_audio)


class ModalityMerge(nn.Module):
    """One embedding per prior token from a video and an audio sequence.

    Both are LayerNormed (no affine) and attend to each other, residually; each is averaged over its sequence, the two
    are added, and a pre-normed residual MLP follows.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.cross_attn = BidirectionalMerge(width, num_heads)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        """video [B, N, Lv, C], audio [B, N, La, C] -> [B, N, C]; every token n sees only its own two sequences."""
        batch, tokens = video.shape[:2]
        video, audio = video.flatten(0, 1), audio.flatten(0, 1)
        to_video, to_audio = self.cross_attn(plain_norm(video), plain_norm(audio))
        merged = (video + to_video).mean(dim=1) + (audio + to_audio).mean(dim=1)
        return (merged + self.mlp(plain_norm(merged))).unflatten(0, (batch, tokens))


class SelfAttention(nn.Module):
    """Multi-head self-attention with packed qkv and an optional per-head RMS norm of q and k."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        size = width // num_heads
        self.q_norm: nn.Module = nn.RMSNorm(size, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(size, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class PairDiscriminator(nn.Module):
    """Tells whether prior tokens and audio-video embedding tokens belong together."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attn = SelfAttention(width, num_heads, qk_norm)
        self.classifier = nn.Linear(width, 1)

    def forward(self, prior: Tensor, embed: Tensor) -> Tensor:
        """prior, embed [B, N, C] -> logits [B]."""
        x = torch.cat((self.cls_token.expand(len(prior), -1, -1), prior, embed), dim=1)
        return self.classifier(self.attn(x)[:, 0])[:, 0]


@dataclass(frozen=True, kw_only=True)
class AxisLoss:
    """Losses of one axis (spatial or temporal), each a scalar."""

    token: Tensor  # hinge on the cosine between prior tokens and embedding tokens
    disc: Tensor  # binary cross-entropy of the discriminator
    mse: Tensor  # distance of the prior to the positive embedding
    va: Tensor  # hinge on the cosine between positive and negative embeddings

    @property
    def total(self) -> Tensor:
        return self.token + self.disc + self.mse + self.va


@dataclass(frozen=True, kw_only=True)
class PriorLoss:
    """Loss of a batch; ``total`` is what to minimise."""

    total: Tensor
    spatial: AxisLoss
    temporal: AxisLoss
    kl: Tensor | None  # weighted KL divergence to the standard normal; None without a posterior
    onset: Tensor | None  # None without onset labels

    def parts(self) -> dict[str, Tensor]:
        """Every term by name (``spatial_token_loss``, ..., ``kl_loss``, ``onset_loss``), for logs."""
        named = {
            f"{axis}_{term}_loss": getattr(loss, term)
            for axis, loss in (("spatial", self.spatial), ("temporal", self.temporal))
            for term in ("token", "disc", "mse", "va", "total")
        }
        extra = {"kl_loss": self.kl, "onset_loss": self.onset}
        return named | {name: value for name, value in extra.items() if value is not None}


def mean_or_zero(x: Tensor) -> Tensor:
    """Mean, and 0 (not NaN) for no elements: an axis without negatives adds nothing."""
    return x.mean() if x.numel() else x.sum()


def token_hinge(prior: Tensor, embeds: Tensor) -> Tensor:
    """0.5 * (mean relu(1 - cos+) + mean relu(1 + cos-)), cosines token by token.

    prior [B, N, C]; embeds [B, P, N, C], the positive pair first.
    """
    cos = F.cosine_similarity(prior[:, None], embeds, dim=-1)
    return 0.5 * (F.relu(1 - cos[:, :1]).mean() + mean_or_zero(F.relu(1 + cos[:, 1:])))


def negative_hinge(embeds: Tensor) -> Tensor:
    """mean relu(1 + cos(e+, e-)), token by token; embeds [B, P, N, C], the positive pair first."""
    return mean_or_zero(F.relu(1 + F.cosine_similarity(embeds[:, :1], embeds[:, 1:], dim=-1)))


def axis_loss(prior: Tensor, embeds: Tensor, discriminator: PairDiscriminator) -> AxisLoss:
    """Losses of one axis: prior [B, N, C], embeds [B, P, N, C] with the positive pair first."""
    pairs = embeds.shape[1]
    logits = discriminator(prior.repeat_interleave(pairs, dim=0), embeds.flatten(0, 1)).unflatten(0, (-1, pairs))
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    return AxisLoss(
        token=token_hinge(prior, embeds),
        disc=F.binary_cross_entropy_with_logits(logits, labels),
        mse=F.mse_loss(prior, embeds[:, 0]),
        va=negative_hinge(embeds),
    )


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over tokens and channels, batch average; inputs [B, N, C]."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2)).mean()


def onset_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of onset logits [B, Nt] against labels [B, N] brought to Nt bins.

    Labels shorter than 2*Nt are resampled linearly, longer ones max-pooled, so that no onset is averaged away.
    """
    tokens = logits.shape[1]
    labels = labels.to(logits.dtype)[:, None]
    if labels.shape[-1] < 2 * tokens:
        binned = F.interpolate(labels, size=tokens, mode="linear", align_corners=False)
    else:
        binned = F.adaptive_max_pool1d(labels, tokens)
    return F.binary_cross_entropy_with_logits(logits, binned[:, 0])
