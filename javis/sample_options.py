"""The options of ``javis sample`` that say which model makes the clips, where it runs, and in which format.

The built-in model has one size; its clips are scaled to ``--resolution``. The full-size model makes that resolution.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from javis.data.sizes import SIZES
from javis.errors import UsageError
from javis.frame_size import frame_size
from javis.sampler_options import SamplerArgs

if TYPE_CHECKING:
    from javis.pipeline import JavisPipeline

MAX_SIDE = 4096
DEMO_RESOLUTION = "256x256"


@dataclass(frozen=True, kw_only=True)
class PipelineArgs:
    """Which model, where and in which format; the part of ``SampleArgs`` that makes a pipeline."""

    resolution: str | None = None
    """Size: 240p, 720p (official sizes), or WIDTHxHEIGHT. The built-in model's pictures are scaled to it (256x256)."""
    ratio: str | None = None
    """Height:width of an official size (default: the checkpoint's, 9:16, a wide picture)."""
    fps: float | None = None
    """Frames per second (default: the checkpoint's; the built-in model has one rate)."""
    negative_prompt: str | None = None
    """What not to show, instead of the empty caption in guidance."""
    checkpoint: str = "demo"
    """Folder or hub id of a checkpoint, or "demo", the built-in model."""
    random_weights: bool = False
    """Instead of a checkpoint: the full-size pipeline with random weights, to measure time and memory. Makes noise."""
    size: Literal["full", "toy"] = "full"
    """With --random-weights: the official sizes, or the same with few channels and layers."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1" (default: a GPU for the full size if there is one, else the CPU)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights (default: bfloat16 on a GPU, float32 on the CPU)."""
    residency: Literal["all", "offload", "staged"] = "all"
    """Components on the device: all, or those in use, the others in host memory (offload) or on disk (staged)."""
    ops: Literal["fused", "reference"] = "fused"
    """What the model runs on: the kernels of javis, or plain PyTorch."""
    precision: Literal["bf16", "fp8", "fp8-te"] | None = None
    """Of the diffusion model (default: --dtype). fp8: torch's products; fp8-te: Transformer Engine's. Need a GPU."""
    compile: bool = False
    """torch.compile of what lies between the kernels. The first clip of a size takes minutes longer."""
    cuda_graphs: bool = False
    """Replay each denoising step as one CUDA graph."""
    sampler: tyro.conf.OmitArgPrefixes[SamplerArgs] = field(default_factory=SamplerArgs)
    overlap: bool = False
    """Picture and sound of a layer on two CUDA streams, side by side."""
    condition_cache: Path | None = None
    """Folder where the hidden states of captions are kept, so that a caption is encoded once (full size only)."""


