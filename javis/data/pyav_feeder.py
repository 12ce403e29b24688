"""`PyAVFeeder`: clips are decoded by FFmpeg in processes of their own, whatever their format."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from javis.data.feed import MediaBatch
from javis.data.feed_base import OrderedFeeder
from javis.data.feed_mel import batch_log_mel
from javis.data.feed_order import BatchSpec


class _Pending(NamedTuple):
    video: NDArray[np.uint8]  # [B, T, H, W, 3], filled slot by slot
    slots: list[Future[tuple[int, NDArray[np.float32]]]]  # index and sound


class PyAVFeeder(OrderedFeeder[_Pending]):
    """Batches by PyAV (`javis.data.feed.Feeder`): decoding on the CPU, log-mel on the device of the plan."""

    def _begin(self, spec: BatchSpec) -> _Pending:
        shape = spec.group.shape
        video: NDArray[np.uint8] = np.empty((shape.batch, shape.num_frames, shape.height, shape.width, 3), np.uint8)
        slots = [self.workers.submit(self._decode, spec, slot, video[slot]) for slot in range(shape.batch)]
        return _Pending(video, slots)

    def _decode(self, spec: BatchSpec, slot: int, video: NDArray[np.uint8]) -> tuple[int, NDArray[np.float32]]:
        return self._usable(spec, slot, lambda request: self.workers.decode(request, video))

    def _finish(self, spec: BatchSpec, pending: _Pending) -> MediaBatch:
        done = [slot.result() for slot in pending.slots]
        waveform = torch.from_numpy(np.stack([sound for _, sound in done])).to(self.plan.device)
        video = torch.from_numpy(pending.video).to(self.plan.device)
        seconds = spec.group.shape.num_frames / self.plan.fps
        mel = batch_log_mel(waveform, seconds, self.plan.sample_rate)
        return self._record(spec, [index for index, _ in done], video, waveform, mel)

    def _futures(self, pending: _Pending) -> Sequence[Future[Any]]:
        return pending.slots
