"""Sources of batches for the flow stages: drawn world clips, files of a manifest, latents made before.

Each is a ``BatchSource`` of the engine: deterministic, with a json-able position.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from javis.data.feed import Feeder, MediaBatch
from javis.errors import FailedError, UsageError
from javis.frame_size import FrameSize
from javis.model.codecs import PatchAudioCodec
from javis.train.recipes.batches import draw
from javis.train.recipes.config import Draws
from javis.train.recipes.parameters import Stage

if TYPE_CHECKING:
    from javis.durations import ClipLength
    from javis.pipeline import JavisPipeline

log = logging.getLogger("javis.train")

# Streams of random numbers of a step: each is a seed [seed, stream, step, rank] of its own.
_CLIPS, _ENCODE, _DRAW = 61, 62, 63


class ClipEncoder:
    """Frames, sound and captions -> latents and conditions, by the frozen components of a pipeline.

    Args:
        pipe: its model is not used. stage: "audio" needs no video latents and no priors.
    """

    def __init__(self, pipe: JavisPipeline, stage: Stage) -> None:
        self.pipe, self.stage = pipe, stage

    @torch.no_grad()
    def __call__(self, media: MediaBatch, seeds: list[int]) -> dict[str, Any]:
        """Latents and conditions (:mod:`javis.train.recipes.batches`); sample i draws from ``seeds[i]`` alone."""
        pipe = self.pipe
        count, frames, height, width = media.video.shape[:4]

        def each(value: float) -> Tensor:
            return torch.full((count,), float(value), device=pipe.device)

        clips: dict[str, Any] = {
            "video_sizes": tuple(pipe.video_codec.latent_sizes(frames, height, width)),
            "audio": self.audio(media, seeds),
            "fps": media.fps.to(pipe.device),
            "height": each(height),
            "width": each(width),
            "frames": each(frames),
        }
        if self.stage == "joint":
            clips["video"] = self.video(media.video, seeds)
        return clips | self.captions(media.captions, seeds)

    def captions(self, captions: list[str], seeds: list[int]) -> dict[str, Tensor]:
        """Hidden states and mask of captions, and the sampled priors of the joint stage.

        Raises:
            UsageError: words that the text encoder does not know.
        """
        pipe = self.pipe
        cleaned = pipe.captions(captions)
        text, mask = pipe.encode_text(cleaned)
        found = {"text": text.float(), "text_mask": mask}
        if self.stage == "joint" and pipe.model.config.use_prior:
            told = text if pipe.prior_text_encoder is None else pipe.encode_text(cleaned, for_prior=True)[0]
            priors = pipe.estimate_priors(told, seeds)
            found |= {"spatial_prior": priors.spatial.float(), "temporal_prior": priors.temporal.float()}
        return found

    def video(self, video: Tensor, seeds: list[int]) -> Tensor:
        """uint8 [B, T, H, W, 3] -> latents."""
        codec: Any = self.pipe.video_codec
        x = video.to(self.pipe.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        if not hasattr(codec, "image_vae"):  # the linear codec has nothing to sample
            return codec.encode(x).float()
        x = x.to(next(codec.parameters()).dtype)
        # The official code trains on samples of the posterior. Each clip draws its own, whatever batch it is in.
        return torch.cat(
            [codec.encode(x[i : i + 1], generator=self._generator(s)) for i, s in enumerate(seeds)]
        ).float()

    def audio(self, media: MediaBatch, seeds: list[int]) -> Tensor:
        """Sound of a batch -> latents."""
        codec: Any = self.pipe.audio_codec
        waves = media.waveform.to(self.pipe.device)
        if isinstance(codec, PatchAudioCodec):
            return codec.encode(waves).float()
        # The feeder made the mel already, unless these clips were drawn.
        mel = media.mel.to(self.pipe.device) if media.mel.shape[2] else codec.log_mel(waves)
        parts = [codec.encode_mel(mel[i : i + 1], generator=self._generator(s)) for i, s in enumerate(seeds)]
        return torch.cat(parts).float()

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.pipe.device).manual_seed(seed)


class _Source:
    """What the sources share: numbered steps, and what is drawn in each."""

    def __init__(self, draws: Draws, stage: Stage, seed: int, rank: int) -> None:
        self.draws, self.stage, self.seed, self.rank = draws, stage, seed, rank
        self.step = 0

    def _seeds(self, count: int) -> list[int]:
        rng = np.random.default_rng([self.seed, _ENCODE, self.step, self.rank])
        return [int(x) for x in rng.integers(2**48, size=count)]

    def _drawn(self, clips: dict[str, Any]) -> dict[str, Any]:
        seed = [self.seed, _DRAW, self.step, self.rank]
        self.step += 1
        return draw(clips, self.draws, seed, with_masks=self.stage == "joint")


class WorldSource(_Source):
    """Clips of the synthetic world, drawn when they are asked for: no file, no end.

    Args:
        size, length: of the clips; frames are square.
        clips: draw from so many scenes only (0: new ones in every step).
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        draws: Draws,
        *,
        size: FrameSize,
        length: ClipLength,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        clips: int = 0,
    ) -> None:
        from javis.world import WorldConfig

        super().__init__(draws, encoder.stage, seed, rank)
        if size.height != size.width:
            raise UsageError(f"the world draws square pictures, not {size}; give a manifest as --data")
        self.encoder, self.batch, self.clips = encoder, batch, clips
        self.world = WorldConfig(
            size=size.height,
            fps=length.fps,
            seconds=length.model_frames / length.fps,
            sample_rate=length.sample_rate,
        )

    def media(self) -> MediaBatch:
        """The clips of the current step."""
        rng = np.random.default_rng([self.seed, _CLIPS, self.step, self.rank])
        return render(rng.integers(self.clips or 2**40, size=self.batch).tolist(), self.world)

    def next(self) -> dict[str, Any]:
        return self._drawn(self.encoder(self.media(), self._seeds(self.batch)))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def render(seeds: list[int], world: Any) -> MediaBatch:
    """World clips of these seeds with their full captions. The mel is left out: the codec makes its own."""
    from javis.world import caption, render_audio, render_video, sample_scene

    scenes = [sample_scene(int(seed), world, split="train") for seed in seeds]
    return MediaBatch(
        video=torch.from_numpy(np.stack([render_video(scene) for scene in scenes])),
        waveform=torch.from_numpy(np.stack([render_audio(scene) for scene in scenes])),
        mel=torch.zeros(len(seeds), 1, 0, 64),
        fps=torch.full((len(seeds),), float(world.fps)),
        captions=[caption(scene) for scene in scenes],
        ids=[f"world-{seed}" for seed in seeds],
        indices=[int(seed) for seed in seeds],
    )


