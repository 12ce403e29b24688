"""One denoising step of a full-width model of one layer, three ways: as the official code computes it, de-duplicated on
plain PyTorch, and de-duplicated on the kernels with folded priors.

    python -m benchmarks.layer_step [--dtypes float32 bfloat16] [--repeats 5] [--upstream-repeats 1] [--quick]

512x512, 2 s, guidance in one batch: C = 1152, H = 16, T = 15, S = 1024 video tokens a frame, 224 audio tokens, 300 text
tokens, 32 + 32 prior tokens, batch 2. The variants take turns in one process. Upstream computes its conditioning in
every step, the others once per clip (``condition_s``). First the variants are compared with each other. Upstream takes
minutes, so it has repeats of its own. Appends one row per variant and dtype to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from benchmarks.baselines.upstream_equivalent import as_upstream
from javis.bench import append_rows, environment
from javis.host_memory import ask_for_huge_pages
from javis.model.config import JavisDiTConfig
from javis.model.dit import Conditioning, JavisDiT, Velocity
from javis.model.ops import ModelOps
from javis.timing import quantile

VARIANTS = ("upstream", "eager", "fused")
# How far from eager another variant's output may be, relative to its largest value: rounding, in 2 samples of 1 layer.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time."""

    variants: tuple[Literal["upstream", "eager", "fused"], ...] = VARIANTS
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    repeats: int = 5  # timed steps of eager and fused
    upstream_repeats: int = 1  # timed steps of upstream; 0: none
    threads: int | None = None  # None: as torch is set up
    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False  # a toy size, to try the script
    append: bool = True  # append the rows to benchmarks/results


