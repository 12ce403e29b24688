"""Feature vectors of clips for Frechet distances: of the picture, of the sound, and of both with their timing.

Nothing is trained. Picture and sound go through two layers of random filters with fixed seeds (random features keep
distances, Rahimi and Recht 2007), pooled over time as mean and standard deviation. Mean and spread of real clips,
shipped in ``frechet_features.safetensors``, bring all to one bounded scale, and a fixed random projection to few
dimensions, since a hundred clips or so are compared. The third vector also holds how the changes of the picture and the
onsets of the sound correlate at lags from -125 to 125 ms: a late sound moves it, and hardly moves the others.

``python -m javis.eval.frechet_features`` renders the real clips again and writes that file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from javis.eval.frechet import Gaussian
from javis.eval.onsets import HOP, Sound, band_rise
from javis.eval.tracking import as_frames

PATH = Path(__file__).with_name("frechet_features.safetensors")
SETS = ("picture", "sound", "both")
FRAMES, SIDE, FPS, SAMPLE_RATE = 32, 64, 16.0, 16000  # of the clips that the file describes
LAGS = np.arange(-4, 5) * 0.03125  # seconds
SMOOTHING = 0.020  # seconds, standard deviation of the bell over an onset
BOUND = 3.0  # spreads of real clips at which a feature levels off, so that one failed clip does not outweigh the others
LEAST_SPREAD = 0.1  # of the median: what hardly varies among real clips must not outweigh everything else
# set -> (raw features, dimensions they are projected to), one after the other
PARTS = {
    "picture": (("picture", 24),),
    "sound": (("sound", 24),),
    "both": (("picture", 8), ("sound", 8), ("alignment", 16)),
}


# --- raw features -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _filters(stream: int, *shape: int) -> torch.Tensor:
    """Random filters of unit gain; numpy's legacy generator never changes its numbers (NEP 19)."""
    fan_in = int(np.prod(shape[1:]))
    drawn = np.random.RandomState(1000 + stream).standard_normal(shape) * np.sqrt(2.0 / fan_in)
    return torch.from_numpy(drawn.astype(np.float32))


@lru_cache(maxsize=8)
def _projection(stream: int, rows: int, columns: int) -> np.ndarray:
    """Random orthonormal rows [rows, columns]."""
    drawn = np.random.RandomState(2000 + stream).standard_normal((columns, rows))
    q, r = np.linalg.qr(drawn)
    return np.asarray((q * np.sign(np.diag(r))).T)


def _pooled(series: torch.Tensor) -> np.ndarray:
    """Mean and standard deviation over time of [T, K]: float64 [2 K]."""
    values = series.double()
    return torch.cat((values.mean(0), values.std(0, correction=0))).numpy()


def picture_features(video: np.ndarray) -> np.ndarray:
    """Raw features of uint8 [T, H, W, 3], T >= 2: float64 [48]. Filters see colours, changes and places."""
    frames = torch.from_numpy(as_frames(video)).permute(0, 3, 1, 2) * 2.0 - 1.0
    if frames.shape[-2:] != (SIDE, SIDE):
        frames = functional.interpolate(frames, (SIDE, SIDE), mode="area")
    changes = 2.0 * (frames[1:] - frames[:-1])
    place = torch.linspace(-1.0, 1.0, SIDE)
    grid = torch.stack((place.expand(SIDE, SIDE), place[:, None].expand(SIDE, SIDE)))
    seen = torch.cat((frames[1:], changes, grid.expand(len(changes), -1, -1, -1)), dim=1)
    hidden = functional.relu(functional.conv2d(seen, _filters(0, 16, 8, 5, 5), stride=2, padding=2))
    hidden = functional.relu(functional.conv2d(hidden, _filters(1, 24, 16, 3, 3), stride=2, padding=1))
    return _pooled(hidden.mean(dim=(2, 3)))


def sound_features(sound: Sound) -> np.ndarray:
    """Raw features of a sound's log spectra in bands, on a grid of 10 ms: float64 [48]."""
    levels = torch.from_numpy(np.log(sound.banded + 1e-3).astype(np.float32)).T[None] / 2.0 + 2.0  # [1, bands, hops]
    levels = functional.avg_pool1d(levels, 4)
    hidden = functional.relu(functional.conv1d(levels, _filters(2, 32, levels.shape[1], 5), padding=2))
    hidden = functional.relu(functional.conv1d(hidden, _filters(3, 24, 32, 5), stride=2, padding=2))
    return _pooled(hidden[0].T)


def alignment_features(video: np.ndarray, sound: Sound, fps: float) -> np.ndarray:
    """Correlation over time of three changes of the picture with the sound's onsets, at ``LAGS``: float64 [27].

    The changes are motion (mean difference of two frames), a change of motion, and a turn: motion that the frames
    before and after do not show, since what turned back is where it was. A clip without onsets or changes has zeros.
    """
    frames = as_frames(video)
    motion = np.abs(frames[1:] - frames[:-1]).mean(axis=(1, 2, 3), dtype=np.float64)
    across = np.abs(frames[2:] - frames[:-2]).mean(axis=(1, 2, 3), dtype=np.float64)
    turn = motion[1:] + motion[:-1] - across
    jump = np.abs(motion[1:] - motion[:-1])
    times = np.arange(1, len(frames) - 1) / fps
    onsets = _onset_strength(sound)
    grid = np.arange(len(onsets)) * HOP
    found = []
    for change in (0.5 * (motion[1:] + motion[:-1]), jump, turn):
        for lag in LAGS:
            found.append(_correlation(change, np.interp(times + lag, grid, onsets)))
    return np.array(found)


