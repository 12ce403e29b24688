"""Configuration of the built-in model's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from javis.model.codecs import PatchTransformConfig
from javis.model.config import JavisDiTConfig
from javis.model.prior import PriorConfig
from javis.model.text import WordEncoderConfig
from javis.model.vocoder import LogMelConfig
from javis.train.refinement import RefinementTraining
from javis.world import VOCABULARY, WorldConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 200  # steps of linear warm-up
    decay: float = 0.25  # share of the steps, at the end, over which the rate falls to zero
    restarts: tuple[int, ...] = ()  # steps at which the rate has fallen to zero and the whole course begins again


@dataclass(frozen=True, kw_only=True)
class DemoTrainConfig:
    """Training of the built-in model on the world, in the paper's three stages."""

    out: Path = Path("runs/demo")  # everything the run writes
    seed: int = 0
    clips: int = 24000  # training clips
    validation_clips: int = 128
    codec_clips: int = 600  # clips the codecs are fitted to
    batch: int = 16  # clips a step, over all processes
    processes: int = 2  # workers, one thread each; on cuda they only make the latents
    device: Literal["cpu", "cuda"] = "cpu"  # of the flow stages
    precision: str = "bf16"  # of matrix products: bf16 or fp32
    branches: StageConfig = field(default_factory=lambda: StageConfig(steps=300, warmup=100, decay=0.0))  # stage 1
    prior: StageConfig = field(default_factory=lambda: StageConfig(steps=500, learning_rate=1e-3))  # stage 2
    joint: StageConfig = field(
        default_factory=lambda: StageConfig(steps=17400, warmup=100, decay=0.3, restarts=(5700, 12400))
    )  # stage 3
    freeze_branches: bool = False  # joint stage: train only prior blocks and bidirectional attention, as the paper does
    optimizer: Literal["adamw", "muon"] = "muon"  # of the layers' matrices; everything else follows AdamW
    muon_rate: float = 2.0  # learning rate of those matrices, as a multiple of the stage's
    compile: bool = (
        False  # joint stage: torch.compile the loss; minutes of compilation, then faster steps; needs a C++ compiler
    )
    given: float = 0.4  # joint stage: share of samples with one stream given clean, half of them the picture
    weight_decay: float = 0.01
    clip_gradient: float = 1.0
    ema: float = 0.999  # decay of the averaged weights that are exported
    # Training timesteps from a joint step on: (step, shift towards noise, std of the logit-normal). A median of 0.88:
    # where things are is settled above 0.8 (docs/log.md); then less, for their shapes.
    timestep_plan: tuple[tuple[int, float, float], ...] = (
        (0, 7.0, 1.0),
        (3750, 5.0, 1.0),
        (5700, 4.0, 1.0),
        (9750, 3.0, 1.3),
        (12400, 4.0, 1.3),
    )
    sampling_ratio: float = 9.0  # shift of the timesteps in sampling
    condition_dropout: float = 0.1  # share of samples trained without caption and priors
    caption_full: float = 0.5  # share of samples with the full caption; the rest lacks attribute words
    save_every: int = 250  # steps
    log_every: int = 20  # steps

    world: WorldConfig = field(default_factory=WorldConfig)
    video_codec: PatchTransformConfig = field(
        default_factory=lambda: PatchTransformConfig(channels=3, patch=(2, 8, 8), coefficients=40)
    )
    refinement: RefinementTraining = field(default_factory=RefinementTraining)  # of the pictures decoded by it
    audio_codec: PatchTransformConfig = field(
        default_factory=lambda: PatchTransformConfig(channels=1, patch=(8, 16), coefficients=48)
    )
    mel: LogMelConfig = field(default_factory=LogMelConfig)
    text: WordEncoderConfig = field(default_factory=lambda: WordEncoderConfig(vocabulary=VOCABULARY))
    width: int = 128
    heads: int = 4
    depth: int = 4
    mlp_ratio: float = 3.0
    sigma_data: float = 0.28  # of the sample prediction: what the network leaves open, see velocity_of_sample
    prior_tokens: int = 8  # spatial, and as many temporal
    prior_channels: int = 32

    @property
    def flow_processes(self) -> int:
        """Processes of a flow stage."""
        return self.processes if self.device == "cpu" else 1

    def timesteps_at(self, step: int) -> tuple[float, float]:
        """(shift, standard deviation) of the training timesteps at a joint step."""
        return next((ratio, std) for start, ratio, std in reversed(self.timestep_plan) if step >= start)

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
            sigma_data=self.sigma_data,
            clock=True,
            clock_attention=True,
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
