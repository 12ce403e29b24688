"""Fits the metric of silhouettes (shape_metric.py) on real clips: ``python -m javis.eval.fit_shape_metric``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.eval.attributes import residuals_of
from javis.eval.motion import read_motion
from javis.eval.shape_metric import PATH, fit
from javis.eval.tracking import Picture
from javis.eval.world_report import held_out_scenes, pipeline_codec, real_clips
from javis.world import WorldConfig
from javis.world.vocabulary import SHAPES


@dataclass(frozen=True, kw_only=True)
class Args:
    """Fit the metric on real clips that went through a checkpoint's video codec."""

    checkpoint: str = "demo"
    clips: int = 150  # of one source, and as many of two
    seed: int = 880_000


def main(args: Args) -> None:
    """Fit and write the file of the package."""
    from safetensors.numpy import save_file

    from javis import JavisPipeline

    pipe = JavisPipeline.from_pretrained(args.checkpoint)
    form = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    scenes = held_out_scenes(args.clips, args.seed, split="any", config=form)[: 2 * args.clips]
    rows: list[Any] = []
    for clip in real_clips(scenes, pipeline_codec(pipe)):
        picture = Picture(clip.video)
        for clause in clip.clauses:
            if clause.get("shape") in SHAPES and clause["colour"] in picture.colours:
                track = picture.track(clause["colour"])
                turned = read_motion(picture.frames, track, clip.fps) == "swings"
                own = residuals_of(track, turned=turned)[SHAPES.index(clause["shape"])]
                rows.append(own[(own**2).sum(axis=1).argmin()])
    save_file(fit(np.stack(rows).astype(np.float64)), PATH)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
