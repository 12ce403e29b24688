"""What a decode costs: FLOPs, bytes moved and peak memory, from sizes alone; and the batches that a memory allows.

Read next: `decode_work`, `decode_peak_bytes`, `choose_batches`. The counts follow the execution in `image.py`,
`temporal.py` and `tiled.py` step by step; tests hold them to PyTorch's FLOP counter and to the allocations of a decode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from javis.decode.image import ImageDecoderShape, Upsampling
from javis.decode.tiled import Storage
from javis.model.vae_temporal import TemporalVAEConfig

# A micro-batch of more pixels than this gains nothing: the device is busy.
ENOUGH_PIXELS = {"cuda": 8 * 512 * 512, "cpu": 256 * 256}
# Share of the free memory that is planned with. The rest is for libraries' workspaces and fragmentation.
SHARE = {"cuda": 0.6, "cpu": 0.5}
LARGEST = 2**31 - 1  # values of a tensor; libraries index convolutions with 32 bits
BAND_ROWS = 64  # of a band, where whole frames do not fit


class Work(NamedTuple):
    """Of a whole decode."""

    flops: int  # of convolutions and matrix products; a multiplication and an addition are two
    bytes: int  # each operation reads its inputs and writes its result once; norms read twice


class Layer(NamedTuple):
    """One step on one frame (image) or one window (temporal)."""

    kind: str  # conv, res, attention, up (2x in space), double (2x in time), out
    channels_in: int
    channels_out: int
    places: int  # of the input
    kernel: int = 3  # values of the kernel along one axis
    axes: int = 2  # of the kernel


def image_layers(shape: ImageDecoderShape, height: int, width: int) -> Iterator[Layer]:
    """The image decoder on features of ``height`` x ``width``."""
    widest, places = shape.widths[-1], height * width
    yield Layer("conv", shape.latent_channels, shape.latent_channels, places, kernel=1)
    yield Layer("conv", shape.latent_channels, widest, places)
    yield Layer("res", widest, widest, places)
    if shape.middle_attention:
        yield Layer("attention", widest, widest, places)
    yield Layer("res", widest, widest, places)
    before = widest
    for level, channels in enumerate(reversed(shape.widths)):
        for _ in range(shape.layers + 1):
            yield Layer("res", before, channels, places)
            before = channels
        if level + 1 < len(shape.widths):
            yield Layer("up", channels, channels, places)
            places *= 4
    yield Layer("out", before, shape.out_channels, places)


def temporal_layers(config: TemporalVAEConfig, latents: int, places: int) -> Iterator[Layer]:
    """The temporal decoder on one window of ``latents`` latent frames of ``places`` values each."""

    def res(channels_in: int, channels_out: int, volume: int) -> Iterator[Layer]:
        for i in range(config.num_res_blocks):
            yield Layer("res", channels_out if i else channels_in, channels_out, volume, axes=3)

    widths, volume = config.widths, latents * places
    before = widths[-1]
    yield Layer("conv", config.embed_dim, config.latent_embed_dim, volume, kernel=1, axes=3)
    yield Layer("conv", config.latent_embed_dim, before, volume, axes=3)
    yield from res(before, before, volume)
    for level in reversed(range(len(widths))):
        yield from res(before, widths[level], volume)
        before = widths[level]
        if level > 0 and config.temporal_downsample[level - 1]:
            yield Layer("double", before, 2 * before, volume, axes=3)
            volume *= 2
    yield Layer("out", before, config.in_out_channels, volume, axes=3)


def _layer_work(layer: Layer, item: int, fused: bool) -> tuple[int, int, int]:
    """FLOPs and bytes that grow with the batch, and bytes of weights."""
    kind, a, b, n, kernel, axes = layer
    taps = kernel**axes
    if kind == "attention":
        return 4 * n * n * a + 8 * n * a * a, 16 * n * a * item, 4 * a * a * item
    if kind == "up":
        values = (5 if fused else 13) * n * a
        return 2 * (4 if fused else 9) * a * b * 4 * n, values * item, (16 if fused else 9) * a * b * item
    convolutions = [(a, b)] if kind != "res" else [(a, b), (b, b)]
    flops = sum(2 * taps * i * o * n for i, o in convolutions)
    values = sum(i + o for i, o in convolutions) * n
    weights = sum(taps * i * o for i, o in convolutions)
    if kind == "res":
        values += 3 * (a + b) * n + 3 * b * n  # norms, and the sum with the shortcut
        if a != b:
            flops, values, weights = flops + 2 * a * b * n, values + (a + b) * n, weights + a * b
    elif kind == "out":
        values += 3 * a * n
    elif kind == "double":
        values += 2 * b * n
    if axes == 3 and kernel > 1:
        values += 2 * sum(i for i, _ in convolutions) * n  # frames in front are put there by a copy
    return flops, values * item, weights * item


def window_lengths(frames: int, window: int) -> list[int]:
    """Frames of each temporal window; the last one may be short."""
    return [min(window, frames - start) for start in range(0, frames, window)]


def decode_work(
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 1,
    image: ImageDecoderShape | None = None,
    temporal: TemporalVAEConfig | None = None,
    window: int = 17,
    dtype: torch.dtype = torch.bfloat16,
    upsampling: Upsampling = "fused",
    frames_at_once: int = 1,
) -> Work:
    """FLOPs and bytes of decoding ``batch`` clips of ``frames`` frames of ``height`` x ``width`` pixels from latents.

    Weights are counted once for each micro-batch of ``frames_at_once`` frames, and once for each window.
    """
    image, temporal = image or ImageDecoderShape(), temporal or TemporalVAEConfig()
    h, w = height // image.space_factor, width // image.space_factor
    flops = moved = 0
    rounds = -(-batch * frames // frames_at_once)
    for layer in image_layers(image, h, w):
        per_frame, values, weights = _layer_work(layer, dtype.itemsize, upsampling == "fused")
        flops, moved = flops + batch * frames * per_frame, moved + batch * frames * values + rounds * weights
    for length in window_lengths(frames, window):
        for layer in temporal_layers(temporal, -(-length // temporal.time_factor), h * w):
            per_window, values, weights = _layer_work(layer, dtype.itemsize, True)
            flops, moved = flops + batch * per_window, moved + batch * values + weights
    return Work(flops, moved)


def layer_peak(layer: Layer, fused: bool) -> int:
    """Values alive at the worst moment of one step, inputs and results included."""
    kind, a, b, n, _, axes = layer
    if kind == "attention":
        return 6 * a * n
    if kind == "up":
        return (5 if fused else 9) * a * n
    if kind == "res":
        return (max(3 * a + b, a + 3 * b) if axes == 3 else max(2 * a + b, a + 2 * b)) * n
    if kind == "out":
        return ((3 if axes == 3 else 2) * a + b) * n
    if kind == "double":
        return (a + 2 * b) * n
    return (a + b) * n


def frame_peak_bytes(
    height: int, width: int, image: ImageDecoderShape, dtype: torch.dtype, *, upsampling: Upsampling = "fused"
) -> int:
    """Peak of the image decoder for each frame of a micro-batch, decoded whole."""
    h, w = height // image.space_factor, width // image.space_factor
    return max(layer_peak(layer, upsampling == "fused") for layer in image_layers(image, h, w)) * dtype.itemsize


def band_peak_bytes(
    height: int, width: int, image: ImageDecoderShape, dtype: torch.dtype, rows: int, storage: Storage
) -> int:
    """Peak on the device of one frame in bands of ``rows`` rows."""
    h, w = height // image.space_factor, width // image.space_factor
    wide = max(4, dtype.itemsize)
    most = 0
    for kind, a, b, n, _, _ in image_layers(image, h, w):
        columns = round(w * (n / (h * w)) ** 0.5)
        band = min(n, (rows + 2) * columns)
        held = {"res": a + (b if a == b else 2 * b), "up": 5 * a, "attention": 2 * a}.get(kind, a + b) * n
        if storage == "host" and n > rows * columns:
            held = a * n if kind == "attention" else 0
        if kind == "attention":
            temporary = 6 * a * n * dtype.itemsize
        elif kind == "up":
            temporary = band * (2 * a * dtype.itemsize + 2 * b * (dtype.itemsize + wide))
        else:  # normalised rows: as stored, twice wide, padded; the result, and wide for the statistics
            temporary = band * max(
                a * (dtype.itemsize + 2 * wide), b * (2 * dtype.itemsize + wide) + a * dtype.itemsize
            )
        most = max(most, held * dtype.itemsize + temporary)
    return most


def window_peak_bytes(places: int, latents: int, temporal: TemporalVAEConfig, dtype: torch.dtype) -> int:
    """Peak of the temporal decoder for each window of a batch."""
    return max(layer_peak(layer, True) for layer in temporal_layers(temporal, latents, places)) * dtype.itemsize


@dataclass(frozen=True)
class Batches:
    """How a decode is cut up. ``rows`` None: whole frames."""

    frames_at_once: int
    windows_at_once: int
    rows: int | None = None
    storage: Storage = "device"


def decode_peak_bytes(
    frames: int,
    height: int,
    width: int,
    batches: Batches,
    *,
    batch: int = 1,
    image: ImageDecoderShape | None = None,
    temporal: TemporalVAEConfig | None = None,
    window: int = 17,
    dtype: torch.dtype = torch.bfloat16,
    upsampling: Upsampling = "fused",
    copies: bool = True,
) -> int:
    """Bytes on the device at the worst moment of `VideoDecoder.stream`, beyond the codec's own weights and the latents:
    all features, and the larger of both stages with its copy of the weights. Workspaces of libraries come on top.

    ``copies``: the weights are copied, as on a GPU or to another dtype; if not, only those that are summed or joined.
    """
    image, temporal = image or ImageDecoderShape(), temporal or TemporalVAEConfig()
    h, w = height // image.space_factor, width // image.space_factor
    lengths = window_lengths(frames, window)
    latents = -(-max(lengths) // temporal.time_factor)
    features = batch * frames * image.latent_channels * h * w * dtype.itemsize
    in_space = sum(
        _layer_work(layer, dtype.itemsize, upsampling == "fused")[2]
        for layer in image_layers(image, h, w)
        if copies or layer.kind == "attention" or (layer.kind == "up" and upsampling == "fused")
    )
    in_time = sum(_layer_work(layer, dtype.itemsize, True)[2] for layer in temporal_layers(temporal, latents, h * w))
    in_time = in_time if copies else 0
    stage_one = in_time + batches.windows_at_once * window_peak_bytes(h * w, latents, temporal, dtype)
    if batches.rows is None:
        stage_two = batches.frames_at_once * frame_peak_bytes(height, width, image, dtype, upsampling=upsampling)
    else:
        stage_two = band_peak_bytes(height, width, image, dtype, batches.rows, batches.storage)
    # Frames that wait to be taken, as bytes.
    waiting = 2 * batches.frames_at_once * height * width * image.out_channels
    return features + max(stage_one, in_space + stage_two + waiting)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device``; None where the system does not say."""
    if device.type == "meta":
        return None
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit.isdigit():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # not Linux, or no limit of its own
    if not found and hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(found)) if found else None


