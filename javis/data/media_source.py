"""`MediaSource`: batches of files as latents and captions, made on the fly, for the training engine."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from javis.errors import FailedError

if TYPE_CHECKING:
    from javis.data.feed import Feeder, MediaBatch
    from javis.model.codecs import AudioCodec, VideoCodec
    from javis.model.text import TextEncoder


class MediaSource:
    """A feeder and the frozen parts of a pipeline as a ``BatchSource`` (`javis.train.engine`): epoch after epoch.

    Codecs that sample their latents draw from a generator of their own in every batch, so a resumed run sees the same.

    Args:
        feeder: this rank's files.
        video_codec, audio_codec, text_encoder: as the pipeline has them, on ``device``.
        seed, rank: of what the codecs draw.
    """

    def __init__(
        self,
        feeder: Feeder,
        video_codec: VideoCodec,
        audio_codec: AudioCodec,
        text_encoder: TextEncoder,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.feeder, self.device = feeder, torch.device(device)
        self.video_codec, self.audio_codec, self.text_encoder = video_codec, audio_codec, text_encoder
        self.seed, self.rank, self.step = seed, rank, 0

    def next(self) -> dict[str, Any]:
        """The next batch.

        Returns:
            ``video`` [B, Cv, T, H, W] and ``audio`` [B, Ca, Ta, M], clean latents, float32; ``text`` [B, L, C],
            ``text_mask`` bool [B, L]; ``fps``, ``height``, ``width``, ``frames`` [B]: of the clips, in pixels;
            ``captions``, ``ids``: lists.

        Raises:
            FailedError: an epoch without a batch.
        """
        media = self._media()
        made = self.encode(media)
        self.step += 1
        return made

    @torch.no_grad()
    def encode(self, media: MediaBatch) -> dict[str, Any]:
        """Latents and captions of a batch; see `next`."""
        count, frames, height, width = media.video.shape[:4]
        video = media.video.to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        text, mask = self.text_encoder(media.captions)

        def each(value: float) -> Tensor:
            return torch.full((count,), float(value), device=self.device)

        return {
            "video": self._latents(self.video_codec, video, 0),
            "audio": self._latents(self.audio_codec, media.waveform.to(self.device), 1),
            "text": text.to(self.device).float(),
            "text_mask": mask.to(self.device),
            "fps": media.fps.to(self.device),
            "height": each(height),
            "width": each(width),
            "frames": each(frames),
            "captions": media.captions,
            "ids": media.ids,
        }

    def _latents(self, codec: Any, x: Tensor, stream: int) -> Tensor:
        if isinstance(codec, torch.nn.Module):
            weights = next((p for p in codec.parameters() if p.is_floating_point()), None)
            x = x if weights is None else x.to(weights.dtype)
        if "generator" not in inspect.signature(codec.encode).parameters:
            return codec.encode(x).float()  # type: ignore[no-any-return]
        seed = np.random.SeedSequence([self.seed, self.step, self.rank, stream]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(self.device).manual_seed(int(seed) % 2**63)
        return codec.encode(x, generator=generator).float()  # type: ignore[no-any-return]

    def _media(self) -> MediaBatch:
        try:
            return next(iter(self.feeder))
        except StopIteration:
            raise FailedError("the feeder has no batch in a whole epoch; look at its list of skipped clips") from None

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the position in the data, and how many batches were made."""
        return {"step": self.step, "feeder": self.feeder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly there. Raises `UsageError` if the state is of other data."""
        self.feeder.load_state_dict(state["feeder"])
        self.step = int(state["step"])

    def close(self) -> None:
        """End the feeder."""
        self.feeder.close()
