"""The metric in which silhouettes are compared: directions in which a codec distorts every shape count less.

Through the built-in model's linear codec a ball looks a little like a box and a star a little like a ball. Those
residuals are few and alike, so they are learned from real clips sent through the codec, whose shapes are known, and
divided out (a whitened matched filter): with residuals of covariance S,

    distance(r) = r^T (S + a I)^-1 r, up to a factor  =  |r|^2 - sum over k of g_k (u_k . r)^2,    g_k = s_k / (s_k + a)

No generated clip enters. ``python -m javis.eval.shape_metric`` fits it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("shape_metric.safetensors")
FLOOR = 3.0  # a, in mean variances of the residuals
LEAST = 0.05  # directions with a smaller g are left out


@lru_cache(maxsize=1)
def directions() -> tuple[np.ndarray, np.ndarray]:
    """Unit directions u [K, pixels] and their g [K], float32."""
    from safetensors.numpy import load_file

    stored = load_file(PATH)
    return stored["directions"].astype(np.float32), stored["shares"].astype(np.float32)


def distances(residuals: np.ndarray) -> np.ndarray:
    """Squared lengths of residuals [N, pixels] in the learned metric, [N]."""
    unit, shares = directions()
    return np.asarray((residuals**2).sum(axis=1) - ((residuals @ unit.T) ** 2) @ shares)


def fit(residuals: np.ndarray) -> dict[str, np.ndarray]:
    """``directions`` and ``shares`` of residuals [N, pixels] of right shapes, in float16 and float32."""
    variances, vectors = np.linalg.eigh(residuals.T @ residuals / len(residuals))
    shares = variances / (variances + FLOOR * variances.mean())
    kept = np.flatnonzero(shares > LEAST)[::-1]
    return {"directions": vectors[:, kept].T.astype(np.float16), "shares": shares[kept].astype(np.float32)}


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
    from javis.eval.attributes import residuals_of
    from javis.eval.motion import read_motion
    from javis.eval.tracking import Picture
    from javis.eval.world_report import held_out_scenes, pipeline_codec, real_clips
    from javis.world import WorldConfig
    from javis.world.vocabulary import SHAPES

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
