"""Training of the convolutions behind the built-in video codec (`javis.model.codecs.FrameRefinement`).

Real clips of the world go through the linear codec, with some noise on their latents, since generated latents are not
exact either; the convolutions learn the frames that were there. Latents do not change, so neither does anything that
was trained on them: ``python -m javis.train.refinement --checkpoint DIR --out DIR`` adds it to a finished checkpoint.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.errors import UsageError
from javis.model.codecs import FrameRefinement, PatchAudioCodec, PatchVideoCodec, RefinementConfig
from javis.world import WorldConfig

log = logging.getLogger("javis.train")

SEED = 910_000_000  # world seeds of the clips; those of codecs and flow stages are others


@dataclass(frozen=True, kw_only=True)
class RefinementTraining:
    """How the refinement is trained."""

    channels: int = 32  # of its hidden layers
    clips: int = 480  # world clips
    steps: int = 2500  # 0: no refinement
    batch: int = 4  # clips a step
    latents: int = 6  # latent frames of each clip a step
    noise: float = 0.1  # largest standard deviation of the noise on the latents, whose own is about 1
    learning_rate: float = 1.5e-3
    clip_gradient: float = 0.003  # norm of a step's gradient, about twice the usual one; without it a run may fly off
    warmup: int = 50  # steps


def refined(
    codec: PatchVideoCodec, world: WorldConfig, settings: RefinementTraining, *, seed: int = 0
) -> PatchVideoCodec:
    """``codec`` with a trained refinement; its transform stays as it is.

    Raises:
        UsageError: settings without steps, clips or latents.
    """
    from javis.train.latents import render_batch

    c = settings
    for name in ("steps", "clips", "batch", "latents"):
        if getattr(c, name) < 1:
            raise UsageError(f"refinement: {name} must be at least 1, got {getattr(c, name)}")
    torch.manual_seed(seed)
    result = PatchVideoCodec(codec.config, RefinementConfig(channels=c.channels))
    result.transform.load_state_dict(codec.transform.state_dict())
    net = result.refinement
    assert net is not None
    video = torch.cat(
        [
            render_batch(list(range(SEED + at, SEED + min(at + 40, c.clips))), world)[0].half()
            for at in range(0, c.clips, 40)
        ]
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=c.learning_rate, weight_decay=0.0, fused=True)
    rng, began = np.random.default_rng(seed), time.perf_counter()
    sums = np.zeros(2)
    for step in range(c.steps):
        warm, cool = min(1.0, (step + 1) / max(1, c.warmup)), min(1.0, 2 * (c.steps - step) / c.steps)
        for group in optimizer.param_groups:
            group["lr"] = c.learning_rate * warm * cool
        losses = _losses(result, net, video[rng.integers(0, len(video), c.batch)].float(), c, rng)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), c.clip_gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += [float(x.detach()) for x in losses]
        if (step + 1) % 250 == 0 or step + 1 == c.steps:
            count = (step % 250) + 1
            error, without = (round(float(x) / count, 6) for x in sums)
            seconds = round(time.perf_counter() - began, 1)
            row = {"step": step + 1, "error": error, "without": without, "seconds": seconds}
            log.info("refinement %s", row)
            sums[:] = 0
    return result.eval().requires_grad_(False)


def _losses(
    codec: PatchVideoCodec, net: FrameRefinement, video: Tensor, c: RefinementTraining, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mean square errors of some latent frames of clips [B, 3, T, H, W]: refined, and as the transform gives them."""
    per = codec.config.patch[0]
    count = video.shape[2] // per
    chosen = np.sort(rng.permutation(count)[: c.latents])
    video = video[:, :, (chosen[:, None] * per + np.arange(per)).ravel()]
    with torch.no_grad():
        z = codec.encode(video)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        level = c.noise * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
        plain = codec.transform.decode(z + level * torch.randn(z.shape, generator=generator))
    return F.mse_loss(net(plain), video), F.mse_loss(plain, video)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Give a finished small checkpoint a trained refinement."""

    out: Path  # folder to write
    checkpoint: str = "demo"
    seed: int = 0
    training: RefinementTraining = field(default_factory=RefinementTraining)


def main(args: Args) -> None:
    """Train and write."""
    from javis.model.codecs import codec_config
    from javis.pipeline import JavisPipeline

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)
    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    if not isinstance(pipe.video_codec, PatchVideoCodec) or not isinstance(pipe.audio_codec, PatchAudioCodec):
        raise UsageError(f"checkpoint {args.checkpoint!r} is of full size; a refinement belongs to the small codec")
    world = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    video = refined(pipe.video_codec, world, args.training, seed=args.seed)
    pipe.video_codec = video
    pipe.description = pipe.description | {"codecs": codec_config(video, pipe.audio_codec)}
    log.info("checkpoint: %s", pipe.save_pretrained(args.out))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
