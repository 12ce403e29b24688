"""From video latents to frames, in batches that fit the memory: `VideoDecoder`.

The numbers are those of `VideoVAE.decode` over diffusers' `AutoencoderKL`, up to rounding. How it is cut into batches
does not change what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from javis.decode.image import ImageDecoderShape, Step, Upsampling, decode_whole, prepare
from javis.decode.ops import Norms, norm_silu_for
from javis.decode.temporal import decode_windows, prepare_temporal
from javis.decode.tiled import BandedDecoder, Storage
from javis.decode.work import BAND_ROWS, Batches, choose_batches, free_memory
from javis.errors import FailedError, UsageError
from javis.model.vae_temporal import VideoVAE


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How to decode. What is None is chosen from the free memory, and made smaller when the memory runs out."""

    dtype: torch.dtype | None = None  # of weights and activations; None: that of the weights
    frames_at_once: int | None = None  # micro-batch of the image decoder
    windows_at_once: int | None = None  # of the temporal one
    rows: int | None = None  # decode in bands of so many rows (javis/decode/tiled.py); None: whole frames if they fit
    storage: Storage | None = None  # of the activations between the convolutions of bands
    upsampling: Upsampling = "fused"
    norms: Norms = "auto"

    def __post_init__(self) -> None:
        for name in ("frames_at_once", "windows_at_once", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.storage is not None and self.storage not in ("device", "host"):
            raise UsageError(f"storage must be device or host, got {self.storage!r}")
        if self.upsampling not in ("fused", "plain"):
            raise UsageError(f"upsampling must be fused or plain, got {self.upsampling!r}")


def codec_parts(codec: Any) -> tuple[VideoVAE, nn.Module, float]:
    """Windows and temporal VAE, diffusers' ``AutoencoderKL`` and the factor its features are scaled by.

    ``codec``: an `OpenSoraVideoCodec`, or a `VideoVAE` whose image VAE has the autoencoder under ``vae``.

    Raises:
        UsageError: a codec of another kind.
    """
    windows = codec if isinstance(codec, VideoVAE) else getattr(codec, "temporal_vae", None)
    image: Any = getattr(codec, "image_vae", None)
    autoencoder: Any = getattr(image, "vae", None)
    if not isinstance(windows, VideoVAE) or not hasattr(autoencoder, "decoder"):
        raise UsageError(
            f"the fast decoder needs a temporal VAE over diffusers' AutoencoderKL, got {type(codec).__name__}; decode "
            "with the codec itself"
        )
    return windows, autoencoder, float(image.scaling_factor)


class VideoDecoder:
    """Fast decode of the Open-Sora VAE. Holds no weights: the codec's are read at each decode, wherever they are then.

    Args:
        codec: as in `codec_parts`.
        options: how.

    Raises:
        UsageError: a codec of another kind or architecture.
    """

    def __init__(self, codec: Any, options: DecodeOptions | None = None) -> None:
        self.codec, self.options = codec, options or DecodeOptions()
        self.shape = ImageDecoderShape.from_config(self.autoencoder.config)  # type: ignore[arg-type]

    @property
    def vae(self) -> VideoVAE:
        return codec_parts(self.codec)[0]

    @property
    def autoencoder(self) -> nn.Module:
        return codec_parts(self.codec)[1]

    # -- what it offers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, latents: Tensor, frames: int, *, keep: int | None = None) -> Tensor:
        """Normalised latents [B, C, T, H, W] -> frames [B, 3, frames, H, W] in -1..1, in the dtype of the decode.

        ``keep``: only the first so many frames, and no work on the others that can be spared; None: all.

        Raises:
            ValueError: latents of another number of frames. FailedError: out of memory, however small the batches.
        """
        batches = self.batches(latents, frames)
        features = self._features(latents, frames, batches)[:, :, :keep]
        pieces = [
            images.clamp_(-1, 1).to(features.device)  # bands may leave a frame in main memory
            for images in self._images(features.transpose(1, 2).flatten(0, 1), batches)
        ]
        return torch.cat(pieces).unflatten(0, (len(latents), -1)).transpose(1, 2)

    @torch.no_grad()
    def stream(self, latents: Tensor, frames: int, *, keep: int | None = None) -> Iterator[Tensor]:
        """Normalised latents [C, T, H, W] of one clip -> its frames, uint8 [n, H, W, 3] in main memory, chunk by chunk.

        On a GPU a chunk is handed over when the next one is already being decoded, so that whoever takes the chunks
        works beside the decode. ``keep`` as in `decode`.
        """
        batches = self.batches(latents[None], frames)
        features = self._features(latents[None], frames, batches)[0, :, :keep].transpose(0, 1)
        waiting: Callable[[], Tensor] | None = None
        for images in self._images(features, batches):
            ready = fetch(to_bytes(images))
            del images
            if waiting is not None:
                yield waiting()
            waiting = ready
        if waiting is not None:
            yield waiting()

    def batches(self, latents: Tensor, frames: int) -> Batches:
        """How a decode of latents [B, C, T, H, W] is cut up, now."""
        self._latent_lengths(latents, frames)
        dtype, device = self._target()
        height, width = (self.shape.space_factor * n for n in latents.shape[-2:])
        chosen = choose_batches(
            free_memory(device), len(latents) * frames, height, width, device=device.type, image=self.shape,
            temporal=self.vae.temporal.config, window=self.vae.micro_frame_size or frames, dtype=dtype,
            upsampling=self.options.upsampling,
        )  # fmt: skip
        o = self.options
        if o.rows is not None:
            chosen = replace(chosen, frames_at_once=1, rows=o.rows)
        elif o.frames_at_once is not None:
            chosen = replace(chosen, frames_at_once=o.frames_at_once, rows=None)
        return replace(
            chosen,
            windows_at_once=o.windows_at_once or chosen.windows_at_once,
            storage=o.storage or chosen.storage,
        )

    # -- stages -------------------------------------------------------------------------------------------------------

    def _target(self) -> tuple[torch.dtype, torch.device]:
        parameter = next(self.autoencoder.parameters())
        return self.options.dtype or parameter.dtype, parameter.device

    def _latent_lengths(self, latents: Tensor, frames: int) -> list[int]:
        """Latent frames of each window."""
        vae = self.vae
        found = [vae._latent_frames(n) for n in vae._chunks(frames)]
        if latents.ndim != 5 or latents.shape[2] != sum(found):
            raise ValueError(f"{frames} frames have {sum(found)} latent frames, got latents {list(latents.shape)}")
        return found

    def _features(self, latents: Tensor, frames: int, batches: Batches) -> Tensor:
        """Features [B, C, frames, h, w] of the image VAE, scaled back. Windows of one length share batches."""
        dtype, device = self._target()
        vae, _, scaling = codec_parts(self.codec)
        lengths, latent_lengths = vae._chunks(frames), self._latent_lengths(latents, frames)
        wide = latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        windows = (wide * vae.scale.to(wide) + vae.shift.to(wide)).to(dtype).split(latent_lengths, dim=2)
        steps = prepare_temporal(vae.temporal, dtype)
        norm_silu = norm_silu_for(self.options.norms, device)
        decoded: list[Tensor] = []
        for length in dict.fromkeys(lengths):  # whole windows, then the short one
            alike = torch.cat([window for window, n in zip(windows, lengths, strict=True) if n == length])

            def run(start: int, count: int, alike: Tensor = alike, length: int = length) -> Tensor:
                return decode_windows(steps, alike[start : start + count], length, norm_silu)

            pieces = list(in_batches(run, len(alike), batches.windows_at_once, self.options.windows_at_once is None))
            decoded += torch.cat(pieces).split(len(latents))
        return torch.cat(decoded, dim=2).div_(scaling)

    def _images(self, features: Tensor, batches: Batches) -> Iterator[Tensor]:
        """Features [N, C, h, w] -> frames [n, 3, H, W], n at a time, in order."""
        dtype, device = self._target()
        steps = prepare(self.autoencoder, dtype, upsampling=self.options.upsampling)
        norm_silu = norm_silu_for(self.options.norms, device)
        if batches.rows is None:
            done = 0
            try:
                for images in in_batches(
                    lambda start, count: decode_whole(steps, features[start : start + count], norm_silu),
                    len(features),
                    batches.frames_at_once,
                    self.options.frames_at_once is None,
                ):
                    done += len(images)
                    yield images
                    del images
                return
            except FailedError:  # not even one frame
                if self.options.frames_at_once is not None:
                    raise
            features, batches = features[done:], replace(batches, rows=BAND_ROWS)
        yield from self._in_bands(steps, features, batches)

    def _in_bands(self, steps: list[Step], features: Tensor, batches: Batches) -> Iterator[Tensor]:
        assert batches.rows is not None
        options = [(batches.rows, batches.storage)]
        if self.options.storage is None and batches.storage != "host":
            options.append((batches.rows, "host"))
        if self.options.rows is None:
            options.append((max(1, batches.rows // 4), "host"))
        for frame in features.split(1):
            while True:
                rows, storage = options[0]
                decoder = BandedDecoder(steps, rows=rows, storage=storage)
                result = attempt(lambda decoder=decoder, frame=frame: decoder(frame))  # type: ignore[misc]
                if result is not None:
                    break
                options.pop(0)
                if not options:
                    raise FailedError(
                        f"out of memory decoding a frame in bands of {rows} rows; free memory on the device, or decode "
                        "on the CPU"
                    )
            yield result
            del result


def decode_frames(
    codec: Any,
    latents: Tensor,
    frames: int,
    keep: int,
    options: DecodeOptions | None = None,
    *,
    take: Callable[[int, Iterable[Tensor]], np.ndarray] | None = None,
) -> np.ndarray:
    """Latents [B, C, T, H, W] of ``frames`` frames -> the first ``keep`` of them, uint8 [B, keep, H, W, 3].

    By `VideoDecoder` where the codec is one over `AutoencoderKL`, by the codec's own ``decode`` where it is another.

    ``take``: called with the number of each sample and its frames, chunk by chunk as they are decoded, uint8
    [n, H, W, 3] in main memory; returns them all.
    """
    join = take or (lambda number, chunks: torch.cat(list(chunks)).numpy())
    if hasattr(codec, "temporal_vae"):
        decoder = VideoDecoder(codec, options)
        return np.stack([join(i, decoder.stream(one, frames, keep=keep)) for i, one in enumerate(latents)])
    with torch.no_grad():
        video = codec.decode(latents, frames)[:, :, :keep]
        pixels = ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 4, 1).cpu()
    return pixels.numpy() if take is None else np.stack([take(i, [one]) for i, one in enumerate(pixels)])


def attempt(call: Callable[[], Tensor]) -> Tensor | None:
    """``call()``, or None if the memory ran out; nothing of the failed call stays alive."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def in_batches(run: Callable[[int, int], Tensor], total: int, size: int, may_shrink: bool) -> Iterator[Tensor]:
    """``run(start, count)`` for all of ``total``, ``size`` at a time; half as many whenever the memory runs out.

    Raises:
        FailedError: it ran out for one, or ``may_shrink`` is False.
    """
    start = 0
    while start < total:
        count = min(size, total - start)
        result = attempt(lambda start=start, count=count: run(start, count))  # type: ignore[misc]
        if result is not None:
            yield result
            del result
            start += count
        elif may_shrink and count > 1:
            size = count // 2
        else:
            raise FailedError(
                f"out of memory decoding {count} at once; decode fewer at once, in bands of rows, or in bfloat16"
            )


def to_bytes(images: Tensor) -> Tensor:
    """Frames [n, 3, H, W] in -1..1 -> uint8 [n, H, W, 3], rounded as the pipeline does."""
    return ((images.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def fetch(frames: Tensor) -> Callable[[], Tensor]:
    """Start copying to main memory; the result waits for the copy and gives it."""
    if frames.device.type != "cuda":
        return lambda: frames
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
    host.copy_(frames, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
