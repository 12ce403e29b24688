"""Latents of clips and of their negatives, made once and read as memory maps: the data of stage 2 on the world.

A clip is drawn, its negatives are made on raw frames and samples (javis/data/negatives_world.py), and all of them go
through the codecs. Built in chunks; a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from javis.data.negatives import KINDS, Negative
from javis.data.negatives_clip import Clip
from javis.data.negatives_world import draw_scene, world_clip, world_negatives
from javis.errors import FailedError, UsageError
from javis.model.codecs import AudioCodec, VideoCodec
from javis.world import WorldConfig, caption

# Negatives of a clip by axis and modality, pictures first. All kinds of out-of-place sound: they are told apart last.
LAYOUT: dict[tuple[str, str], int] = {
    ("spatial", "video"): 1,
    ("temporal", "video"): 1,
    ("spatial", "audio"): 3,
    ("temporal", "audio"): 2,
}
SLOTS = tuple(key for key, count in LAYOUT.items() for _ in range(count))
# How often a kind is drawn beside the others of its axis and modality.
WEIGHTS = {"video_masklet": 3.0, "video_stall": 2.0, "audio_mute": 1.5, "audio_repeat": 2.0}
CAPTION_DROPS = (0.0, 0.15, 0.3, 0.5)  # attribute words left out, one caption each
CHUNK = 100  # clips per unit of work


def video_tensor(video: np.ndarray) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(video)).movedim(-1, -4).float() / 127.5 - 1


def draw_kinds(rng: np.random.Generator, have: Sequence[str]) -> list[str | None]:
    """Kinds of a clip's negatives in the order of ``LAYOUT``, different ones of those in ``have``, by their weights.

    Where a clip has too few of an axis and a modality, None stands for the rest: the same stream of another clip.
    """
    drawn: list[str | None] = []
    for (axis, modality), count in LAYOUT.items():
        kinds = [k for k in have if (KINDS[k].axis, KINDS[k].modality) == (axis, modality)]
        weights = np.array([WEIGHTS.get(kind, 1.0) for kind in kinds])
        some = min(count, len(kinds))
        picked = rng.choice(len(kinds), some, replace=False, p=weights / weights.sum()) if some else []
        drawn += [kinds[int(i)] for i in picked] + [None] * (count - some)
    return drawn


@dataclass(frozen=True)
class RawClip:
    """A clip, its negatives in the order of ``LAYOUT``, and its captions."""

    videos: np.ndarray  # uint8 [1 + 2, T, H, W, 3], the clip's own first
    sounds: np.ndarray  # float32 [1 + 5, samples], the clip's own first
    kinds: list[str | None]  # of the negatives, pictures and sounds in the order of LAYOUT
    captions: list[str]


def with_negatives(
    clip: Clip, kinds: Sequence[str | None], made: Mapping[str, Negative]
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and sounds of a clip and of the named negatives; the clip's own where there is None."""
    videos, sounds = [clip.video], [clip.waveform]
    for kind, (_, modality) in zip(kinds, SLOTS, strict=True):
        negative = made[kind] if kind is not None else None
        if modality == "video":
            videos.append(clip.video if negative is None or negative.video is None else negative.video)
        else:
            sounds.append(clip.waveform if negative is None or negative.waveform is None else negative.waveform)
    return np.stack(videos), np.stack(sounds)


def raw_clip(seed: int, *, config: WorldConfig, split: str) -> RawClip:
    """The world clip of a seed with its negatives; a pure function of its arguments."""
    scene = draw_scene(seed, config, split=split)
    clip, rng = world_clip(scene), np.random.default_rng([seed, 3])
    wanted = [kind for kind in draw_kinds(rng, tuple(KINDS)) if kind is not None]
    made = world_negatives(scene, clip, rng, kinds=wanted, split=split)
    if len(made) < len(wanted):  # rare: the clip does not have one of them
        made = world_negatives(scene, clip, rng, split=split)
        kinds = draw_kinds(rng, tuple(made))
    else:
        kinds = list(wanted)
    words = np.random.default_rng([seed, 7])
    return RawClip(
        *with_negatives(clip, kinds, made), kinds, [caption(scene, drop=drop, rng=words) for drop in CAPTION_DROPS]
    )


