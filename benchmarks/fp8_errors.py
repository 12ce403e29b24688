"""What FP8 costs in accuracy, layer by layer, and which layers to keep in bfloat16 so that a clip stays within a bound.

    python -m benchmarks.fp8_errors                                the built-in model, and the full-size one in small
    python -m benchmarks.fp8_errors --models DIR --write           a checkpoint; writes its fp8.json, the layers to keep

One layer at a time is put into FP8, all else in float32, and velocities along a sampled path are compared with those of
the float32 model: relative RMS, the worse of picture and sound. Then whole clips are sampled in bfloat16 and in FP8.
The layers with the largest errors are kept in bfloat16, as many as it takes to bring the latents within ``--bound`` of
the bfloat16 ones. FP8 products are emulated: the same e4m3 values multiplied in float32, on any device. Appends one row
per model to benchmarks/results/<device>.jsonl.

Guided sampling amplifies small differences, so the error of a few clips jumps about as layers are kept: every number in
the row's list of tries was measured, and the answer is within the bound, but it need not be the smallest list that is.

Errors of random weights say that the command works, not which layers of a trained model are sensitive.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from benchmarks import rungs
from javis import bench
from javis.bench import append_rows, environment
from javis.errors import UsageError
from javis.flow import timesteps
from javis.media import write_text
from javis.model.blocks import BidirectionalBlock
from javis.model.config import JavisDiTConfig
from javis.model.dit import Conditioning, JavisDiT, Velocity
from javis.model.ops import ModelOps
from javis.precision import KEEP_FILE, apply_precision, linear_names
from javis.sample import sample
from javis.sample.euler import Step

Pair = tuple[Tensor, Tensor]
PROMPTS = (
    "a red ball bounces on the left",
    "a blue square knocks on the right",
    "a green star flashes in the middle",
    "a yellow ball swings on the right",
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure."""

    models: tuple[str, ...] = ("demo", "toy")
    """"demo", "toy" (the full-size architecture in small, random weights), or a folder with a checkpoint."""
    bound: float = 0.1
    """Largest relative RMS difference of the latents of a clip from those in bfloat16."""
    steps: int = 8
    """Steps of a clip."""
    points: int = 3
    """Places along the path where velocities are compared."""
    clips: int = 4
    """Clips of a model, each with its own prompt and noise."""
    write: bool = False
    """Write the list of kept layers beside the weights of a folder (fp8.json)."""
    results: Path | None = None
    """Folder of the rows (default: benchmarks/results)."""


@dataclass(frozen=True)
class Subject:
    """A float32 model, what it denoises, and how."""

    name: str
    model: JavisDiT
    start: Pair
    condition_arguments: dict[str, Any]  # of JavisDiT.condition, for the guided batch
    guidance: float
    ratio: float = 1.0

    def condition(self, model: JavisDiT) -> Conditioning:
        with torch.no_grad():
            return model.condition(**self.condition_arguments)


# -- errors ------------------------------------------------------------------------------------------------------------


