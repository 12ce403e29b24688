"""Latents of clips and of their negatives, made once and read as memory maps: the data of stage 2 on the world.

A clip is drawn, its negatives are made on raw frames and samples (javis/data/negatives_world.py), and all of them go
through the codecs. Built in chunks; a build that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
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
from javis.errors import UsageError
from javis.model.codecs import AudioCodec, VideoCodec
from javis.world import WorldConfig, caption

VIDEO_KINDS = tuple(kind for kind, what in KINDS.items() if what.modality == "video")
AUDIO_KINDS = tuple(kind for kind, what in KINDS.items() if what.modality == "audio")
CAPTION_DROPS = (0.0, 0.15, 0.3, 0.5)  # attribute words left out, one caption each
CHUNK = 100  # clips per unit of work


def video_tensor(video: np.ndarray) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(video)).movedim(-1, -4).float() / 127.5 - 1


def slot(kind: str | None) -> int:
    """Where a kind lies among the streams of its modality; 0 is the clip itself."""
    if kind is None:
        return 0
    return 1 + (VIDEO_KINDS if kind in VIDEO_KINDS else AUDIO_KINDS).index(kind)


def streams(clip: Clip, made: dict[str, Negative]) -> tuple[np.ndarray, np.ndarray]:
    """Raw pictures uint8 [1 + 4, T, H, W, 3] and sounds float32 [1 + 7, samples]; the clip's own where one is missing."""
    videos = [clip.video, *(made[kind].video if kind in made else clip.video for kind in VIDEO_KINDS)]
    sounds = [clip.waveform, *(made[kind].waveform if kind in made else clip.waveform for kind in AUDIO_KINDS)]
    return np.stack(videos), np.stack(sounds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RawClip:
    """A world clip, its negatives and its captions."""

    videos: np.ndarray  # uint8 [1 + 4, T, H, W, 3]
    sounds: np.ndarray  # float32 [1 + 7, samples]
    have: np.ndarray  # bool [11], which kinds there are
    captions: list[str]


def raw_clip(seed: int, *, config: WorldConfig, split: str) -> RawClip:
    """The world clip of a seed with one negative of each kind; a pure function of its arguments."""
    scene = draw_scene(seed, config, split=split)
    clip = world_clip(scene)
    made = world_negatives(scene, clip, np.random.default_rng([seed, 3]), split=split)
    rng = np.random.default_rng([seed, 7])
    captions = [caption(scene, drop=drop, rng=rng) for drop in CAPTION_DROPS]
    return RawClip(*streams(clip, made), np.array([kind in made for kind in KINDS]), captions)


@dataclass
class NegativeSet:
    """Latents of clips (slot 0) and of their negatives (the slots after it), float16 memory maps."""

    video: np.ndarray  # [N, 1 + 4, C, T, H, W]
    audio: np.ndarray  # [N, 1 + 7, C, Ta, M]
    have: np.ndarray  # bool [N, 11], which kinds each clip has
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def open(cls, folder: Path) -> NegativeSet:
        """Open what :func:`build_negatives` finished."""
        facts = json.loads((folder / "done.json").read_text())
        video, audio = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("video", "audio"))
        return cls(video, audio, np.array(facts["have"], dtype=bool), facts["captions"])

    def latents(self, modality: str, index: np.ndarray, slots: np.ndarray) -> Tensor:
        """Latents of clips [B] in slots [B], float32 [B, C, ...]."""
        store = self.video if modality == "video" else self.audio
        return torch.from_numpy(store[index, slots].astype(np.float32))


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
                have, captions = [], []
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
                    have.append(raw.have.tolist())
                    captions.append(raw.captions)
                for store in stores.values():
                    store.flush()  # type: ignore[attr-defined]
                _write(marker, {"have": have, "captions": captions})
            progress(stop - start)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    chunks = [json.loads((folder / f"chunk_{start:07d}.json").read_text()) for start in range(0, clips, CHUNK)]
    _write(folder / "done.json", {name: [x for chunk in chunks for x in chunk[name]] for name in ("have", "captions")})
    return NegativeSet.open(folder)


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
