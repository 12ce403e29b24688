"""Condition masks of the joint stage: what of a clip is given clean, and what is generated.

The kinds and their shares are those of the official third stage (JavisDiT, public configuration
``javisdit-v0-1/train/stage3_jav.py``); what is left, 70 %, is generated whole. Masks are at latent resolution: True =
noisy, generated; False = given clean, without loss (:func:`javis.flow.flow_losses`).

- random: frames at random, 10 to 90 % of them;
- video_to_audio, audio_to_video: the whole picture, the whole sound;
- sound_image_animate: the whole sound and the first frame of the picture;
- interpolate: every second frame;
- quarter_head, _tail, _head_tail, _random: up to a quarter of the clip at its beginning, its end, both, anywhere;
- image_head, _tail, _head_tail, _random: the same of one frame of the picture, and nothing of the sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from javis.train.recipes.config import OFFICIAL_SHARES, check_shares

NONE = "none"  # nothing is given
KINDS = (NONE, *OFFICIAL_SHARES)


@dataclass(frozen=True)
class ConditionMasks:
    """Masks of a batch."""

    kinds: tuple[str, ...]  # of each sample
    video: Tensor  # bool [B, T]
    audio: Tensor  # bool [B, Ta]


def draw_kind(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """One kind; ``NONE`` with the share that the others leave."""
    edges = np.cumsum(list(shares.values()))
    found = int(np.searchsorted(edges, rng.random(), side="right"))
    return list(shares)[found] if found < len(edges) else NONE


def video_mask(rng: np.random.Generator, kind: str, frames: int) -> np.ndarray:
    """Which latent frames of the picture are generated, bool [frames].

    A clip of one latent frame is generated whole, unless all of it is given (``video_to_audio``). Where a quarter is
    less than a frame it is one.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown condition mask {kind!r}; expected one of {list(KINDS)}")
    given: np.ndarray = np.zeros(frames, dtype=bool)
    if kind == "video_to_audio":
        given[:] = True
    elif kind in (NONE, "audio_to_video") or frames == 1:
        pass
    elif kind == "random":
        given = rng.random(frames) < rng.uniform(0.1, 0.9)
        given[-1] &= not given.all()  # something is left to generate
    elif kind == "interpolate":
        given[int(rng.integers(2)) :: 2] = True
    else:
        length = 1 if "image" in kind else int(rng.integers(1, max(1, frames // 4) + 1))
        if kind.endswith("_random"):
            begin = int(rng.integers(frames - length + 1))
            given[begin : begin + length] = True
        if "head" in kind or kind == "sound_image_animate":
            given[:length] = True
        if "tail" in kind:
            given[-length:] = True
    return ~given


def audio_mask(kind: str, video: np.ndarray, frames: int) -> np.ndarray:
    """Which latent frames of the sound are generated, bool [frames], where those of the picture are ``video`` [T].

    Generated whole with a given image or picture, given whole where the kind says so; otherwise what is given of the
    picture is given of the sound, at the same moments (latent frame i of ``frames`` lies in frame ``i * T // frames``).
    """
    if kind in ("audio_to_video", "sound_image_animate"):
        return np.zeros(frames, dtype=bool)
    if kind in (NONE, "video_to_audio") or kind.startswith("image_"):
        return np.ones(frames, dtype=bool)
    found: np.ndarray = video[np.arange(frames) * len(video) // frames]
    return found


def draw_masks(
    rng: np.random.Generator,
    batch: int,
    video_frames: int,
    audio_frames: int,
    shares: Mapping[str, float] = OFFICIAL_SHARES,
) -> ConditionMasks:
    """Masks of ``batch`` samples, each of a kind of its own; the same generator state gives the same masks.

    Args:
        video_frames, audio_frames: latent frames T and Ta.
        shares: kind -> share of the samples; the rest is generated whole.

    Raises:
        UsageError: shares that make no sense.
        ValueError: no frames.
    """
    check_shares(shares)
    if min(video_frames, audio_frames) < 1:
        raise ValueError(f"masks need at least one latent frame, got {video_frames} and {audio_frames}")
    kinds, videos, audios = [], [], []
    for _ in range(batch):
        kind = draw_kind(rng, shares)
        video = video_mask(rng, kind, video_frames)
        kinds.append(kind)
        videos.append(video)
        audios.append(audio_mask(kind, video, audio_frames))
    return ConditionMasks(tuple(kinds), torch.from_numpy(np.stack(videos)), torch.from_numpy(np.stack(audios)))
