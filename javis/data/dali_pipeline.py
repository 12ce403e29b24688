"""The DALI pipeline of the feeder: decode, scale, cut, resample and log-mel, on the CPU or on a GPU."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from javis.data.excerpt import EncodedExcerpt, ExcerptRequest, cover
from javis.errors import UsageError
from javis.model.mel import MelConfig

# What DALI's decoders take (its documentation of `fn.decoders.video`); what it refuses all the same is found out.
CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}


# Weights of red and blue in luma by matrix (ISO/IEC 23091-2). DALI takes BT.601's for every video.
_LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_BT601 = (0.299, 0.114)


class DaliError(Exception):
    """DALI could not run a batch; its pipeline is gone."""


class DecodedClips(NamedTuple):
    """What the pipeline made."""

    video: Tensor  # uint8 [n, T, H, W, 3]
    waveform: Tensor  # float32 [n, samples]
    mel: Tensor  # float32 [n, 1 + samples // hop, 64]
    heard: list[int]  # samples of each waveform that the file had


def require_dali() -> None:
    """Raises `UsageError` if DALI is not installed."""
    try:
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"DALI is not there ({error}); 'pip install javis[dali]' installs it on Linux, and backend='pyav' works "
            "without"
        ) from None


class DaliDecoder:
    """Decodes batches of excerpts; builds the pipeline on first use and anew after an error.

    Args:
        batch: most clips in one call.
        device: "cpu", or the GPU on which frames and mel are made.
        threads: of DALI.
        timeout: seconds for one call.
        mel: geometry of the spectrogram.
    """

    def __init__(self, batch: int, device: str, threads: int, timeout: float, mel: MelConfig) -> None:
        self.batch, self.threads, self.timeout, self.mel = batch, max(1, threads), timeout, mel
        # "cuda" alone is the GPU of this rank, not of the thread that decodes.
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.codecs = CPU_CODECS if self.device.type == "cpu" else GPU_CODECS
        self._pipelines: dict[tuple[bool, bool], Any] = {}  # by whether the sound comes encoded, and frames are scaled
        self._thread: _Thread | None = None

    def decode(self, clips: Sequence[tuple[ExcerptRequest, EncodedExcerpt]]) -> DecodedClips:
        """Clips of one shape, all with encoded sound or all with decoded sound.

        Raises:
            DaliError: one of them cannot be decoded, or it took too long. The next call begins with a new pipeline.
        """
        self._thread = self._thread or _Thread()
        try:
            return self._thread.run(lambda: self._decode(clips), self.timeout)
        except TimeoutError:
            self._thread, self._pipelines = None, {}  # both are left to themselves
            raise DaliError(f"took longer than {self.timeout:g} s") from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self._pipelines = {}
            raise DaliError(_reason(error)) from None

    def close(self) -> None:
        self._pipelines = {}
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _decode(self, clips: Sequence[tuple[ExcerptRequest, EncodedExcerpt]]) -> DecodedClips:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        encoded = isinstance(clips[0][1].sound, bytes)
        # On the CPU scaling to the same size takes longer than decoding.
        scaled = any((clip.height, clip.width) != (request.height, request.width) for request, clip in clips)
        pipeline = self._pipelines.get((encoded, scaled))
        if pipeline is None:
            pipeline = self._pipelines[encoded, scaled] = self._build(encoded, scaled)
        for name, values in _inputs(clips).items():
            if scaled or name not in ("size", "corner", "cut"):
                pipeline.feed_input(name, values)
        *outputs, heard = pipeline.run()
        made: list[Tensor] = []
        for output in outputs:
            dense = output.as_tensor()
            dtype = torch.uint8 if len(made) == 0 else torch.float32
            made.append(torch.empty(dense.shape(), dtype=dtype, device=self.device))
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            feed_ndarray(dense, made[-1], cuda_stream=stream)  # a copy: the pipeline uses its memory again
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # whoever takes the batch is on another stream
        return DecodedClips(made[0], made[1], made[2], [int(np.array(one).item()) for one in heard])

    def _build(self, encoded: bool, scaled: bool) -> Any:
        from nvidia.dali import fn, math, pipeline_def, types

        gpu, mel = self.device.type == "cuda", self.mel
        window = torch.hann_window(mel.win_length, periodic=True, dtype=torch.float64).tolist()

        @pipeline_def(  # type: ignore[untyped-decorator, unused-ignore]
            batch_size=self.batch,
            num_threads=self.threads,
            device_id=self.device.index if gpu else None,
            exec_dynamic=True,
            prefetch_queue_depth=1,
        )
        def pipeline() -> Any:
            def given(name: str, dtype: Any) -> Any:
                return fn.external_source(name=name, dtype=dtype, ndim=1)

            video = fn.decoders.video(
                given("video", types.UINT8), frames=given("frames", types.INT32), device="mixed" if gpu else "cpu"
            )
            if scaled:
                how = {"interp_type": types.INTERP_LINEAR, "antialias": True}
                video = fn.resize(video, size=given("size", types.FLOAT), **how)
                part = {"start": given("corner", types.INT32), "shape": given("cut", types.INT32)}
                video = fn.slice(video, **part, axes=[1, 2])
            if encoded:
                wave, _ = fn.decoders.audio(
                    given("sound", types.UINT8), sample_rate=float(mel.sample_rate), downmix=True, quality=80.0
                )
            else:
                wave = given("sound", types.FLOAT)
            heard = wave.shape()
            span = {"start": given("first", types.INT32), "shape": given("samples", types.INT32)}
            wave = fn.slice(wave, **span, axes=[0], out_of_bounds_policy="pad", fill_values=0.0)
            wave = wave.gpu() if gpu else wave
            # javis.model.mel.peak_normalize
            centred = wave - fn.reductions.mean(wave, axes=[0])
            peak = fn.reductions.max(math.abs(centred), axes=[0])
            loud = math.clamp(centred / (peak + 1e-8) * 0.5, -1.0, 1.0)
            # javis.model.mel.log_mel_spectrogram
            spectrum = fn.spectrogram(
                loud,
                nfft=mel.n_fft,
                window_length=mel.win_length,
                window_step=mel.hop_length,
                window_fn=window,
                power=1,
            )
            bands = fn.mel_filter_bank(
                spectrum, nfilter=mel.n_mels, sample_rate=float(mel.sample_rate), freq_low=mel.fmin, freq_high=mel.fmax
            )
            return video, wave, fn.transpose(math.log(math.max(bands, mel.floor)), perm=[1, 0]), heard

        made = pipeline()
        made.build()
        return made


def _inputs(clips: Sequence[tuple[ExcerptRequest, EncodedExcerpt]]) -> dict[str, list[Any]]:
    """The inputs of the pipeline, each a list with one array per clip."""
    inputs: dict[str, list[Any]] = {}
    for request, clip in clips:
        to = cover(clip.height, clip.width, request.height, request.width)
        encoded = isinstance(clip.sound, bytes)
        first = math.floor(clip.start * request.sample_rate + 0.5) if encoded else 0
        values = {
            "video": np.frombuffer(clip.video, np.uint8),
            "frames": clip.frames.astype(np.int32),
            "size": np.array([to.height, to.width], np.float32),
            "corner": np.array([to.top, to.left], np.int32),
            "cut": np.array([request.height, request.width], np.int32),
            "sound": np.frombuffer(clip.sound, np.uint8) if isinstance(clip.sound, bytes) else clip.sound,
            "first": np.array([first], np.int32),
            "samples": np.array([request.samples], np.int32),
        }
        for name, value in values.items():
            inputs.setdefault(name, []).append(value)
    return inputs


def recolour(video: Tensor, matrix: int) -> None:
    """Give frames uint8 [T, H, W, 3] that were decoded as BT.601 the colours of their own ``matrix``, in place."""
    if matrix not in _LUMA:
        return
    right = _to_rgb(*_LUMA[matrix]) @ torch.linalg.inv(_to_rgb(*_BT601))
    right = right.to(video.device, torch.float32)
    for frame in video:
        frame.copy_((frame.float() @ right.T).round_().clamp_(0, 255))


def _to_rgb(red: float, blue: float) -> Tensor:
    """[R, G, B] = this @ [Y, Cb, Cr] for luma = red R + green G + blue B."""
    green = 1 - red - blue
    cb, cr = 2 * (1 - blue), 2 * (1 - red)
    rows = [[1, 0, cr], [1, -blue * cb / green, -red * cr / green], [1, cb, 0]]
    return torch.tensor(rows, dtype=torch.float64)


def missing_samples(request: ExcerptRequest, clip: EncodedExcerpt, heard: int) -> int:
    """How many samples of the excerpt the file did not have, if its whole sound has ``heard``."""
    first = math.floor(clip.start * request.sample_rate + 0.5) if isinstance(clip.sound, bytes) else 0
    return request.samples - min(request.samples, max(0, heard - first))


def _reason(error: Exception) -> str:
    """DALI's message without its traceback."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [
        line for line in lines if line and not line.startswith(("Critical error", "C++ context", "Current pipeline"))
    ]
    after = told.index("encountered:") + 1 if "encountered:" in told else 0
    return f"cannot be decoded by DALI: {' '.join(told[after : after + 1])[:300]}"


class _Thread:
    """A thread that can be left behind when a call does not return."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._calls,), name="javis-dali", daemon=True).start()

    def run(self, call: Callable[[], Any], timeout: float) -> Any:
        """What ``call`` returns or raises; `TimeoutError` after ``timeout`` seconds."""
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls.put((call, reply))
        try:
            result, error = reply.get(timeout=timeout)
        except queue.Empty:
            self.end()  # should the call return one day
            raise TimeoutError from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._calls.put(None)


def _work(calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None]) -> None:
    while (job := calls.get()) is not None:
        call, reply = job
        try:
            reply.put((call(), None))
        except Exception as error:  # noqa: BLE001 - it is raised where the call was asked for
            reply.put((None, error))
        del job, call, reply  # nothing of a batch stays until the next one
