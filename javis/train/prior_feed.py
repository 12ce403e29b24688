"""Stage 2 on files, a manifest or shards: negatives are made as the clips come (javis/data/negatives_clip.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from javis.data.buckets import BucketPlan
from javis.data.feed import Feeder, MediaBatch
from javis.data.negatives import KINDS, Negative, NoNegative
from javis.data.negatives_clip import Clip, Material, describe, make_negative, material_of
from javis.data.shards import holds_clips
from javis.errors import UsageError
from javis.train.prior_latents import draw_kinds, with_negatives
from javis.train.prior_task import gather
from javis.train.recipes.config import Draws
from javis.train.recipes.sources import ClipEncoder, FeederSource

if TYPE_CHECKING:
    from javis.train.prior_recipe import PriorRecipe

Separate = Callable[[np.ndarray, int], list[np.ndarray]]  # (waveform, rate) -> the sources apart


def check_data(recipe: PriorRecipe) -> None:
    """Whether negatives can be made of what a recipe names.

    Raises:
        UsageError: there are no clips, only latents, or batches of one clip.
    """
    if not holds_clips(recipe.data):
        if "://" in recipe.data or Path(recipe.data).is_dir():
            raise UsageError(
                f"data {recipe.data!r} holds no clips; stage 2 makes its negatives of pictures and sound, which "
                "encoded clips have no more: give the manifest (.csv) or the shards that they were encoded from"
            )
        raise UsageError(f"data {recipe.data!r}: expected 'world', a manifest (.csv), or shards")
    least = recipe.batch
    if recipe.buckets is not None:
        buckets = BucketPlan.parse(recipe.buckets).buckets
        least = min(bucket.batch for bucket in buckets)
        if any(bucket.num_frames < 2 for bucket in buckets):
            raise UsageError(f"buckets {recipe.buckets}: pictures have no negatives; give each at least two frames")
    if least < 2:
        raise UsageError("negatives are made of other clips of the batch: expected at least 2 in each, got 1")


def clip_negatives(clip: Clip, others: list[Clip], rng: np.random.Generator) -> tuple[list[str | None], dict[str, Any]]:
    """Kinds in the order of ``SLOTS`` and the negatives of a clip, with material from the first fitting other clip."""
    found = [material_of(other, rng) for other in others[:4]]
    masklet = next((m.masklet for m in found if m.masklet is not None), None)
    have, made = list(KINDS), dict[str, Negative]()
    while True:
        kinds = draw_kinds(rng, have)
        failed = []
        for kind in kinds:
            if kind is None or kind in made:
                continue
            # What this clip sounds like already is not added to it; then another clip's sound is tried.
            sounds = found if kind == "audio_add" else found[:1]
            for source in sounds or [Material(None, None)]:
                try:
                    material = Material(masklet, source.source, source.source_events)
                    made[kind] = make_negative(kind, clip, material, rng)
                    break
                except NoNegative:
                    continue
            else:
                failed.append(kind)
        if not failed:
            return kinds, made
        have = [kind for kind in have if kind not in failed]


class FeederBatches:
    """Batches as of :class:`javis.train.prior_task.NegativeBatches`, from the files of a feeder.

    Args:
        encoder: brings frames and sound to latents.
        feeder: see javis/data/feed.py; its batches hold at least two clips.
        encode_text: captions -> hidden states [B, L, channels].
        noise_shape: (tokens, channels) of the priors.
        separate: source separation, for audio_delete; without it that kind is left out.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        feeder: Feeder,
        encode_text: Callable[[list[str]], Tensor],
        noise_shape: tuple[int, int],
        *,
        seed: int = 0,
        rank: int = 0,
        separate: Separate | None = None,
    ) -> None:
        self.encoder, self.encode_text, self.noise_shape = encoder, encode_text, noise_shape
        self.seed, self.rank, self.separate = seed, rank, separate
        self.files = FeederSource(encoder, feeder, Draws(), seed=seed, rank=rank)

    def next(self) -> dict[str, Any]:
        media = self.files.media()
        rng = np.random.default_rng([self.seed, 29, self.files.step, self.rank])
        self.files.step += 1
        clips = self._clips(media)
        videos, sounds, kinds = [], [], []
        for number, clip in enumerate(clips):
            chosen, made = clip_negatives(clip, clips[number + 1 :] + clips[:number], rng)
            video, sound = with_negatives(clip, chosen, made)
            videos.append(video)
            sounds.append(sound)
            kinds.append(chosen)
        count = len(clips)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        size = media.video.shape[2:4]
        batch: dict[str, Any] = {
            "text": self.encode_text(media.captions),
            "noise": torch.randn((count, *self.noise_shape), generator=generator),
            "frame_height": torch.full((count,), float(size[0])),
            "frame_width": torch.full((count,), float(size[1])),
        }
        latents = self._encode(media, np.stack(videos), np.stack(sounds), rng)
        for modality, store in latents.items():
            batch |= gather(modality, store, np.arange(count), kinds)
        return batch

    def _clips(self, media: MediaBatch) -> list[Clip]:
        clips = []
        for number in range(len(media.captions)):
            wave, fps = media.waveform[number].cpu().numpy(), float(media.fps[number])
            rate = round(len(wave) * fps / media.video.shape[1])
            stems = self.separate(wave, rate) if self.separate is not None else ()
            clips.append(describe(media.video[number].cpu().numpy(), wave, fps=fps, rate=rate, stems=stems))
        return clips

    @torch.no_grad()
    def _encode(
        self, media: MediaBatch, videos: np.ndarray, sounds: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Latents of all pictures [B, 1 + n, ...] and of all sounds."""
        flat = torch.from_numpy(sounds).flatten(0, 1)
        # No mel: that of the feeder is of the clips themselves, so that the codec makes its own for all.
        sound = MediaBatch(media.video, flat, flat.new_zeros(len(flat), 1, 0, 64), media.fps, [], [], [])
        pictures = torch.from_numpy(videos).flatten(0, 1)
        video = self.encoder.video(pictures, [int(x) for x in rng.integers(2**48, size=len(pictures))])
        audio = self.encoder.audio(sound, [int(x) for x in rng.integers(2**48, size=len(flat))])
        return {
            "video": video.cpu().unflatten(0, videos.shape[:2]).numpy(),
            "audio": audio.cpu().unflatten(0, sounds.shape[:2]).numpy(),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.files.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.files.load_state_dict(state)