def rms(actual: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """RMS difference over RMS of what is expected, over all points; the worse of picture and sound."""
    found = []
    for part in (0, 1):
        pairs = [(a[part].double(), e[part].double()) for a, e in zip(actual, expected, strict=True)]
        difference = sum(float((a - e).square().sum()) for a, e in pairs)
        found.append((difference / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5)
    return max(found) if all(x == x for x in found) else float("inf")


@contextlib.contextmanager
def in_fp8(model: JavisDiT, names: Sequence[str]) -> Iterator[JavisDiT]:
    """The model with these layers in FP8 and the rest as it is; as before afterwards."""
    layers = {name: model.get_submodule(name) for name in names}
    blocks = [block for layer in model._layers for block in layer.blocks().values()]
    around = ("ops", "mlp_ops", "video_norm", "audio_norm")
    kept = [{name: vars(block)[name] for name in around if name in vars(block)} for block in blocks]
    try:
        keep = set(linear_names(model)) - set(names)
        yield apply_precision(model, "fp8", keep=sorted(keep), emulate=True, dtype=None)
    finally:
        for name, layer in layers.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer)
        for block, attributes in zip(blocks, kept, strict=True):
            vars(block).update(attributes)


@torch.no_grad()
def path(subject: Subject, steps: int, points: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs of the model (latents of both halves of the guided batch, time) at some steps of the float32 sampling."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(step: Step) -> None:
        t = torch.full((2 * len(step.video),), step.timestep)
        seen.append((step.video.repeat(2, 1, 1, 1, 1), step.audio.repeat(2, 1, 1, 1), t))

    clip(subject, subject.model, steps, callback=keep)
    count = min(points, len(seen))
    return [seen[round(i * (len(seen) - 1) / max(1, count - 1))] for i in range(count)]


def clip(subject: Subject, model: JavisDiT, steps: int, callback: Any = None) -> Pair:
    """Latents of the subject's clips by this model."""
    told, times = subject.condition(model), timesteps(steps, subject.ratio)
    return sample(model, *subject.start, told, times, guidance=subject.guidance, callback=callback)


@torch.no_grad()
def layer_errors(subject: Subject, places: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Error of the velocity with one layer in FP8, for each layer."""
    model = subject.model
    told = subject.condition(model)  # keys and values do not depend on the layers that are replaced

    def velocities() -> list[Velocity]:
        return [model.denoise(*place, told) for place in places]

    exact, errors = velocities(), {}
    for name in linear_names(model):
        with in_fp8(model, [name]):
            errors[name] = rms(velocities(), exact)
    return errors


def keep_the_worst(
    errors: dict[str, float], measure: Callable[[Sequence[str]], float], bound: float
) -> tuple[list[str], list[dict[str, float]]]:
    """How many of the layers with the largest errors must stay so that ``measure(kept names)`` is within the bound.

    Doubled until it is, then halved; the answer was measured, unless it is all of them. Returns the kept layers, and
    what was tried.
    """
    ranked = sorted(errors, key=lambda name: -errors[name])
    tried: list[dict[str, float]] = []

    def fits(count: int) -> bool:
        error = measure(ranked[:count])
        tried.append({"kept": count, "error": float(f"{error:.3g}")})
        return error <= bound

    low, high = -1, 0  # too few, enough
    while high < len(ranked) and not fits(high):
        low, high = high, min(len(ranked), max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return ranked[:high], tried


def flops(model: JavisDiT, condition: Conditioning) -> dict[str, int]:
    """Multiplications of each layer in a step, up to a common factor."""
    video = torch.Size(model.embed.video.grid(condition.video_sizes)).numel()
    audio = torch.Size(model.embed.audio.grid(condition.audio_sizes)).numel()
    found = {}
    for name in linear_names(model):
        owner = model.get_submodule(".".join(name.split(".")[:3]))
        stream = name.split(".")[3] if isinstance(owner, BidirectionalBlock) else name.split(".")[2]
        found[name] = (video if stream.startswith("video") else audio) * model.get_submodule(name).weight.numel()
    return found


def measure(subject: Subject, args: Args) -> dict[str, Any]:
    """The row of a model."""
    errors = layer_errors(subject, path(subject, args.steps, args.points))
    plain = apply_precision(copy.deepcopy(subject.model), "bf16")
    exact, rounded = clip(subject, subject.model, args.steps), clip(subject, plain, args.steps)

    def from_bf16(keep: Sequence[str]) -> float:
        model = apply_precision(copy.deepcopy(subject.model), "fp8", keep=keep, emulate=True)
        return rms([clip(subject, model, args.steps)], [rounded])

    kept, tried = keep_the_worst(errors, from_bf16, args.bound)
    work = flops(subject.model, subject.condition(subject.model))
    found = {step["kept"]: step["error"] for step in tried}
    return {
        "bench": "fp8_errors", "model": subject.name, "steps": args.steps, "points": args.points, "clips": args.clips,
        "guidance": subject.guidance, "bound": args.bound, "bf16_from_float32": float(f"{rms([rounded], [exact]):.3g}"),
        "fp8_from_bf16": found[0], "kept_from_bf16": found.get(len(kept), 0.0), "kept": kept,
        "kept_share_of_work": round(sum(work[n] for n in kept) / sum(work.values()), 4), "tried": tried,
        "layers": {name: float(f"{error:.3g}") for name, error in errors.items()},
    }  # fmt: skip


# -- models ------------------------------------------------------------------------------------------------------------


def toy(clips: int) -> Subject:
    """The full-size architecture with its head size of 72, in small; random weights."""
    config = JavisDiTConfig(
        hidden_size=288, num_heads=4, depth=3, caption_channels=64, caption_length=16, spatial_prior_len=8,
        temporal_prior_len=8, prior_channels=32,
    )  # fmt: skip
    sizes: dict[str, Any] = {"video_sizes": (5, 8, 8), "audio_sizes": (16, 8)}
    model = rungs.make_model(config, ModelOps.fused(), rungs.random_weights(config, "cpu", torch.float32))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    start = (
        draw(clips, config.video_channels, *sizes["video_sizes"]),
        draw(clips, config.audio_channels, *sizes["audio_sizes"]),
    )
    both = 2 * clips
    told = sizes | {
        "text": draw(both, config.caption_length, config.caption_channels),
        "spatial_prior": draw(both, config.spatial_prior_len, config.prior_channels),
        "temporal_prior": draw(both, config.temporal_prior_len, config.prior_channels),
        "fps": torch.full((both,), 24.0), "height": torch.full((both,), 64.0), "width": torch.full((both,), 64.0),
    }  # fmt: skip
    return Subject("toy", model, start, told, guidance=7.0)


def checkpoint(source: str, clips: int) -> Subject:
    """A trained model on its default clip. Its arguments of ``condition`` are those the pipeline passes."""
    from javis import JavisPipeline

    pipe = JavisPipeline.from_pretrained(source)
    told: dict[str, Any] = {}
    condition = pipe.model.condition

    def remember(text: Tensor, **arguments: Any) -> Conditioning:
        told.update(arguments, text=text)
        return condition(text, **arguments)

    pipe.model.condition = remember  # type: ignore[method-assign]
    sampling = pipe.description["sampling"]
    frames = pipe.frames_of(pipe.description["clip"]["seconds"])
    prompts = pipe.captions([PROMPTS[i % len(PROMPTS)] for i in range(clips)])
    text, mask, priors = pipe.encode_prompts(prompts, list(range(clips)))
    samples = frames * pipe.sample_rate // pipe.fps
    made = pipe.condition(text, mask, priors, frames=frames, samples=samples, guided=True)
    del pipe.model.condition
    c, generator = pipe.model.config, torch.Generator().manual_seed(0)
    start = (
        torch.randn(clips, c.video_channels, *made.video_sizes, generator=generator),
        torch.randn(clips, c.audio_channels, *made.audio_sizes, generator=generator),
    )
    model = pipe.model.float().requires_grad_(False)
    ratio = float(sampling.get("timestep_ratio", 1.0))
    return Subject(source, model, start, told, guidance=max(float(sampling["guidance"]), 1.0), ratio=ratio)


def main(args: Args) -> None:
    """The command."""
    if args.steps < 1 or args.points < 1 or args.clips < 1 or not args.bound > 0:
        raise UsageError("steps, points, clips and bound must be positive")
    if args.results is not None:
        bench.RESULTS = args.results
    console, rows = Console(), []
    for name in args.models:
        if args.write and not Path(name).is_dir():
            raise UsageError(f"--write needs folders, not the built-in {name!r}")
    for name in args.models:
        torch.manual_seed(0)
        row = measure(toy(args.clips) if name == "toy" else checkpoint(name, args.clips), args)
        for layer, error in sorted(row["layers"].items(), key=lambda item: -item[1]):
            console.print(f"{error:9.2e}  {layer}{'   kept' if layer in row['kept'] else ''}", highlight=False)
        console.print({k: v for k, v in row.items() if k not in ("layers", "kept")})
        rows.append({**row, **environment()})
        if args.write:
            folder = Path(name) / "transformer"
            facts = {k: row[k] for k in ("bound", "kept_from_bf16", "steps", "guidance")}
            text = json.dumps({"keep": row["kept"], **facts}, indent=1) + "\n"
            write_text((folder if folder.is_dir() else Path(name)) / KEEP_FILE, text)
    append_rows(rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UsageError as error:
        sys.exit(f"fp8_errors: {error}")
