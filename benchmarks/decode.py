"""Decoding video latents to frames: the codec as it stands (eager), and `javis.decode`, step by step.

    python -m benchmarks.decode                                    on the CPU: full-size decoders, few small frames
    python -m benchmarks.decode --device cuda --clips 512x512 720p
    python -m benchmarks.decode --quick                            a toy size, to try the script

The weights are random; the eager image decoder is that of benchmarks/baselines/image_decoder.py, equal to diffusers' to
the bit. First every variant is held to the error budget at toy size. Then the variants take turns in random order.

| variant | what |
|---|---|
| eager | the codec's own decode: windows one by one, four frames at once, as the official code does |
| channels_last | the same with weights and activations channels-last |
| norms | `VideoDecoder` with plain upsampling: fused norms, windows in one batch, batches from the free memory |
| ours | + upsampling and convolution in one |
| bands | ours in bands of 64 rows, for small cards |

Appends one row per clip, dtype and variant to benchmarks/results/<device>.jsonl. ``conv_tflop_per_s`` is what one
convolution of 512 channels alone reaches between the variants, and ``times_eager_bound`` how many times as fast as
eager a variant would be if all of its operations ran at that rate and nothing else took time. ``cpu_s`` is the time of
the processor, which other processes on the machine do not lengthen. ``peak_bytes`` (on a GPU) is what the decode
allocated beyond what was there before; ``predicted_bytes`` is `decode_peak_bytes`.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.image_decoder import AutoencoderDecoder
from javis import bench
from javis.bench import append_rows, environment
from javis.decode import Batches, DecodeOptions, ImageDecoderShape, VideoDecoder, decode_peak_bytes, decode_work
from javis.errors import UsageError
from javis.kernels.testing import assert_within_budget
from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig, VideoVAE
from javis.timing import quantile

Row = dict[str, Any]
VARIANTS = ("eager", "channels_last", "norms", "ours", "bands")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What is decoded, and by which sizes of the codec."""

    frames: int
    height: int
    width: int
    image: ImageDecoderShape = field(default_factory=ImageDecoderShape)
    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)


TOY = Clip(
    frames=20, height=32, width=48,
    image=ImageDecoderShape(widths=(16, 16, 32, 32), layers=1, groups=8),
    temporal=TemporalVAEConfig(filters=16, num_res_blocks=1, num_groups=8),
)  # fmt: skip
CLIPS = {
    "small": Clip(frames=17, height=64, width=64),
    "240p": Clip(frames=51, height=240, width=424),
    "512x512": Clip(frames=51, height=512, width=512),
    "720p": Clip(frames=51, height=720, width=1280),
}


class EagerImageVAE:
    """Four frames at once, as the official configuration has it."""

    space_factor, scaling_factor, micro_batch = 8, 0.18215, 4

    def __init__(self, vae: AutoencoderDecoder) -> None:
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        raise UsageError("this image VAE has a decoder alone, since only decoding is measured; decode with it")

    def decode(self, features: Tensor) -> Tensor:
        pieces = (features / self.scaling_factor).split(self.micro_batch)
        return torch.cat([self.vae.decode(piece).sample for piece in pieces])


class ChannelsLastImageVAE(EagerImageVAE):
    """The same in the other layout."""

    def decode(self, features: Tensor) -> Tensor:
        return super().decode(features.contiguous(memory_format=torch.channels_last))


def make_codec(clip: Clip, dtype: torch.dtype, device: str, *, channels_last: bool = False) -> VideoVAE:
    """Random weights, the same for every dtype."""
    shape = clip.image
    with torch.device(device):
        image = AutoencoderDecoder(shape.widths, shape.layers, shape.groups, shape.latent_channels)
        temporal = TemporalVAE(clip.temporal)
    generator = torch.Generator(device).manual_seed(0)
    for module in (image, temporal):
        for parameter in module.eval().requires_grad_(False).parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            small = noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1 * noise + (parameter != 0)
            parameter.copy_(small.bfloat16())
    image, temporal = image.to(dtype), temporal.to(dtype)
    if channels_last:
        image, temporal = image.to(memory_format=torch.channels_last), copy.deepcopy(temporal)
        for parameter in temporal.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    wrapped = (ChannelsLastImageVAE if channels_last else EagerImageVAE)(image)
    return VideoVAE(temporal, shift=0.1, scale=3.0, micro_frame_size=17, image_vae=wrapped).to(device)