def choose_batches(
    free: int | None,
    frames: int,
    height: int,
    width: int,
    *,
    device: str,
    image: ImageDecoderShape | None = None,
    temporal: TemporalVAEConfig | None = None,
    window: int = 17,
    dtype: torch.dtype = torch.bfloat16,
    upsampling: Upsampling = "fused",
) -> Batches:
    """The largest micro-batches that fit into ``SHARE`` of ``free`` bytes and are of use, of nearly equal size.

    Bands of rows where not even one frame fits, and activations in main memory where not even those do.

    ``frames``: of all clips together. ``free`` None: one frame and one window at a time.
    """
    image, temporal = image or ImageDecoderShape(), temporal or TemporalVAEConfig()
    if free is None:
        return Batches(1, 1)
    usable = int(free * SHARE.get(device, 0.5))
    h, w = height // image.space_factor, width // image.space_factor
    latents = -(-min(frames, window) // temporal.time_factor)
    per_window = window_peak_bytes(h * w, latents, temporal, dtype)
    windows = max(1, min(usable // per_window, -(-frames // window)))
    per_frame = frame_peak_bytes(height, width, image, dtype, upsampling=upsampling)
    if per_frame > usable:
        fits = band_peak_bytes(height, width, image, dtype, BAND_ROWS, "device") <= usable
        return Batches(1, windows, BAND_ROWS, "device" if fits else "host")
    values = per_frame // dtype.itemsize
    most = min(usable // per_frame, -(-ENOUGH_PIXELS.get(device, 1) // (height * width)), max(1, LARGEST // values))
    rounds = -(-frames // max(1, most))
    return Batches(-(-frames // rounds), windows)