def _onset_strength(sound: Sound) -> np.ndarray:
    """Rise of the amplitude over all bands on the grid of ``HOP`` seconds, smoothed by a bell."""
    total = np.sqrt((band_rise(sound.banded) ** 2).sum(axis=1))
    reach = round(4 * SMOOTHING / HOP)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) * HOP / SMOOTHING) ** 2)
    return np.convolve(total, bell / bell.sum(), mode="same")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-9 else 0.0


# --- features on the scale of real clips --------------------------------------------------------------------------


def raw_features(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> dict[str, np.ndarray]:
    """``picture`` [48], ``sound`` [48] and ``alignment`` [27] of one clip, float64.

    Raises:
        ValueError: fewer than 3 frames, or shapes and rates that cannot be read.
    """
    if len(video) < 3:
        raise ValueError(f"video has {len(video)} frames, expected at least 3")
    sound = Sound(audio, sample_rate)
    return {
        "picture": picture_features(video),
        "sound": sound_features(sound),
        "alignment": alignment_features(video, sound, fps),
    }


@dataclass(frozen=True)
class Reference:
    """Real clips: mean and spread [D] of each raw feature, and the Gaussian of each set of projected ones."""

    scales: Mapping[str, tuple[np.ndarray, np.ndarray]]
    gaussians: Mapping[str, Gaussian]

    def project(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Feature vectors of one clip, by set: picture [24], sound [24], both [32]; those whose parts ``raw`` has."""
        scaled = {
            name: BOUND * np.tanh((raw[name] - mean) / (BOUND * spread))
            for name, (mean, spread) in self.scales.items()
            if name in raw
        }
        found: dict[str, np.ndarray] = {}
        for number, (name, parts) in enumerate(PARTS.items()):
            if not all(part in scaled for part, _ in parts):
                continue
            found[name] = np.concatenate(
                [
                    _projection(10 * number + k, rows, len(scaled[part])) @ scaled[part]
                    for k, (part, rows) in enumerate(parts)
                ]
            )
        return found

    @classmethod
    def fit(cls, raws: Iterable[Mapping[str, np.ndarray]]) -> Reference:
        """Scales and Gaussians of real clips, given the raw features of each."""
        clips = list(raws)
        scales = {}
        for name in clips[0]:
            values = np.stack([clip[name] for clip in clips])
            spread = values.std(axis=0)
            scales[name] = (values.mean(axis=0), np.maximum(spread, LEAST_SPREAD * np.median(spread)))
        unfinished = cls(scales, {})
        vectors = [unfinished.project(clip) for clip in clips]
        return cls(scales, {name: Gaussian.of(np.stack([v[name] for v in vectors])) for name in SETS})


@lru_cache(maxsize=1)
def reference() -> Reference:
    """The real clips that the package's file describes: held-out captions, 2 s at 64 x 64, 16 fps and 16 kHz."""
    from safetensors.numpy import load_file

    stored = load_file(PATH)
    count = int(stored["count"])
    return Reference(
        {name: (stored[f"{name}.mean"], stored[f"{name}.spread"]) for name in ("picture", "sound", "alignment")},
        {name: Gaussian(stored[f"{name}.centre"], stored[f"{name}.covariance"], count) for name in SETS},
    )


def comparable(video: np.ndarray, fps: float, sample_rate: int) -> bool:
    """Whether a clip [T, H, W, 3] has the form of those in the package's file: size, length, rates."""
    return (video.shape[:3], float(fps), sample_rate) == ((FRAMES, SIDE, SIDE), FPS, SAMPLE_RATE)


def clip_features(video: np.ndarray, audio: np.ndarray, fps: float, sample_rate: int) -> dict[str, np.ndarray]:
    """Feature vectors of one clip (uint8 [T, H, W, 3], float [N]) on the scale of real ones, by set of ``SETS``."""
    return reference().project(raw_features(video, audio, fps, sample_rate))


@dataclass(frozen=True, kw_only=True)
class Args:
    """Describe real clips of held-out captions again, and write the file of the package."""

    count: int = 384
    """Clips with one source, as many with two, a quarter of it with an off-screen and an eighth with no sound."""
    seed: int = 3_000_000
    """Of the first scene; other clips than any that is measured."""


def main(args: Args) -> None:
    """Render, describe, write."""
    from safetensors.numpy import save_file

    from javis.eval.steps_prompts import prompts
    from javis.eval.world_report import real_clips

    clips = real_clips([prompt.scene for prompt in prompts(args.count, args.seed)])
    found = Reference.fit(raw_features(c.video, c.audio, c.fps, c.sample_rate) for c in clips)
    stored: dict[str, Any] = {"count": np.array(found.gaussians["picture"].count)}
    for name, (mean, spread) in found.scales.items():
        stored |= {f"{name}.mean": mean, f"{name}.spread": spread}
    for name, gaussian in found.gaussians.items():
        stored |= {f"{name}.centre": gaussian.mean, f"{name}.covariance": gaussian.covariance}
    save_file(stored, PATH)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