def make_decoder(variant: str, clip: Clip, dtype: torch.dtype, device: str) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The decode of a variant, and its `VideoDecoder` if it has one."""
    codec = make_codec(clip, dtype, device, channels_last=variant == "channels_last")
    if variant in ("eager", "channels_last"):

        def decode(z: Tensor) -> Tensor:
            if variant == "channels_last":
                z = z.contiguous(memory_format=torch.channels_last_3d)
            with torch.no_grad():
                return codec.decode(z, clip.frames).clamp_(-1, 1)

        return decode, None
    options = DecodeOptions(
        upsampling="plain" if variant == "norms" else "fused", rows=64 if variant == "bands" else None
    )
    decoder = VideoDecoder(codec, options)
    return lambda z: decoder.decode(z, clip.frames), decoder


def make_latents(clip: Clip, dtype: torch.dtype, device: str) -> Tensor:
    """Normalised latents of one clip, the same for every dtype."""
    lengths = [min(17, clip.frames - start) for start in range(0, clip.frames, 17)]
    count = sum(-(-n // clip.temporal.time_factor) for n in lengths)
    shape = (1, 4, count, clip.height // clip.image.space_factor, clip.width // clip.image.space_factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device, dtype)


def gate(variants: Sequence[str], dtype: torch.dtype, device: str) -> None:
    """Every variant within the error budget at toy size: at most twice as far from float64 as eager in its dtype.

    Raises:
        AssertionError: one is not; nothing is timed.
    """
    results = {
        v: make_decoder(v, TOY, dtype, device)[0](make_latents(TOY, dtype, device)) for v in {*variants, "eager"}
    }
    exact = make_decoder("eager", TOY, torch.float64, device)[0](make_latents(TOY, torch.float64, device))
    for variant, result in results.items():
        assert_within_budget(f"{variant}, {dtype}", result, exact, results["eager"])


class Runner:
    """One variant on one clip."""

    def __init__(self, variant: str, clip: Clip, dtype: torch.dtype, device: str) -> None:
        self.device, self.z = device, make_latents(clip, dtype, device)
        self.decode, self.decoder = make_decoder(variant, clip, dtype, device)
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.peak: int | None = None

    def __call__(self) -> Tensor:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started, cpu = time.perf_counter(), time.process_time()
        frames = self.decode(self.z)
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - before
        self.seconds.append(time.perf_counter() - started)
        self.cpu.append(time.process_time() - cpu)
        return frames


class Convolution:
    """The kind of convolution that a decode consists of, alone: what it does a second bounds every variant."""

    def __init__(self, clip: Clip, dtype: torch.dtype, device: str) -> None:
        width = clip.image.widths[-1]
        self.device = device
        self.x = torch.randn(4, width, 64, 64, device=device).to(dtype).to(memory_format=torch.channels_last)
        self.weight = torch.randn(width, width, 3, 3, device=device).to(self.x).to(memory_format=torch.channels_last)
        self.flops = 2 * 9 * width * self.x.numel()
        self.seconds: list[float] = []

    def __call__(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            torch.nn.functional.conv2d(self.x, self.weight, padding=1)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


def predicted(clip: Clip, dtype: torch.dtype, runner: Runner) -> int | None:
    """What `decode_peak_bytes` says of the batches that were chosen; with all frames, which this benchmark keeps."""
    if runner.decoder is None:
        return None
    batches: Batches = runner.decoder.batches(runner.z, clip.frames)
    kept = 2 * clip.frames * clip.height * clip.width * 3 * dtype.itemsize  # the pieces, and all of them joined
    peak = decode_peak_bytes(
        clip.frames, clip.height, clip.width, batches, image=clip.image, temporal=clip.temporal, dtype=dtype,
        upsampling=runner.decoder.options.upsampling, copies=runner.device == "cuda",
    )  # fmt: skip
    return max(peak + kept // 2, kept)


def measure(name: str, dtype: torch.dtype, args: argparse.Namespace) -> list[Row]:
    """Rows of one clip in one dtype."""
    clip = TOY if args.quick else CLIPS[name]
    gate(args.variants, dtype, args.device)
    runners = {variant: Runner(variant, clip, dtype, args.device) for variant in args.variants}
    frames = {variant: runner() for variant, runner in runners.items()}  # and warm-up
    reference = frames.get("eager")
    gaps = {v: None if reference is None else float((f - reference).abs().max()) for v, f in frames.items()}
    del frames, reference
    for runner in runners.values():
        runner.seconds.clear()
        runner.cpu.clear()
    convolution = Convolution(clip, dtype, args.device)
    convolution()
    convolution.seconds.clear()
    order, turn, started = random.Random(0), 0, time.perf_counter()
    while turn < args.repeats and (turn < 1 or time.perf_counter() - started < args.limit):
        for runner in order.sample(list(runners.values()), len(runners)):
            runner()
            convolution()
        turn += 1
    rate = convolution.flops / quantile(convolution.seconds, 0.5)
    rows = []
    eager = quantile(runners["eager"].seconds, 0.5) if "eager" in runners else None
    eager_cpu = quantile(runners["eager"].cpu, 0.5) if "eager" in runners else None
    for variant, runner in runners.items():
        seconds, cpu = (quantile(values, 0.5) for values in (runner.seconds, runner.cpu))
        fused = runner.decoder is not None and runner.decoder.options.upsampling == "fused"
        work = decode_work(
            clip.frames, clip.height, clip.width, image=clip.image, temporal=clip.temporal, dtype=dtype,
            upsampling="fused" if fused else "plain",
        )  # fmt: skip
        rows.append(
            {
                "bench": "decode",
                "clip": "toy" if args.quick else name,
                "variant": variant,
                "dtype": str(dtype).removeprefix("torch."),
                "frames": clip.frames,
                "height": clip.height,
                "width": clip.width,
                "p20_s": round(quantile(runner.seconds, 0.2), 4),
                "p50_s": round(seconds, 4),
                "p80_s": round(quantile(runner.seconds, 0.8), 4),
                "cpu_s": round(cpu, 4) if args.device == "cpu" else None,
                "samples": len(runner.seconds),
                "times_eager": None if eager is None else round(eager / seconds, 3),
                "times_eager_cpu": round(eager_cpu / cpu, 3) if eager_cpu and args.device == "cpu" else None,
                "tflop": round(work.flops / 1e12, 4),
                "tflop_per_s": round(work.flops / seconds / 1e12, 4),
                "conv_tflop_per_s": round(rate / 1e12, 4),
                "times_eager_bound": None if eager is None else round(eager / (work.flops / rate), 3),
                "peak_bytes": runner.peak,
                "predicted_bytes": predicted(clip, dtype, runner),
                "max_difference_from_eager": gaps[variant],
            }
        )
    return rows


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--clips", nargs="+", choices=tuple(CLIPS), default=["small"])
    made.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--limit", type=float, default=120.0, help="seconds of a clip and dtype; no turn begins after it")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    made.add_argument("--results", type=Path, default=None, help="folder of the rows; with --quick: none by default")
    made.add_argument("--quick", action="store_true", help="toy size, on any machine")
    return made


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """The command."""
    args = parser().parse_args(arguments)
    if args.results is not None:
        bench.RESULTS = args.results
    where, rows = environment(args.device), []
    print(f"{where['device']}, {where['threads']} threads")
    for name in ("toy",) if args.quick else args.clips:
        for dtype in args.dtypes:
            measured = [{**row, **where} for row in measure(name, getattr(torch, dtype), args)]
            for row in measured:
                gain = "" if row["times_eager"] is None else f"  {row['times_eager']:6.2f} x eager"
                gain += f", {row['times_eager_cpu']:.2f} x in processor time" if row["times_eager_cpu"] else ""
                print(f"{row['clip']:8} {row['dtype']:9} {row['variant']:14} {row['p50_s']:9.3f} s{gain}", flush=True)
            if not args.quick or args.results is not None:
                append_rows(measured)
            rows += measured
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
