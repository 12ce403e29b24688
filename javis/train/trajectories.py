"""What the teacher's sampler does, recorded: latents at the ends of the windows in which a student steps.

Distillation along these needs captions only, no clips. Recorded once, read as memory maps; a killed recording goes on
where it stopped. A clip's noise, priors and guidance follow from its number.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.flow import timesteps
from javis.generation import clip_noise
from javis.model.dit import Conditioning
from javis.sample import Guidance, Order, sample_in_order
from javis.train.distill_config import DistillConfig

CHUNK = 32  # clips a recording worker makes together
CAPTION_SEED = 2_000_000_000  # world seeds of captions; they are of combinations that training may see
FILES = ("video", "audio")


def read_captions(config: DistillConfig) -> list[str]:
    """Captions of all clips, from the file over and over, or of the built-in world."""
    if config.captions is None:
        from javis.world import caption, sample_scene

        return [caption(sample_scene(CAPTION_SEED + i, split="train")) for i in range(config.clips)]
    try:
        lines = [line.strip() for line in config.captions.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--captions {config.captions}: not a readable text file in UTF-8 ({error})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError(f"--captions {config.captions}: no captions; expected one a line")
    return [lines[i % len(lines)] for i in range(config.clips)]


def guidance_of(config: DistillConfig, number: int) -> Guidance:
    """Scales of a clip, uniform over the ranges."""
    rng = np.random.default_rng([config.seed, 17, number])
    return Guidance(rng.uniform(*config.guidance), rng.uniform(*config.audio_guidance))


def seed_of(config: DistillConfig, number: int) -> int:
    """Seed of a clip's noise and priors."""
    return int(np.random.default_rng([config.seed, 18, number]).integers(2**62))


