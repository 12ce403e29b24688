"""Precomputed latents of world clips: built once, in parallel, resumable; read as memory maps."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from javis.errors import UsageError
from javis.model.codecs import PatchAudioCodec, PatchVideoCodec, build_codecs, codec_config
from javis.world import WorldConfig, caption, render_audio, render_video, sample_scene

CAPTION_VARIANTS = 4  # the full caption and three with attribute words left out
CHUNK = 250  # clips per unit of work


def render_batch(seeds: list[int], config: WorldConfig, split: str = "train") -> tuple[Tensor, Tensor, list[list[str]]]:
    """Render world clips: video [B, 3, T, H, W] in -1..1, audio [B, samples], caption variants."""
    scenes = [sample_scene(seed, config, split=split) for seed in seeds]  # type: ignore[arg-type]
    video = torch.from_numpy(np.stack([render_video(scene) for scene in scenes]))
    audio = torch.from_numpy(np.stack([render_audio(scene) for scene in scenes]))
    captions = []
    for seed, scene in zip(seeds, scenes, strict=True):
        rng = np.random.default_rng([seed, 7])
        drops = (0.0, 0.15, 0.3, 0.5)[:CAPTION_VARIANTS]
        captions.append([caption(scene, drop=drop, rng=rng) for drop in drops])
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1, audio, captions


def fit_codecs(video: PatchVideoCodec, audio: PatchAudioCodec, config: WorldConfig, clips: int, seed: int) -> None:
    """Fit the linear transforms to ``clips`` world clips."""
    frames, waves, _ = render_batch(list(range(seed, seed + clips)), config)
    video.transform.fit(frames)
    audio.transform.fit(audio.log_mel(waves))


def save_codecs(path: Path, video: PatchVideoCodec, audio: PatchAudioCodec) -> None:
    """Weights of both codecs to one safetensors file with their configuration beside it, atomically."""
    state = {f"video.{k}": v.contiguous() for k, v in video.state_dict().items()}
    state |= {f"audio.{k}": v.contiguous() for k, v in audio.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    path.with_suffix(".json").write_text(json.dumps(codec_config(video, audio), indent=1))
    save_file(state, temporary)
    os.replace(temporary, path)


def load_codecs(path: Path) -> tuple[PatchVideoCodec, PatchAudioCodec]:
    """Inverse of :func:`save_codecs`."""
    video, audio = build_codecs(json.loads(path.with_suffix(".json").read_text()))
    state = load_file(path)
    video.load_state_dict({k.removeprefix("video."): v for k, v in state.items() if k.startswith("video.")})
    audio.load_state_dict({k.removeprefix("audio."): v for k, v in state.items() if k.startswith("audio.")})
    return video.eval(), audio.eval()


@dataclass
class LatentSet:
    """Latents of clips, float16 memory maps, with caption variants."""

    video: np.ndarray  # [N, Cv, T, H, W]
    audio: np.ndarray  # [N, Ca, Ta, M]
    captions: list[list[str]]

    @classmethod
    def open(cls, folder: Path) -> LatentSet:
        """Open what :func:`build_latents` finished."""
        captions: list[list[str]] = json.loads((folder / "captions.json").read_text())
        video = np.load(folder / "video.npy", mmap_mode="r")
        return cls(video, np.load(folder / "audio.npy", mmap_mode="r"), captions)

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Latents of the given clips in float32."""
        video, audio = self.video[index].astype(np.float32), self.audio[index].astype(np.float32)
        return torch.from_numpy(video), torch.from_numpy(audio)


def _encode_chunk(job: tuple[str, int, int, int, WorldConfig, str]) -> int:
    folder, start, stop, seed, config, split = job
    done = Path(folder) / f"chunk_{start:07d}.json"
    if done.exists():
        return start
    torch.set_num_threads(1)
    video_codec, audio_codec = load_codecs(Path(folder) / "codecs.safetensors")
    video, audio, captions = render_batch(list(range(seed + start, seed + stop)), config, split)
    with torch.no_grad():
        for name, z in (("video", video_codec.encode(video)), ("audio", audio_codec.encode(audio))):
            store = np.load(Path(folder) / f"{name}.npy", mmap_mode="r+")
            store[start:stop] = z.numpy().astype(np.float16)
            store.flush()
    temporary = done.with_suffix(".tmp")
    temporary.write_text(json.dumps(captions))
    os.replace(temporary, done)
    return start


def build_latents(
    folder: Path,
    video_codec: PatchVideoCodec,
    audio_codec: PatchAudioCodec,
    config: WorldConfig,
    *,
    clips: int,
    seed: int,
    processes: int,
    split: str = "train",
) -> LatentSet:
    """Render and encode ``clips`` world clips into ``folder``; a second call goes on where the first stopped.

    Raises:
        UsageError: ``folder`` holds finished latents of other sizes.
    """
    frames = round(config.seconds * config.fps)
    video_sizes = video_codec.latent_sizes(frames, config.size, config.size)
    audio_sizes = audio_codec.latent_sizes(round(config.seconds * config.sample_rate))
    shapes = {
        "video": (clips, video_codec.config.coefficients, *video_sizes),
        "audio": (clips, audio_codec.config.coefficients, *audio_sizes),
    }
    if (folder / "captions.json").exists():
        finished = LatentSet.open(folder)
        if (finished.video.shape, finished.audio.shape) != (shapes["video"], shapes["audio"]):
            raise UsageError(
                f"{folder} holds latents of shapes {finished.video.shape} and {finished.audio.shape}, but the "
                f"configuration asks for {shapes['video']} and {shapes['audio']}; remove it or choose another folder"
            )
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "codecs.safetensors").exists():
        save_codecs(folder / "codecs.safetensors", video_codec, audio_codec)
    for name, shape in shapes.items():
        path = folder / f"{name}.npy"
        if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
            for marker in folder.glob("chunk_*.json"):  # their latents are gone
                marker.unlink()
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape).flush()
    starts = range(0, clips, CHUNK)
    jobs = [(str(folder), start, min(start + CHUNK, clips), seed, config, split) for start in starts]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(_encode_chunk, jobs):
            pass
    captions: list[list[str]] = []
    for start in starts:
        captions += json.loads((folder / f"chunk_{start:07d}.json").read_text())
    temporary = folder / "captions.tmp"
    temporary.write_text(json.dumps(captions))
    os.replace(temporary, folder / "captions.json")
    return LatentSet.open(folder)