class FeederSource(_Source):
    """Clips of files, epoch after epoch.

    Raises:
        FailedError: a whole epoch without a usable clip.
    """

    def __init__(self, encoder: ClipEncoder, feeder: Feeder, draws: Draws, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(draws, encoder.stage, seed, rank)
        self.encoder, self.feeder = encoder, feeder
        self._epoch: Iterator[MediaBatch] | None = None
        self._told = 0

    def media(self) -> MediaBatch:
        """The next batch of files; a finished epoch is followed by the next one."""
        for _ in range(2):
            if self._epoch is None:
                self._epoch = iter(self.feeder)
            found = next(self._epoch, None)
            self._say_skipped()
            if found is not None:
                return found
            self._epoch = None
        last = f" (the last one: {self.feeder.skipped[-1]})" if self.feeder.skipped else ""
        raise FailedError(f"no clip of the manifest could be used{last}; 'javis data check' says what is wrong")

    def _say_skipped(self) -> None:
        new = self.feeder.skipped[self._told :]
        for clip in new:
            log.warning("left out %s: %s", clip.path, clip.reason)
        self._told += len(new)

    def next(self) -> dict[str, Any]:
        media = self.media()
        return self._drawn(self.encoder(media, self._seeds(len(media.captions))))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "feeder": self.feeder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.feeder.load_state_dict(state["feeder"])
        self._epoch = None


class StoredSource(_Source):
    """Clips that ``javis data encode`` has stored: latents and hidden states; priors are estimated here.

    Args:
        latents: a :class:`javis.data.latent_source.LatentSource`.

    Raises:
        UsageError: latents of another kind of checkpoint.
    """

    def __init__(self, encoder: ClipEncoder, latents: Any, draws: Draws, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(draws, encoder.stage, seed, rank)
        self.encoder, self.latents = encoder, latents

    def next(self) -> dict[str, Any]:
        found, pipe = self.latents.next(), self.encoder.pipe
        config = pipe.model.config
        for name, own in (("video", config.video_channels), ("audio", config.audio_channels)):
            if found[name].shape[1] != own:
                raise UsageError(
                    f"the stored {name} latents have {found[name].shape[1]} channels, the model takes {own}; encode "
                    "the clips with the checkpoint of --init"
                )
        keys = ("audio", "text", "text_mask", "fps", "height", "width", "frames")
        clips = {name: found[name].to(pipe.device) for name in keys}
        clips["video_sizes"] = tuple(found["video"].shape[2:])
        if self.stage == "joint":
            clips["video"] = found["video"].to(pipe.device)
            if config.use_prior:
                told = found["prior_text"].to(pipe.device)
                priors = pipe.estimate_priors(told, self._seeds(len(told)))
                clips |= {"spatial_prior": priors.spatial.float(), "temporal_prior": priors.temporal.float()}
        return self._drawn(clips)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "latents": self.latents.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.latents.load_state_dict(state["latents"])