@dataclass
class Trajectories:
    """Recorded ways of ``len(captions)`` clips.

    ``parts`` is 2 with the sound first, else 1; the picture begins both from the same noise, which is recorded once.
    """

    video: np.ndarray  # [N, 1 + parts * (states - 1), Cv, T, H, W], float16: the noise, then each part's states
    audio: np.ndarray  # [N, states, Ca, Ta, M]
    captions: list[str]
    grid: list[float]  # timesteps of the states of a part, 1000 .. 0
    parts: int

    @classmethod
    def open(cls, folder: Path) -> Trajectories:
        """Open what :func:`record` finished."""
        facts = json.loads((folder / "finished.json").read_text())
        video, audio = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES)
        return cls(video, audio, facts["captions"], facts["grid"], facts["parts"])

    def __len__(self) -> int:
        return len(self.captions)

    def window(self, clip: int, part: int, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents at two states of a part, float32: video and audio at ``begin``, video and audio at ``end``.

        In the second part the sound is finished: its latents are the same at both ends.
        """

        def picture(state: int) -> np.ndarray:
            return self.video[clip, 0 if state == 0 else part * (len(self.grid) - 1) + state]

        def sound(state: int) -> np.ndarray:
            return self.audio[clip, -1 if part else state]

        found = (picture(begin), sound(begin), picture(end), sound(end))
        return tuple(torch.from_numpy(x.astype(np.float32)) for x in found)  # type: ignore[return-value]


def clip_settings(pipe: Any, config: DistillConfig) -> tuple[Any, Any, float, Order]:
    """Length, size, timestep ratio and order in which this checkpoint makes its clips."""
    from javis.generation import check_settings, codec_grid
    from javis.sample.schedules import ratio_of

    nothing = dict.fromkeys(("fps", "ratio", "steps", "guidance", "audio_guidance", "order"))
    asked = check_settings(
        pipe.description, grid=codec_grid(pipe.video_codec), seconds=config.seconds, resolution=config.resolution,
        ablate=(), batch_size=CHUNK, **nothing,
    )  # type: ignore[arg-type]  # fmt: skip
    ratio = config.timestep_ratio
    if ratio is None:
        size = {"height": asked.size.height, "width": asked.size.width, "frames": asked.length.model_frames}
        ratio = ratio_of(pipe.description["sampling"], asked.sampler, **size)
    return asked.length, asked.size, ratio, asked.order


def conditioning(
    pipe: Any, config: DistillConfig, captions: Sequence[str], numbers: Sequence[int], **options: Any
) -> Conditioning:
    """Conditioning of recorded clips; ``options`` go to ``pipe.condition`` (``guided``)."""
    length, size, _, _ = clip_settings(pipe, config)
    told = pipe.encode_prompts(pipe.captions(captions), [seed_of(config, n) for n in numbers])
    return pipe.condition(  # type: ignore[no-any-return]
        *told, frames=length.model_frames, samples=length.model_samples, size=size, fps=length.fps, **options
    )


def _sampled(pipe: Any, config: DistillConfig, captions: Sequence[str], numbers: list[int]) -> tuple[Tensor, Tensor]:
    """States of a few clips that share their guidance: [B, ...] as in :class:`Trajectories`."""
    _, _, ratio, order = clip_settings(pipe, config)
    c = pipe.model.config
    condition = conditioning(pipe, config, captions, numbers, guided=True)
    seeds = [seed_of(config, n) for n in numbers]
    start = clip_noise((c.video_channels, *condition.video_sizes), seeds, 1, pipe.device)
    noise = clip_noise((c.audio_channels, *condition.audio_sizes), seeds, 2, pipe.device)
    parts = 2 if order == "sound_first" else 1
    every = config.teacher_steps // max(config.windows)
    video, audio = [start], [noise]

    def keep(number: int, _: float, picture: Tensor, sound: Tensor) -> None:
        if (number + 1) % every == 0:
            video.append(picture)
            if number < config.teacher_steps:
                audio.append(sound)

    sample_in_order(
        pipe.model, start, noise, condition, parts * config.teacher_steps, order=order, ratio=ratio,
        guidance=guidance_of(config, numbers[0]), on_step_end=keep,
    )  # fmt: skip
    return torch.stack(video, 1), torch.stack(audio, 1)


def _record_chunk(job: tuple[DistillConfig, int, int]) -> int:
    config, start, stop = job
    folder = Path(config.out) / "trajectories"
    done = folder / f"chunk_{start:07d}.json"
    if done.exists():
        return start
    if config.device == "cpu":
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    from javis.pipeline import JavisPipeline

    pipe = JavisPipeline.from_pretrained(config.teacher, device=config.device)
    captions = json.loads((folder / "captions.json").read_text())
    stores = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in FILES]
    same = config.guidance[0] == config.guidance[1] and config.audio_guidance[0] == config.audio_guidance[1]
    size = 8 if same else 1  # clips of different scales cannot share a batch of the sampler
    for at in range(start, stop, size):
        numbers = list(range(at, min(at + size, stop)))
        found = _sampled(pipe, config, [captions[n] for n in numbers], numbers)
        for store, states in zip(stores, found, strict=True):
            store[numbers] = states.cpu().numpy().astype(np.float16)
    for store in stores:
        store.flush()
    temporary = done.with_suffix(".tmp")
    temporary.write_text("{}")
    os.replace(temporary, done)
    return start


def record(config: DistillConfig, pipe: Any) -> Trajectories:
    """Record ``config.clips`` clips into ``config.out/trajectories``; a second call goes on where the first stopped.

    Raises:
        UsageError: the folder holds a recording with other settings, or captions that the checkpoint refuses.
    """
    folder = Path(config.out) / "trajectories"
    length, size, ratio, order = clip_settings(pipe, config)
    facts = {
        "teacher": config.teacher, "clips": config.clips, "seed": config.seed, "teacher_steps": config.teacher_steps,
        "states": config.states, "size": str(size), "frames": length.frames,
        "guidance": [*config.guidance, *config.audio_guidance], "ratio": ratio, "order": order,
    }  # fmt: skip
    known = folder / "settings.json"
    if known.exists() and json.loads(known.read_text()) != facts:
        raise UsageError(f"{folder} holds a recording with other settings; remove it or choose another --out")
    if (folder / "finished.json").exists():
        return Trajectories.open(folder)
    captions = read_captions(config)
    pipe.captions(captions)  # refuse unusable ones before the work begins
    folder.mkdir(parents=True, exist_ok=True)
    c, parts = pipe.model.config, 2 if order == "sound_first" else 1
    sizes = {
        "video": (1 + parts * (config.states - 1), c.video_channels)
        + tuple(pipe.video_codec.latent_sizes(length.model_frames, *size)),
        "audio": (config.states, c.audio_channels, *pipe.audio_codec.latent_sizes(length.model_samples)),
    }
    for name, shape in sizes.items():
        if not known.exists():
            store = np.lib.format.open_memmap(
                folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=(config.clips, *shape)
            )
            store.flush()
    (folder / "captions.json").write_text(json.dumps(captions))
    known.write_text(json.dumps(facts))
    jobs = [(config, at, min(at + CHUNK, config.clips)) for at in range(0, config.clips, CHUNK)]
    if config.device == "cpu" and config.processes > 1:
        with multiprocessing.get_context("spawn").Pool(config.processes) as pool:
            for _ in pool.imap_unordered(_record_chunk, jobs):
                pass
    else:
        for job in jobs:
            _record_chunk(job)
    every = config.teacher_steps // max(config.windows)
    grid = [float(t) for t in timesteps(config.teacher_steps, ratio)[::every]] + [0.0]
    temporary = folder / "finished.tmp"
    temporary.write_text(json.dumps({"captions": captions, "grid": grid, "parts": parts}))
    os.replace(temporary, folder / "finished.json")
    return Trajectories.open(folder)