def parse_resolution(text: str) -> tuple[int, int]:
    """``"512x512"`` (WIDTHxHEIGHT) -> (height, width) in pixels, both even and at most 4096."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (16 <= width <= MAX_SIDE and 16 <= height <= MAX_SIDE) or width % 2 or height % 2:
        raise UsageError(
            f"resolution {text[:40]!r} is unusable; expected WIDTHxHEIGHT in even numbers from 16 to {MAX_SIDE}, "
            "such as 512x512, or for the full-size model an official size such as 240p"
        )
    return height, width


def is_full_size(args: PipelineArgs) -> bool:
    """Whether the clips come from a full-size pipeline; fetches a checkpoint of the hub.

    Raises:
        UsageError: a hub id that cannot be fetched.
    """
    if args.random_weights:
        return True
    if args.checkpoint == "demo":
        return False
    if Path(args.checkpoint).exists() or "/" not in args.checkpoint:
        return (Path(args.checkpoint) / "model_index.json").is_file()
    from javis.components import INDEX, resolve

    folder = resolve(args.checkpoint)
    return folder is not None and (folder / INDEX).is_file()


def check_format(args: PipelineArgs, full: bool) -> None:
    """Refuse options of resolution, rate and device that nothing can make, before a model is loaded."""
    if args.random_weights and args.checkpoint != "demo":
        raise UsageError("expected either --checkpoint or --random-weights, and not both")
    if args.size != "full" and not args.random_weights:
        raise UsageError(f"--size {args.size} is for --random-weights; a checkpoint has its own size")
    if full:
        frame_size("240p" if args.resolution is None else args.resolution, args.ratio or "9:16")
        return
    if args.resolution is not None and args.resolution in SIZES:
        raise UsageError(
            f"--resolution {args.resolution} is for the full-size model; pictures of the small one are square and are "
            "scaled: expected WIDTHxHEIGHT such as 256x256"
        )
    height, width = parse_resolution(args.resolution or DEMO_RESOLUTION)
    if height != width:
        raise UsageError(
            f"checkpoint {args.checkpoint!r} makes square pictures, so --resolution {args.resolution} would distort "
            f"them; expected something like {height}x{height}"
        )
    for name in ("ratio", "fps"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for the full-size model; checkpoint {args.checkpoint!r} has one of its own")


def scale_to(args: PipelineArgs, full: bool) -> tuple[int, int] | None:
    """(height, width) that pictures are scaled to in the mp4; None: they stay as the model makes them."""
    return None if full else parse_resolution(args.resolution or DEMO_RESOLUTION)


def call_options(args: PipelineArgs, full: bool) -> dict[str, Any]:
    """Arguments of the pipeline that the options of the format stand for."""
    options: dict[str, Any] = {}
    if full:
        options = {"resolution": args.resolution, "ratio": args.ratio, "fps": args.fps}
    if args.negative_prompt is not None:
        options["negative_prompt"] = args.negative_prompt
    return options | args.sampler.given()


def identity(args: PipelineArgs, full: bool) -> dict[str, Any]:
    """What of these options decides how a clip looks: part of the record by which a finished clip is known."""
    facts: dict[str, Any] = {
        "resolution": args.resolution if full else "x".join(map(str, reversed(scale_to(args, full) or ()))),
        "checkpoint": args.checkpoint,
        "checkpoint_fingerprint": fingerprint(args, full),
        "ops": args.ops,
    }
    if full:
        facts |= {"ratio": args.ratio, "fps": args.fps, "dtype": args.dtype}
    if args.random_weights:
        facts |= {"random_weights": True, "size": args.size}
    if args.negative_prompt is not None:
        facts["negative_prompt"] = args.negative_prompt
    if args.precision is not None:
        facts["precision"] = args.precision
    return facts | args.sampler.identity()


def fingerprint(args: PipelineArgs, full: bool) -> str | None:
    """Digest of the checkpoint's files; None for random weights, or if there is nothing to read."""
    if args.random_weights:
        return None
    if full:
        from javis.components import folder_fingerprint, resolve

        folder = resolve(args.checkpoint)
        return None if folder is None else folder_fingerprint(folder)
    from javis.clip_files import checkpoint_fingerprint

    return checkpoint_fingerprint(args.checkpoint)


def load_pipeline(args: PipelineArgs) -> JavisPipeline:
    """The pipeline that the options ask for.

    Raises:
        UsageError: it cannot be loaded.
    """
    import torch

    from javis.model.ops import ModelOps
    from javis.pipeline import JavisPipeline

    if args.precision is not None or args.cuda_graphs or args.overlap:
        _check_speed(args)
    ops = ModelOps.fused() if args.ops == "fused" else ModelOps()
    options: dict[str, Any] = {"ops": ops}
    if args.device is not None:
        options["device"] = args.device
    if args.dtype is not None:
        options["dtype"] = getattr(torch, args.dtype)
    if args.residency != "all":
        options["residency"] = args.residency
    if args.random_weights:
        return _accelerated(args, JavisPipeline.with_random_weights(args.size, **options))
    return _accelerated(args, JavisPipeline.from_pretrained(args.checkpoint, **options))


def _check_speed(args: PipelineArgs) -> None:
    """Refuse before anything is loaded what cannot run on the device."""
    from javis.components import choose_device
    from javis.precision import why_not
    from javis.sample.graph import CudaGraphs

    full = args.random_weights or args.checkpoint != "demo"  # the built-in model stays on the CPU unless told
    device = choose_device(args.device if full or args.device is not None else "cpu")
    if args.precision is not None and (reason := why_not(args.precision, device)) is not None:
        raise UsageError(f"--precision {args.precision} {reason}")
    if args.cuda_graphs and (reason := CudaGraphs().why_not(device)) is not None:
        raise UsageError(f"--cuda-graphs {reason}; leave it out")
    if args.overlap and device.type != "cuda":
        raise UsageError(f"--overlap needs a CUDA device, the model is on {device}; leave it out")


def _accelerated(args: PipelineArgs, pipe: JavisPipeline) -> JavisPipeline:
    if args.condition_cache is not None:
        pipe.cache_conditions(args.condition_cache)
    if args.precision is None and not (args.compile or args.cuda_graphs or args.overlap):
        return pipe
    from javis.acceleration import accelerate

    return accelerate(
        pipe,
        precision=args.precision,
        compile_blocks=args.compile,
        cuda_graphs=args.cuda_graphs,
        overlap=args.overlap,
    )
