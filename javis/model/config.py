"""Configuration of the JavisDiT model.

The defaults are the official JavisDiT-v0.1 (arXiv 2503.23377, section 3.2 and appendix): 28 layers of width 1152.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

PriorMode = Literal["cross_attn", "addition", "modulate"]
PriorScope = Literal["sample", "batch"]
Prediction = Literal["velocity", "sample"]

# Official constructor names on the left, ours on the right; everything else has the same name or no meaning here.
_OFFICIAL_FIELDS = {
    "in_channels": "video_channels",
    "patch_size": "video_patch",
    "audio_in_channels": "audio_channels",
    "audio_patch_size": "audio_patch",
    "caption_channels": "caption_channels",
    "model_max_length": "caption_length",
    "st_prior_channel": "prior_channels",
    "st_prior_utilize": "prior_mode",
    "train_st_prior_attn": "use_prior",
    "train_va_cross_attn": "use_bidirectional",
    "class_dropout_prob": "condition_dropout",
}


@dataclass(frozen=True, kw_only=True)
class JavisDiTConfig:
    """Sizes and switches of :class:`javis.model.dit.JavisDiT`."""

    hidden_size: int = 1152  # C, width of both streams
    num_heads: int = 16  # H; the head size D is C / H
    depth: int = 28  # layers; each holds seven sub-blocks
    mlp_ratio: float = 4.0  # MLP width / C
    video_channels: int = 4  # channels of the video latents
    video_patch: tuple[int, int, int] = (1, 2, 2)  # (time, height, width) of one video token, in latents
    audio_channels: int = 8  # channels of the audio latents
    audio_patch: tuple[int, int] = (4, 1)  # (time, frequency) of one audio token, in latents
    caption_channels: int = 4096  # width of the caption encoder's hidden states
    caption_length: int = 300  # tokens of the null caption, the longest caption
    spatial_prior_len: int = 32  # spatial prior tokens
    temporal_prior_len: int = 32  # temporal prior tokens
    prior_channels: int = 128  # width of the prior tokens
    prior_mode: PriorMode = "cross_attn"  # how the priors enter
    use_prior: bool = True  # False: no prior blocks at all
    use_bidirectional: bool = True  # False: the branches do not see each other
    qk_norm: bool = True  # per-head RMS norm of queries and keys in self-attention
    pred_sigma: bool = True  # twice the output channels; the first half is the velocity
    input_sq_size: int = 512  # side in pixels for which the position grid has unit step
    prediction: Prediction = "velocity"  # what the final layers give; "sample" for tokens wider than the model
    sigma_data: float = (
        0.0  # with prediction "sample": deviation that x_t itself has to explain (EDM's skip); 0: no skip
    )
    clock: bool = False  # add an embedding of time shared by both streams (not in the official model)
    clock_attention: bool = (
        False  # rotate q and k of the bidirectional attention by that time (not in the official model)
    )
    guidance_input: bool = False  # takes the guidance scales as input and is run without the unconditional half
    step_input: bool = False  # takes the end of the step as input and predicts the average velocity up to there
    condition_dropout: float = 0.1  # share of training samples whose caption and priors are dropped

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}")
        if self.head_size % 2:
            raise ValueError(f"RoPE rotates pairs: the head size {self.head_size} must be even")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by 4 (2-D sin/cos position embedding)")
        if self.prior_mode not in ("cross_attn", "addition", "modulate"):
            raise ValueError(f"prior_mode {self.prior_mode!r} is not one of cross_attn, addition, modulate")
        if self.prediction not in ("velocity", "sample"):
            raise ValueError(f"prediction {self.prediction!r} is not one of velocity, sample")
        if not 0 <= self.sigma_data < math.inf or (self.sigma_data and self.prediction != "sample"):
            raise ValueError(f"sigma_data {self.sigma_data} must be 0, or positive with prediction 'sample'")
        object.__setattr__(self, "video_patch", tuple(self.video_patch))
        object.__setattr__(self, "audio_patch", tuple(self.audio_patch))

    @property
    def head_size(self) -> int:
        """D, 72 at official size."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def video_out_channels(self) -> int:
        return self.video_channels * (2 if self.pred_sigma else 1)

    @property
    def audio_out_channels(self) -> int:
        return self.audio_channels * (2 if self.pred_sigma else 1)

    @property
    def bidirectional_size(self) -> int:
        """Inner width of the bidirectional attention: half the model width (official value)."""
        return self.hidden_size // 2

    @property
    def bidirectional_heads(self) -> int:
        """Heads of the bidirectional attention: half as many, so that the head size stays D (official value)."""
        return max(1, self.num_heads // 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JavisDiTConfig:
        """Read what :meth:`to_dict` wrote; an unknown field is an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model configuration fields {unknown}; this version knows {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_official(cls, values: dict[str, Any]) -> JavisDiTConfig:
        """Translate the constructor arguments of the official VASTDiT3. Fields without a meaning here are ignored."""
        return cls(**cls.official_fields(values))

    @classmethod
    def official_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields that the official constructor arguments set, without defaults."""
        known = {f.name for f in fields(cls)}
        renamed = {_OFFICIAL_FIELDS.get(name, name): value for name, value in values.items()}
        return {name: value for name, value in renamed.items() if name in known}
