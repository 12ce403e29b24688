"""HiST-Sypo: estimates spatial and temporal prior tokens from text (JavisDiT section 3.3).

The spatial tokens say where things sound, the temporal ones when; both are sampled, since the text fixes neither.
Training is contrastive: priors are pulled to an embedding of the matching audio-video pair and pushed from pairs whose
sound is out of place or out of time. The embedding network is used in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from javis.model.embed import PatchEmbed, sinusoid, video_positions
from javis.model.prior_losses import (
    ModalityMerge,
    PairDiscriminator,
    PriorLoss,
    axis_loss,
    kl_to_standard_normal,
    onset_loss,
)
from javis.model.prior_transformer import Gelu, PriorTransformer

Axis = Literal["spatial", "temporal"]

KL_WEIGHT = 1e-6  # weight of the KL term in the total loss (official value)
LOGVAR_RANGE = (-30.0, 20.0)

# Official constructor names on the left, ours on the right; the rest has the same name or no meaning here.
_OFFICIAL_FIELDS = {
    "text_emb_dim": "text_channels",
    "video_in_channel": "video_channels",
    "video_patch_size": "video_patch",
    "video_input_sq_size": "input_sq_size",
    "audio_in_channel": "audio_channels",
    "audio_patch_size": "audio_patch",
    "nhead": "num_heads",
}


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Sizes and switches of :class:`PriorEstimator`."""

    text_channels: int = 1024  # width of the text hidden states
    spatial_token_num: int = 32  # Ns
    temporal_token_num: int = 32  # Nt
    hidden_size: int = 512  # width of the transformer
    out_dim: int = 128  # C, width of the prior tokens
    num_heads: int = 4
    num_encoder_layers: int = 4
    num_decoder_layers: int = 4
    ffn_size: int | None = None  # None: 4 * hidden_size
    dropout: float = 0.0  # in the transformer, in training
    apply_sampling: bool = True  # False: deterministic priors, no posterior
    encoder_gelu: Literal["auto", "erf", "tanh"] = "auto"  # see PriorEstimator.encode
    encode_va: bool = True  # the audio-video embedding network of the loss
    video_channels: int = 4  # channels of the video latents
    video_patch: tuple[int, int, int] = (1, 2, 2)
    audio_channels: int = 8  # channels of the audio latents
    audio_patch: tuple[int, int] = (2, 2)
    va_num_heads: int = 4  # heads of the embedding network and the discriminator
    qk_norm: bool = True  # RMS norm of q and k in the discriminator
    input_sq_size: int = 512  # side in pixels for which the position grid has unit step
    pred_onset: bool = False  # predict an onset probability per temporal token

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}")
        if self.encode_va and (self.out_dim % self.va_num_heads or self.out_dim % 4):
            raise ValueError(
                f"out_dim {self.out_dim} must be divisible by va_num_heads {self.va_num_heads} and by 4 "
                "(2-D sin/cos position embedding)"
            )
        if self.encoder_gelu not in ("auto", "erf", "tanh"):
            raise ValueError(f"encoder_gelu {self.encoder_gelu!r} is not one of auto, erf, tanh")
        object.__setattr__(self, "video_patch", tuple(self.video_patch))
        object.__setattr__(self, "audio_patch", tuple(self.audio_patch))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PriorConfig:
        """Read what :meth:`to_dict` wrote; an unknown field is an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown prior configuration fields {unknown}; this version knows {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_official(cls, values: dict[str, Any], state: Mapping[str, Tensor]) -> PriorConfig:
        """Translate the official STPriorExtractor's constructor arguments; sizes they leave out come from ``state``."""
        sizes: dict[str, Any] = {"ffn_size": state["prior_extractor.decoder.layers.0.linear1.weight"].shape[0]}
        if (video := state.get("video_embedder.proj.weight")) is not None:
            sizes |= {"video_channels": video.shape[1], "video_patch": tuple(video.shape[2:])}
        if (audio := state.get("audio_embedder.weight")) is not None:
            sizes |= {"audio_channels": audio.shape[1], "audio_patch": tuple(audio.shape[2:])}
        return cls(**(sizes | cls.official_fields(values)))

    @classmethod
    def official_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields that the official constructor arguments set, without defaults."""
        known = {f.name for f in fields(cls)}
        renamed = {_OFFICIAL_FIELDS.get(name, name): value for name, value in values.items()}
        return {name: value for name, value in renamed.items() if name in known}


@dataclass(frozen=True, kw_only=True)
class Priors:
    """Prior tokens of a batch of prompts, and the distribution they were drawn from."""

    spatial: Tensor  # [B, Ns, C]
    temporal: Tensor  # [B, Nt, C]
    mean: Tensor | None = None  # [B, Ns+Nt, C]; None for a deterministic estimator
    logvar: Tensor | None = None  # [B, Ns+Nt, C]
    onset: Tensor | None = None  # [B, Nt, 1], onset probability per temporal token


class PriorEstimator(nn.Module):
    """Text hidden states -> spatial and temporal prior tokens, with the contrastive loss that trains it.

    Parameter names are those of the official STPriorExtractor: its weights load with ``load_state_dict(strict=True)``.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        c = self.config = config
        width = c.hidden_size
        self.spatial_query_emb = nn.Parameter(torch.randn(1, c.spatial_token_num, width) * 0.02)
        self.temporal_query_emb = nn.Parameter(torch.randn(1, c.temporal_token_num, width) * 0.02)
        self.in_proj = nn.Linear(c.text_channels, width)
        self.prior_extractor = PriorTransformer(
            width, c.num_heads, c.num_encoder_layers, c.num_decoder_layers, c.ffn_size or 4 * width, c.dropout
        )
        self.out_proj = nn.Linear(width, c.out_dim * (2 if c.apply_sampling else 1))
        if c.pred_onset:
            self.onset_predictor = nn.Linear(c.out_dim, 1)
        if c.encode_va:
            self.video_embedder = PatchEmbed(c.video_channels, c.video_patch, c.out_dim)
            self.audio_embedder = nn.Conv2d(c.audio_channels, c.out_dim, c.audio_patch, stride=c.audio_patch)
            self.va_spatial_encoder = ModalityMerge(c.out_dim, c.va_num_heads)
            self.va_temporal_encoder = ModalityMerge(c.out_dim, c.va_num_heads)
            self.discriminator = PairDiscriminator(c.out_dim, c.va_num_heads, c.qk_norm)

    def encode(
        self,
        text: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        encoder_gelu: Literal["auto", "erf", "tanh"] | None = None,
    ) -> Priors:
        """Estimate the priors of a batch of prompts.

        Args:
            text: hidden states of the text encoder, [B, L, text_channels].
            noise: standard normal, [B, Ns+Nt, C]; None draws it from ``generator`` (all of the batch at once: pass
                the noise itself where a sample must not depend on its neighbours). Unused without sampling.
            generator: source of the noise.
            encoder_gelu: activation of the text encoder layers, None for the configured one. "auto" is what the
                official model computes: tanh in training, erf in eval mode (torch's fused inference path computes
                that one, and exists for an even number of heads only).
        """
        c = self.config
        if text.ndim != 3 or text.shape[-1] != c.text_channels:
            raise ValueError(f"text must be [B, L, {c.text_channels}], got {tuple(text.shape)}")
        queries = torch.cat((self.spatial_query_emb, self.temporal_query_emb), dim=1).expand(len(text), -1, -1)
        gelu = self._resolve_gelu(encoder_gelu or c.encoder_gelu)
        out = self.out_proj(self.prior_extractor(self.in_proj(text), queries, gelu))
        mean = logvar = None
        tokens = out
        if c.apply_sampling:
            mean, logvar = out.chunk(2, dim=-1)
            logvar = logvar.clamp(*LOGVAR_RANGE)
            if noise is None:
                device = text.device if generator is None else generator.device
                noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
            if noise.shape != mean.shape:
                raise ValueError(f"noise must be {tuple(mean.shape)}, got {tuple(noise.shape)}")
            tokens = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        spatial, temporal = tokens.split((c.spatial_token_num, c.temporal_token_num), dim=1)
        onset = self.onset_predictor(temporal).sigmoid() if c.pred_onset else None
        return Priors(spatial=spatial, temporal=temporal, mean=mean, logvar=logvar, onset=onset)

    forward = encode

    def _resolve_gelu(self, choice: Literal["auto", "erf", "tanh"]) -> Gelu:
        if choice == "auto":
            return "tanh" if self.training or self.config.num_heads % 2 else "erf"
        return choice

    def embed_video(self, video: Tensor, frame_height: Tensor, frame_width: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of video latents [B, C, T, H, W] -> spatial axis [B, T, Ns, C] and temporal axis [B, Nt, S, C].

        frame_height, frame_width: [B], size of the frames in pixels (they set the scale of the position embedding).
        """
        c = self.config
        _, *grid = self.video_embedder.grid(tuple(video.shape[2:]))
        scale = (frame_height.float() * frame_width.float()).sqrt() / c.input_sq_size
        positions = video_positions((grid[0], grid[1]), scale, c.out_dim)
        missing = [-n % p for n, p in zip(video.shape[2:], c.video_patch, strict=True)]
        if any(missing):
            video = F.pad(video, [value for amount in reversed(missing) for value in (0, amount)])
        # The strided convolution itself: with patches in time as well, six times faster here than PatchEmbed's product.
        tokens = self.video_embedder.proj(video).flatten(3).permute(0, 2, 3, 1)  # [B, T', S, C]
        tokens = tokens + positions.to(video.dtype)[:, None]
        return self._resample(tokens)

    def embed_audio(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of audio latents [B, C, Ta, M] -> spatial axis [B, Ta', Ns, C] and temporal axis [B, Nt, M', C].

        Latents beyond the last whole patch are not used (a strided convolution without padding).
        """
        tokens = self.audio_embedder(audio).permute(0, 2, 3, 1)  # [B, Ta', M', C]
        frequencies = torch.arange(tokens.shape[2], device=audio.device)
        return self._resample(tokens + sinusoid(frequencies, self.config.out_dim).to(audio.dtype))

    def _resample(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, S, C] -> space resampled to Ns: [B, T, Ns, C], and time resampled to Nt: [B, Nt, S, C]."""
        batch, frames, places, _ = tokens.shape
        rows = tokens.permute(0, 1, 3, 2).flatten(0, 1)  # [B*T, C, S]
        spatial = F.interpolate(rows, size=self.config.spatial_token_num, mode="linear", align_corners=False)
        columns = tokens.permute(0, 2, 3, 1).flatten(0, 1)  # [B*S, C, T]
        temporal = F.interpolate(columns, size=self.config.temporal_token_num, mode="linear", align_corners=False)
        return (
            spatial.unflatten(0, (batch, frames)).transpose(2, 3),
            temporal.unflatten(0, (batch, places)).permute(0, 3, 1, 2),
        )

    def embed_pairs(self, axis: Axis, video: Tensor, audio: Tensor) -> Tensor:
        """Embedding of audio-video pairs: resampled tokens of one axis (see embed_video, embed_audio) -> [B, N, C]."""
        if axis == "spatial":  # per spatial token, over frames
            return self.va_spatial_encoder(video.transpose(1, 2), audio.transpose(1, 2))
        return self.va_temporal_encoder(video, audio)  # per temporal token, over patches

    def loss(
        self,
        priors: Priors,
        video: Tensor,
        audio: Tensor,
        *,
        neg_videos: Mapping[str, Tensor] | None = None,
        neg_audios: Mapping[str, Tensor] | None = None,
        frame_height: Tensor,
        frame_width: Tensor,
        onset: Tensor | None = None,
    ) -> PriorLoss:
        """Contrastive loss of priors against the latents of their clip and of negatives.

        Args:
            priors: from :meth:`encode`; with ``mean`` and ``logvar`` the KL term (weight 1e-6) is added.
            video, audio: latents of the matching clip, [B, C, T, H, W] and [B, C, Ta, M].
            neg_videos, neg_audios: "spatial" and/or "temporal" -> negatives [B, N, ...] with the latents' shapes
                (spatially resp. temporally out of step with the other modality). Missing ones count as none.
            frame_height, frame_width: [B], in pixels.
            onset: onset labels 0..1, [B, any length]; needs ``pred_onset``.
        """
        if not self.config.encode_va:
            raise ValueError("this estimator has no audio-video embedding network (encode_va=False), hence no loss")
        if onset is not None and not self.config.pred_onset:
            raise ValueError("onset labels were given, but the estimator predicts no onsets (pred_onset=False)")
        embeds = self._embed_all(video, audio, neg_videos or {}, neg_audios or {}, frame_height, frame_width)
        losses = {
            "spatial": axis_loss(priors.spatial, embeds["spatial"], self.discriminator),
            "temporal": axis_loss(priors.temporal, embeds["temporal"], self.discriminator),
        }
        total = losses["spatial"].total + losses["temporal"].total
        kl = onset_term = None
        if priors.mean is not None and priors.logvar is not None:
            kl = KL_WEIGHT * kl_to_standard_normal(priors.mean, priors.logvar)
            total = total + kl
        if onset is not None:
            onset_term = onset_loss(self.onset_predictor(priors.temporal)[..., 0], onset)
            total = total + onset_term
        return PriorLoss(total=total, spatial=losses["spatial"], temporal=losses["temporal"], kl=kl, onset=onset_term)

    def _embed_all(
        self,
        video: Tensor,
        audio: Tensor,
        neg_videos: Mapping[str, Tensor],
        neg_audios: Mapping[str, Tensor],
        frame_height: Tensor,
        frame_width: Tensor,
    ) -> dict[Axis, Tensor]:
        """Embeddings [B, 1 + negatives, N, C] by axis: (v+, a+), v+ with every negative audio, every negative video
        with a+."""
        batch = len(video)

        def sized(count: int) -> tuple[Tensor, Tensor]:
            return frame_height.expand(batch).repeat_interleave(count), frame_width.expand(batch).repeat_interleave(
                count
            )

        positive_video, positive_audio = self.embed_video(video, *sized(1)), self.embed_audio(audio)
        embeds: dict[Axis, Tensor] = {}
        axes: tuple[Axis, Axis] = ("spatial", "temporal")
        for index, axis in enumerate(axes):
            videos, audios = positive_video[index][:, None], positive_audio[index][:, None]
            if (more := neg_videos.get(axis)) is not None:
                tokens = self.embed_video(more.flatten(0, 1), *sized(more.shape[1]))[index]
                videos = torch.cat((videos, tokens.unflatten(0, (batch, -1))), dim=1)
            if (more := neg_audios.get(axis)) is not None:
                tokens = self.embed_audio(more.flatten(0, 1))[index]
                audios = torch.cat((audios, tokens.unflatten(0, (batch, -1))), dim=1)
            pair_video = [0] * audios.shape[1] + list(range(1, videos.shape[1]))
            pair_audio = list(range(audios.shape[1])) + [0] * (videos.shape[1] - 1)
            pairs = self.embed_pairs(axis, videos[:, pair_video].flatten(0, 1), audios[:, pair_audio].flatten(0, 1))
            embeds[axis] = pairs.unflatten(0, (batch, -1))
        return embeds
