"""`DaliFeeder`: NVIDIA DALI decodes, scales, resamples and makes the log-mel; on a GPU where the plan says so."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from javis.data.dali_pipeline import DaliDecoder, DaliError, missing_samples, recolour, require_dali
from javis.data.excerpt import BadClip, EncodedExcerpt, ExcerptRequest, Place
from javis.data.feed import MediaBatch
from javis.data.feed_base import OrderedFeeder
from javis.data.feed_mel import batch_log_mel, fit_frames, mel_config
from javis.data.feed_order import BatchSpec
from javis.errors import UsageError

if TYPE_CHECKING:
    from javis.data.feed import FeedPlan
    from javis.data.manifest import Manifest


class _Clip(NamedTuple):
    """One clip of a batch, finished."""

    video: Tensor  # uint8 [T, H, W, 3]
    waveform: Tensor  # float32 [samples]
    mel: Tensor  # float32 [1, frames, 64]


class _Read(NamedTuple):
    """A clip whose files are read."""

    request: ExcerptRequest
    files: EncodedExcerpt


class _Pending(NamedTuple):
    reads: list[Future[tuple[int, _Read | _Clip]]]
    batch: Future[MediaBatch]


def _name(place: Place) -> str:
    return place if isinstance(place, str) else f"a clip in {place.path}"


class DaliFeeder(OrderedFeeder[_Pending]):
    """Batches by DALI (`javis.data.feed.Feeder`). Files are read, and frames chosen, by worker processes.

    Args:
        manifest, plan: what to feed; ``plan.device`` is where DALI works.
        fallback: PyAV decodes what DALI cannot; otherwise such a file is a `UsageError`.

    Raises:
        UsageError: DALI is not installed.
    """

    def __init__(self, manifest: Manifest, plan: FeedPlan, *, fallback: bool = False) -> None:
        require_dali()
        super().__init__(manifest, plan)
        self.fallback = fallback
        largest = plan.batch if plan.buckets is None else max(bucket.batch for bucket in plan.buckets.buckets)
        self.decoder = DaliDecoder(
            largest, plan.device, plan.workers, plan.timeout * largest, mel_config(plan.sample_rate)
        )
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="javis-feed-batch")

    def _begin(self, spec: BatchSpec) -> _Pending:
        reads = [self.workers.submit(self._read_slot, spec, slot) for slot in range(spec.group.shape.batch)]
        return _Pending(reads, self._maker.submit(self._make, spec, reads))

    def _finish(self, spec: BatchSpec, pending: _Pending) -> MediaBatch:
        return pending.batch.result()

    def _futures(self, pending: _Pending) -> Sequence[Future[Any]]:
        return [*pending.reads, pending.batch]

    def close(self) -> None:
        if not self._closed:
            super().close()
            self._maker.shutdown(wait=False, cancel_futures=True)
            self.decoder.close()

    # -- one clip ------------------------------------------------------------------------------------------------------

    def _read_slot(self, spec: BatchSpec, slot: int) -> tuple[int, _Read | _Clip]:
        return self._usable(spec, slot, self._read)

    def _read(self, request: ExcerptRequest) -> _Read | _Clip:
        """The files of a clip, or the clip itself where PyAV has to decode it."""
        files = self.workers.read(request, self.fallback)
        if files.codec in self.decoder.codecs and files.sound is not None:
            return _Read(request, files)
        if self.fallback:
            return self._by_pyav(request)
        if files.codec in self.decoder.codecs:
            what = (
                f"{_name(request.audio_path)} holds sound that DALI does not decode; it takes wav, flac and ogg files"
            )
        else:
            known, here = sorted(self.decoder.codecs), self.decoder.device.type
            what = f"{_name(request.path)} is {files.codec}, and DALI's {here.upper()} mode decodes {', '.join(known)}"
        raise UsageError(f"{what}; use backend 'auto' or 'pyav'")

    def _by_pyav(self, request: ExcerptRequest) -> _Clip:
        video: NDArray[np.uint8] = np.empty((request.num_frames, request.height, request.width, 3), np.uint8)
        waveform = torch.from_numpy(self.workers.decode(request, video)).to(self.plan.device)
        mel = batch_log_mel(waveform[None], request.seconds, request.sample_rate)[0]
        return _Clip(torch.from_numpy(video).to(self.plan.device), waveform, mel)

    # -- a batch -------------------------------------------------------------------------------------------------------

    def _make(self, spec: BatchSpec, reads: Sequence[Future[tuple[int, _Read | _Clip]]]) -> MediaBatch:
        got = [read.result() for read in reads]
        indices = [index for index, _ in got]
        clips: dict[int, _Clip] = {slot: clip for slot, (_, clip) in enumerate(got) if isinstance(clip, _Clip)}
        for encoded in (True, False):
            slots = {
                slot: item
                for slot, (_, item) in enumerate(got)
                if isinstance(item, _Read) and isinstance(item.files.sound, bytes) is encoded
            }
            for slot, made in zip(slots, self._decode(list(slots.values()))):
                if isinstance(made, BadClip):
                    self._skip(indices[slot], str(made))
                    # The clip of the slot is known to be broken now: the first substitute that works takes its place.
                    indices[slot], clips[slot] = self._usable(spec, slot, self._alone)
                else:
                    clips[slot] = made
        video, waveform, mel = (torch.stack(list(part)) for part in zip(*(clips[slot] for slot in sorted(clips))))
        return self._record(spec, indices, video, waveform, mel)

    def _decode(self, reads: Sequence[_Read]) -> list[_Clip | BadClip]:
        """All at once; one by one if that fails, so that the broken one is found."""
        if not reads:
            return []
        with contextlib.suppress(DaliError):
            return self._decode_together(reads)
        return [self._decode_alone(read) for read in reads]

    def _decode_alone(self, read: _Read) -> _Clip | BadClip:
        try:
            return self._decode_together([read])[0]
        except DaliError as error:
            if not self.fallback:
                return BadClip(str(error))
        try:
            return self._by_pyav(read.request)
        except BadClip as error:
            return error

    def _alone(self, request: ExcerptRequest) -> _Clip:
        read = self._read(request)
        clip = self._decode_alone(read) if isinstance(read, _Read) else read
        if isinstance(clip, BadClip):
            raise clip
        return clip

    def _decode_together(self, reads: Sequence[_Read]) -> list[_Clip | BadClip]:
        made = self.decoder.decode(reads)
        request = reads[0].request
        mel = fit_frames(made.mel, self.decoder.mel.target_length(request.seconds))
        finite = made.waveform.isfinite().all(dim=1).tolist()
        clips: list[_Clip | BadClip] = []
        for slot, read in enumerate(reads):
            missing = missing_samples(read.request, read.files, made.heard[slot]) / request.sample_rate
            if missing > request.audio_gap:
                clips.append(BadClip(f"sound is missing for {missing:.3g} s of {request.seconds:.3g} s"))
            elif not finite[slot]:
                clips.append(BadClip("sound has values that are not finite"))
            else:
                recolour(made.video[slot], read.files.matrix)
                clips.append(_Clip(made.video[slot], made.waveform[slot], mel[slot]))
        return clips
