"""Stage 2 as a task of the engine: the estimator with its contrastive loss, and batches of clips with negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from javis.model.prior import PriorEstimator
from javis.train.prior_latents import SLOTS, NegativeSet

AXES = ("spatial", "temporal")
MODALITIES = ("video", "audio")


class PriorModule(nn.Module):
    """Estimator plus loss in one ``forward``, as the engine wants it; batches as of :class:`NegativeBatches`."""

    def __init__(self, estimator: PriorEstimator) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """-> "loss" and its terms by name, scalars."""
        negatives = {m: {axis: batch[f"{axis}_{m}"] for axis in AXES if f"{axis}_{m}" in batch} for m in MODALITIES}
        loss = self.estimator.loss(
            self.estimator.encode(batch["text"], noise=batch["noise"]),
            batch["video"],
            batch["audio"],
            neg_videos=negatives["video"],
            neg_audios=negatives["audio"],
            frame_height=batch["frame_height"],
            frame_width=batch["frame_width"],
        )
        return {"loss": loss.total, **{name.removesuffix("_loss"): value for name, value in loss.parts().items()}}


class PriorTask:
    """What stage 2 trains: all of the estimator."""

    def __init__(self, estimator: PriorEstimator) -> None:
        self.module = PriorModule(estimator)

    def blocks(self) -> list[nn.Module]:
        transformer = self.module.estimator.prior_extractor
        return [*transformer.encoder.layers, *transformer.decoder.layers]


class NegativeBatches:
    """Batches of a :class:`NegativeSet`, a pure function of (seed, step, rank).

    A batch holds "video" [B, C, T, H, W], "audio" [B, C, Ta, M], "text" [B, L, channels], "noise" [B, Ns+Nt, C],
    "frame_height", "frame_width" [B], and the negatives "spatial_video" and "temporal_video" [B, n, C, T, H, W],
    "spatial_audio" and "temporal_audio" [B, n, C, Ta, M].
    """

    def __init__(
        self,
        data: NegativeSet,
        encode_text: Callable[[list[str]], Tensor],
        noise_shape: tuple[int, int],
        *,
        batch: int,
        frame: tuple[int, int],
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        full_captions: float = 0.7,
    ) -> None:
        """
        Args:
            data: clips and negatives.
            encode_text: captions -> hidden states [B, L, channels].
            noise_shape: (tokens, channels) of the priors.
            batch: clips of one rank.
            frame: (height, width) in pixels.
            full_captions: share of full captions; the rest lacks words.
        """
        self.data, self.encode_text, self.noise_shape = data, encode_text, noise_shape
        self.batch, self.frame, self.seed, self.rank, self.world = batch, frame, seed, rank, world
        self.full_captions = full_captions
        self.step = 0

    def next(self) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 17, self.step])
        index = rng.integers(0, len(self.data), (self.world, self.batch))[self.rank]
        rng = np.random.default_rng([self.seed, 19, self.step, self.rank])
        self.step += 1
        return self.make(index, rng)

    def make(self, index: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """The batch of the given clips."""
        count, data = len(index), self.data
        variants = np.where(rng.random(count) < self.full_captions, 0, rng.integers(1, len(data.captions[0]), count))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch: dict[str, Any] = {
            "text": self.encode_text([data.captions[i][v] for i, v in zip(index, variants, strict=True)]),
            "noise": torch.randn((count, *self.noise_shape), generator=generator),
            "frame_height": torch.full((count,), float(self.frame[0])),
            "frame_width": torch.full((count,), float(self.frame[1])),
        }
        kinds = [data.kinds[i] for i in index]
        return batch | gather("video", data.video, index, kinds) | gather("audio", data.audio, index, kinds)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])


def gather(
    modality: str, store: np.ndarray, index: np.ndarray, kinds: Sequence[Sequence[str | None]]
) -> dict[str, Tensor]:
    """One stream of a batch: the clips and, by axis, their negatives.

    Args:
        modality: "video" or "audio".
        store: latents [N, 1 + negatives of that modality, C, ...], the clip's own first, then in the order of SLOTS.
        index: clips of the batch, [B].
        kinds: what the negatives of each of them are; for None the same stream of another clip of the batch is taken.

    Returns:
        modality -> [B, C, ...] and "<axis>_<modality>" -> [B, n, C, ...], float32.
    """
    found = {modality: _floats(store[index, 0])}
    parts: dict[str, list[Tensor]] = {}
    other, place = np.roll(index, 1), 0
    for number, (axis, of) in enumerate(SLOTS):
        if of == modality:
            place += 1
            there = np.array([row[number] is not None for row in kinds])
            latents = store[np.where(there, index, other), np.where(there, place, 0)]
            parts.setdefault(f"{axis}_{modality}", []).append(_floats(latents))
    return found | {name: torch.stack(values, dim=1) for name, values in parts.items()}


def _floats(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(x, dtype=np.float32))
