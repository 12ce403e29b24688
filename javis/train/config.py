"""Configuration of the built-in model's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from javis.model.codecs import PatchTransformConfig
from javis.model.config import JavisDiTConfig
from javis.model.prior import PriorConfig
from javis.model.text import WordEncoderConfig
from javis.model.vocoder import LogMelConfig
from javis.world import VOCABULARY, WorldConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 200  # steps of linear warm-up
    decay: float = 0.25  # share of the steps, at the end, over which the rate falls to zero


@dataclass(frozen=True, kw_only=True)
class DemoTrainConfig:
    """Training of the built-in model on the world, in the paper's three stages."""

    out: Path = Path("runs/demo")  # everything the run writes
    seed: int = 0
    clips: int = 24000  # training clips
    validation_clips: int = 128
    codec_clips: int = 600  # clips the codecs are fitted to
    batch: int = 16  # clips a step, over all processes
    processes: int = 2  # workers, one thread each
    precision: str = "bf16"  # of matrix products: bf16 or fp32
    branches: StageConfig = field(default_factory=lambda: StageConfig(steps=300, warmup=100, decay=0.0))  # stage 1
    prior: StageConfig = field(default_factory=lambda: StageConfig(steps=500, learning_rate=1e-3))  # stage 2
    joint: StageConfig = field(default_factory=lambda: StageConfig(steps=6000, warmup=100))  # stage 3
    freeze_branches: bool = False  # joint stage: train only prior blocks and bidirectional attention, as the paper does
    weight_decay: float = 0.01
    clip_gradient: float = 1.0
    ema: float = 0.999  # decay of the averaged weights that are exported
    timestep_ratio: float = 2.25  # shift of the training timesteps towards noise; the median is then 0.69
    timestep_std: float = 0.8  # of the logit-normal timesteps: few with little noise, where the loss weighs 1/t^2
    sampling_ratio: float = 1.5  # shift of the timesteps in sampling
    condition_dropout: float = 0.1  # share of samples trained without caption and priors
    caption_full: float = 0.5  # share of samples with the full caption; the rest lacks attribute words
    save_every: int = 250  # steps
    log_every: int = 20  # steps

    world: WorldConfig = field(default_factory=WorldConfig)
    video_codec: PatchTransformConfig = field(
        default_factory=lambda: PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=40)
    )
    audio_codec: PatchTransformConfig = field(
        default_factory=lambda: PatchTransformConfig(channels=1, patch=(8, 16), coefficients=48)
    )
    mel: LogMelConfig = field(default_factory=LogMelConfig)
    text: WordEncoderConfig = field(default_factory=lambda: WordEncoderConfig(vocabulary=VOCABULARY))
    width: int = 128
    heads: int = 4
    depth: int = 4
    mlp_ratio: float = 3.0
    prior_tokens: int = 8  # spatial, and as many temporal
    prior_channels: int = 32

    def model(self) -> JavisDiTConfig:
        """The small JavisDiT."""
        return JavisDiTConfig(
            hidden_size=self.width,
            num_heads=self.heads,
            depth=self.depth,
            mlp_ratio=self.mlp_ratio,
            video_channels=self.video_codec.coefficients,
            video_patch=(1, 2, 2),
            audio_channels=self.audio_codec.coefficients,
            audio_patch=(1, 1),
            caption_channels=self.text.channels,
            caption_length=self.text.max_words,
            spatial_prior_len=self.prior_tokens,
            temporal_prior_len=self.prior_tokens,
            prior_channels=self.prior_channels,
            pred_sigma=False,
            prediction="sample",
            clock=True,
            input_sq_size=self.world.size,
            condition_dropout=self.condition_dropout,
        )

    def prior_model(self) -> PriorConfig:
        """The small HiST-Sypo estimator."""
        return PriorConfig(
            text_channels=self.text.channels,
            spatial_token_num=self.prior_tokens,
            temporal_token_num=self.prior_tokens,
            hidden_size=64,
            out_dim=self.prior_channels,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            video_channels=self.video_codec.coefficients,
            video_patch=(1, 2, 2),
            audio_channels=self.audio_codec.coefficients,
            audio_patch=(1, 1),
            input_sq_size=self.world.size,
        )