@dataclass(frozen=True, kw_only=True)
class Size:
    """The clip and the model."""

    width: int = 1152
    heads: int = 16
    frames: int = 15  # T
    side: int = 64  # of the video latents; S = (side / 2)^2
    audio: tuple[int, int] = (56, 16)  # latents; a quarter as many tokens
    text: int = 300
    caption_channels: int = 4096
    priors: int = 32

    @property
    def places(self) -> int:
        return (self.side // 2) ** 2

    @property
    def audio_tokens(self) -> int:
        return self.audio[0] // 4 * self.audio[1]

    def config(self) -> JavisDiTConfig:
        return JavisDiTConfig(
            hidden_size=self.width, num_heads=self.heads, depth=1, caption_channels=self.caption_channels,
            caption_length=self.text, spatial_prior_len=self.priors, temporal_prior_len=self.priors,
        )  # fmt: skip


TOY = Size(width=48, heads=2, frames=3, side=8, audio=(8, 4), text=5, caption_channels=8, priors=4)


def make_model(size: Size, ops: ModelOps, dtype: torch.dtype, device: str) -> JavisDiT:
    """The same random weights whatever the ops; without gradients, since sampling is what is timed."""
    model = JavisDiT(size.config(), ops).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # some start at zero and would hide what lies before them
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.to(device, dtype)


def make_inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Latents and timestep of two samples, and the arguments of ``condition``."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).to(device, dtype)

    c = size.config()
    video, audio = (size.frames, size.side, size.side), size.audio
    latents = (random(c.video_channels, *video), random(c.audio_channels, *audio))
    side = torch.full((2,), 8.0 * size.side, device=device)
    told = {
        "text": random(size.text, size.caption_channels), "fps": torch.full((2,), 24.0, device=device),
        "height": side, "width": side, "video_sizes": video, "audio_sizes": audio,
        "spatial_prior": random(size.priors, c.prior_channels), "temporal_prior": random(size.priors, c.prior_channels),
    }  # fmt: skip
    return (*latents, torch.full((2,), 500.0, device=device)), told


@torch.no_grad()
def make_steps(
    size: Size, dtype: torch.dtype, args: Args
) -> tuple[dict[str, Callable[[], Velocity]], dict[str, float | None]]:
    """The step of each variant, and the seconds that its conditioning took once."""
    steps: dict[str, Callable[[], Velocity]] = {}
    once: dict[str, float | None] = {}
    given, told = make_inputs(size, dtype, args.device)
    for variant in args.variants:
        model = make_model(size, ModelOps.fused() if variant == "fused" else ModelOps(), dtype, args.device)
        if variant == "upstream":
            if args.upstream_repeats == 0:
                continue
            model = as_upstream(model)
            steps[variant] = lambda model=model: model(*given, **told)
            once[variant] = None
            continue
        started = time.perf_counter()
        # With gradients on (no parameter has one) the priors stay unfolded, which is what plain de-duplication gives.
        with torch.set_grad_enabled(variant == "eager"):
            condition: Conditioning = model.condition(**told)
        once[variant] = time.perf_counter() - started
        steps[variant] = lambda model=model, condition=condition: model.denoise(*given, condition)
    return steps, once


def difference(actual: Velocity, expected: Velocity) -> float:
    """Largest difference relative to the largest value, video and audio."""
    return max(
        float((a.double() - e.double()).abs().max() / e.double().abs().max())
        for a, e in zip(actual, expected, strict=True)
    )


def compare(dtype: torch.dtype, args: Args) -> None:
    """The variants agree at toy size, where upstream takes no time; with equal priors, as upstream mixes the samples'.

    Raises:
        AssertionError: they do not; nothing is timed.
    """
    given, told = make_inputs(TOY, dtype, args.device)
    same = {name: v[:1].expand_as(v) if name.endswith("prior") else v for name, v in told.items()}
    with torch.no_grad():
        outputs = {}
        for variant in args.variants:
            model = make_model(TOY, ModelOps.fused() if variant == "fused" else ModelOps(), dtype, args.device)
            outputs[variant] = (as_upstream(model) if variant == "upstream" else model)(*given, **same)
        model = make_model(TOY, ModelOps(), torch.float32, args.device)
        exact = model(
            *(x.float() for x in given), **{k: v.float() if hasattr(v, "dtype") else v for k, v in same.items()}
        )
    for variant, output in outputs.items():
        gap = difference(output, exact)
        assert gap <= CLOSE[dtype], f"{variant}, {dtype}: {gap:.1e} from float32 eager, expected at most {CLOSE[dtype]}"


@torch.no_grad()
def measure(size: Size, dtype: torch.dtype, args: Args) -> list[dict[str, Any]]:
    """Rows of one dtype."""
    compare(dtype, args)
    steps, once = make_steps(size, dtype, args)
    outputs = {name: step() for name, step in steps.items() if name != "upstream"}  # and warm-up
    gaps = {}
    if "eager" in outputs:
        gaps = {name: difference(output, outputs["eager"]) for name, output in outputs.items()}
        for name, gap in gaps.items():
            assert gap <= 2 * CLOSE[dtype], f"{name}, {dtype}: {gap:.1e} from eager on the full-size step"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(max(args.repeats, args.upstream_repeats)):
        for name, step in steps.items():
            if repeat < (args.upstream_repeats if name == "upstream" else args.repeats):
                started = time.perf_counter()
                step()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - started)
    middle = {name: quantile(values, 0.5) for name, values in times.items()}
    return [
        {
            "bench": "layer_step",
            "variant": name,
            "dtype": str(dtype).removeprefix("torch."),
            "width": size.width,
            "heads": size.heads,
            "frames": size.frames,
            "places": size.places,
            "audio_tokens": size.audio_tokens,
            "batch": 2,
            "p20_s": round(quantile(values, 0.2), 4),
            "p50_s": round(middle[name], 4),
            "p80_s": round(quantile(values, 0.8), 4),
            "samples": len(values),
            "condition_s": None if once[name] is None else round(once[name] or 0.0, 4),
            "max_difference_from_eager": gaps.get(name),
            "times_upstream": round(middle["upstream"] / middle[name], 3) if "upstream" in middle else None,
            "times_eager": round(middle["eager"] / middle[name], 3) if "eager" in middle else None,
        }
        for name, values in times.items()
    ]


def main(args: Args) -> list[dict[str, Any]]:
    """Measure; print and append the rows of each dtype as soon as they are there."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    size = TOY if args.quick else Size()
    where = environment(args.device)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{where['device']}, {where['threads']} threads, T={size.frames}, S={size.places}, C={size.width}")
    rows: list[dict[str, Any]] = []
    for name in args.dtypes:
        measured = [{**row, **where} for row in measure(size, getattr(torch, name), args)]
        for row in measured:
            gains = "".join(f"  {row[f'times_{base}'] or 0:6.2f} x {base}" for base in ("upstream", "eager"))
            console.print(f"{row['dtype']:9} {row['variant']:9} {row['p50_s']:9.3f} s{gains}")
        if args.append and not args.quick:
            append_rows(measured)
        rows += measured
    seconds = {(r["dtype"], r["variant"]): r["p50_s"] for r in rows}
    if ("float32", "upstream") in seconds and ("bfloat16", "fused") in seconds:
        gain = seconds["float32", "upstream"] / seconds["bfloat16", "fused"]
        console.print(f"fused in bfloat16 over upstream in float32: {gain:.2f} x")
    return rows


if __name__ == "__main__":
    ask_for_huge_pages()
    main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