@dataclass
class NegativeSet:
    """Latents of clips and of their negatives, float16 memory maps; along axis 1 as in :class:`RawClip`."""

    video: np.ndarray  # [N, 1 + 2, C, T, H, W]
    audio: np.ndarray  # [N, 1 + 5, C, Ta, M]
    kinds: list[list[str | None]]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def open(cls, folder: Path) -> NegativeSet:
        """Open what :func:`build_negatives` finished."""
        facts = json.loads((folder / "done.json").read_text())
        video, audio = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("video", "audio"))
        return cls(video, audio, facts["kinds"], facts["captions"])


def build_negatives(
    folder: Path,
    video_codec: VideoCodec,
    audio_codec: AudioCodec,
    config: WorldConfig,
    *,
    clips: int,
    seed: int,
    split: str = "train",
    processes: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> NegativeSet:
    """Draw, render and encode ``clips`` world clips with their negatives; clip i has seed ``seed + i``.

    Args:
        folder: of this set alone.
        video_codec, audio_codec: on the CPU.
        config: of the clips.
        clips, seed, split: which clips.
        processes: that render; the encoding is done here.
        progress: called with the number of clips that each chunk adds.

    Raises:
        UsageError: ``folder`` holds other clips.
    """
    asked = {"clips": clips, "seed": seed, "split": split, "world": asdict(config)}
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    if plan.exists() and json.loads(plan.read_text()) != asked:
        raise UsageError(f"{folder} holds other clips than asked for; remove it or choose another folder")
    _write(plan, asked)
    if (folder / "done.json").exists():
        progress(clips)
        return NegativeSet.open(folder)
    stores: dict[str, np.ndarray] = {}
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else None
    try:
        for start in range(0, clips, CHUNK):
            stop, marker = min(start + CHUNK, clips), folder / f"chunk_{start:07d}.json"
            if not marker.exists():
                render = partial(raw_clip, config=config, split=split)
                seeds = range(seed + start, seed + stop)
                raws: Iterator[RawClip] = pool.map(render, seeds, chunksize=4) if pool else map(render, seeds)
                kinds, captions = [], []
                for offset, raw in enumerate(raws):
                    with torch.no_grad():
                        latents = {
                            "video": video_codec.encode(video_tensor(raw.videos)),
                            "audio": audio_codec.encode(torch.from_numpy(raw.sounds)),
                        }
                    for name, z in latents.items():
                        if name not in stores:
                            stores[name] = _store(folder / f"{name}.npy", (clips, *z.shape))
                        stores[name][start + offset] = z.numpy().astype(np.float16)
                    kinds.append(raw.kinds)
                    captions.append(raw.captions)
                for store in stores.values():
                    store.flush()  # type: ignore[attr-defined]
                _write(marker, {"kinds": kinds, "captions": captions})
            progress(stop - start)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    chunks = [json.loads((folder / f"chunk_{start:07d}.json").read_text()) for start in range(0, clips, CHUNK)]
    _write(folder / "done.json", {name: [x for chunk in chunks for x in chunk[name]] for name in ("kinds", "captions")})
    return NegativeSet.open(folder)


def wait_for(folder: Path, *, hours: float = 12.0) -> None:
    """Wait until another process has finished the set in ``folder``.

    Raises:
        FailedError: it has not after that time.
    """
    end = time.monotonic() + 3600 * hours
    while not (folder / "done.json").exists():
        if time.monotonic() > end:
            raise FailedError(f"{folder}: the process that makes the latents has not finished in {hours:g} hours")
        time.sleep(1)


def _store(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if path.exists():
        store = np.load(path, mmap_mode="r+")
        if store.shape == shape:
            return store
        raise UsageError(f"{path} holds latents of shape {store.shape}, not {shape}; remove its folder")
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def _write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
