"""How well a checkpoint knows the clean latents at each level of noise: where in the flow structure is settled.

    python benchmarks/noise_levels.py [--checkpoint demo] [--clips 32]

Mean squared error of the predicted sample over the variance of the latents: 1 = knows nothing. Appends one row to
benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from rich.console import Console

from javis import JavisPipeline
from javis.bench import append_rows, environment
from javis.flow import add_noise
from javis.world import WorldConfig, caption, render_audio, render_video, sample_scene

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 1.0)
SEED = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure."""

    checkpoint: str = "demo"
    clips: int = 32


@torch.no_grad()
def main(args: Args) -> None:
    torch.manual_seed(0)
    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    world = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    scenes = [sample_scene(SEED + i, world) for i in range(args.clips)]
    frames = torch.from_numpy(np.stack([render_video(scene) for scene in scenes])).permute(0, 4, 1, 2, 3)
    waves = torch.from_numpy(np.stack([render_audio(scene) for scene in scenes]))
    clean = (pipe.video_codec.encode(frames.float() / 127.5 - 1), pipe.audio_codec.encode(waves))
    text, mask, priors = pipe.encode_prompts([caption(scene) for scene in scenes], list(range(args.clips)))
    condition = pipe.condition(text, mask, priors, frames=frames.shape[2], samples=waves.shape[1], guided=False)
    noise = tuple(torch.randn_like(x) for x in clean)
    errors: dict[str, dict[str, float]] = {"video": {}, "audio": {}}
    for level in LEVELS:
        t = torch.full((args.clips,), 1000.0 * level)
        noisy = tuple(add_noise(x, n, t) for x, n in zip(clean, noise, strict=True))
        out = pipe.model.denoise(noisy[0], noisy[1], t, condition)
        for name, x, x_t, velocity in zip(errors, clean, noisy, out, strict=True):
            predicted = x_t + level * velocity[:, : x.shape[1]]
            errors[name][f"{level:g}"] = round(float((predicted - x).square().mean() / x.var()), 4)
    row = {"bench": "noise_levels", "checkpoint": args.checkpoint, "clips": args.clips, **errors, **environment()}
    Console().print(row)
    append_rows([row])


if __name__ == "__main__":
    main(tyro.cli(Args))
