"""One training step of each stage at full width, on plain PyTorch and on the kernels: forward, backward, optimizer.

    python -m benchmarks.train_stages [--stages audio prior joint] [--depth 1] [--dtype bfloat16] [--device cuda]

On a GPU by default the full size: 28 layers, one clip of 240p, 51 frames. On a CPU one layer and fewer tokens. What is
frozen is frozen as officially (``--train all``: everything is trained). The variants take turns in one process, after
their losses and gradients have been compared at toy size. Memory is the peak of the device on a GPU, on a CPU what
autograd keeps for the backward pass. The prior estimator is built of library modules: it has no fused variant.
Appends one row per stage and variant to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from javis import bench
from javis.bench import append_rows, environment
from javis.host_memory import ask_for_huge_pages
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.model.prior import PriorConfig, PriorEstimator
from javis.plan import official_latents, token_grid
from javis.timing import quantile
from javis.train.recipes.batches import draw
from javis.train.recipes.config import Draws
from javis.train.recipes.parameters import count, freeze
from javis.train.recipes.task import FlowModule

FLOW = ("audio", "joint")
FPS, TEXT = 24.0, 77  # tokens of the prior's captions
CLOSE = {"float32": 1e-3, "bfloat16": 1e-1}  # gradients of the variants, relative to the largest


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time; as the options say."""

    stages: Sequence[str] = ("audio", "prior", "joint")
    variants: Sequence[str] = ("eager", "fused")
    train: Any = "official"
    dtype: str = "bfloat16"
    device: str = "cpu"
    depth: int | None = None
    batch: int = 1
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    repeats: int = 5
    threads: int | None = None
    quick: bool = False
    results: Path | None = None


def parser() -> argparse.ArgumentParser:
    """argparse, as the GPU's image may lack the packages of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.train_stages", description=(__doc__ or "").partition("\n")[0]
    )
    add = made.add_argument
    add("--stages", nargs="+", default=Args.stages, choices=Args.stages)
    add("--variants", nargs="+", default=Args.variants, choices=Args.variants)
    add("--train", default=Args.train, choices=("official", "all"), help="what is trained: as the paper, or everything")
    add("--dtype", default=Args.dtype, choices=("float32", "bfloat16"))
    add("--device", default=Args.device, choices=("cpu", "cuda"))
    add("--depth", type=int, help="layers (28 on a GPU, 1 on a CPU)")
    add("--batch", type=int, default=Args.batch, help="clips")
    add("--frames", type=int, help="51 on a GPU, 17 on a CPU")
    add("--height", type=int, help="240 on a GPU, 128 on a CPU")
    add("--width", type=int, help="426 on a GPU, 128 on a CPU")
    add("--repeats", type=int, default=Args.repeats, help="timed steps of each variant")
    add("--threads", type=int)
    add("--quick", action="store_true", help="a toy size, to try the script; rows only with --results")
    add("--results", type=Path, help="folder for the rows (benchmarks/results)")
    return made


def model_config(args: Args, quick: bool) -> JavisDiTConfig:
    if quick:
        return JavisDiTConfig(
            hidden_size=48, num_heads=2, depth=1, caption_channels=16, caption_length=8, spatial_prior_len=4,
            temporal_prior_len=4, prior_channels=16,
        )  # fmt: skip
    return JavisDiTConfig(depth=args.depth or (28 if args.device == "cuda" else 1))


def clip_of(args: Args) -> tuple[int, int, int]:
    """Frames, height and width."""
    frames, height, width = (51, 240, 426) if args.device == "cuda" and not args.quick else (17, 128, 128)
    if args.quick:
        height = width = 32
    return args.frames or frames, args.height or height, args.width or width


def flow_batch(args: Args, config: JavisDiTConfig, stage: str) -> dict[str, Any]:
    """A batch of random clips in the dtype of the model, with the official draws."""
    g, b, c = torch.Generator().manual_seed(0), args.batch, config
    frames, height, width = clip_of(args)
    video, audio = official_latents(frames, height, width, FPS)

    def random(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=g)

    clips: dict[str, Any] = {
        "video": random(c.video_channels, *video), "video_sizes": video, "audio": random(c.audio_channels, *audio),
        "text": random(c.caption_length, c.caption_channels),
        "text_mask": torch.ones(b, c.caption_length, dtype=torch.bool),
        "spatial_prior": random(c.spatial_prior_len, c.prior_channels),
        "temporal_prior": random(c.temporal_prior_len, c.prior_channels),
        "fps": torch.full((b,), FPS), "height": torch.full((b,), float(height)),
        "width": torch.full((b,), float(width)), "frames": torch.full((b,), float(frames)),
    }  # fmt: skip
    if stage == "audio":
        del clips["video"]
    batch = draw(clips, Draws(), [0], with_masks=stage == "joint")
    return {name: x.to(args.device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def flow_module(args: Args, config: JavisDiTConfig, stage: Any, ops: ModelOps) -> FlowModule:
    """The same random weights whatever the ops."""
    model = JavisDiT(config, ops)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero and would hide what lies before them
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    freeze(model, stage, args.train)
    return FlowModule(model.to(args.device, getattr(torch, args.dtype)), stage)


class PriorModule(nn.Module):
    """The contrastive loss of stage 2 on random clips with one negative of each kind."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        toy = {"hidden_size": 32, "num_heads": 4, "out_dim": 16, "spatial_token_num": 4, "temporal_token_num": 4}
        self.prior = PriorEstimator(PriorConfig(**(toy if args.quick else {}))).to(args.device)
        self.args, g = args, torch.Generator().manual_seed(0)
        c, b = self.prior.config, args.batch
        frames, height, width = clip_of(args)
        video, audio = official_latents(frames, height, width, FPS)
        at = lambda *shape: torch.randn(b, *shape, generator=g).to(args.device)  # noqa: E731
        self.text = at(TEXT, c.text_channels)
        self.video, self.audio = at(c.video_channels, *video), at(c.audio_channels, *audio)
        self.videos = {name: at(1, c.video_channels, *video) for name in ("spatial", "temporal")}
        self.audios = {name: at(1, c.audio_channels, *audio) for name in ("spatial", "temporal")}
        self.size = (torch.full((b,), float(height)), torch.full((b,), float(width)))
        grid = token_grid(JavisDiTConfig(), video, audio)
        self.tokens = b * (grid.video + grid.audio)

    def forward(self) -> Tensor:
        height, width = (x.to(self.args.device) for x in self.size)
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            priors = self.prior.encode(self.text)
            return self.prior.loss(
                priors, self.video, self.audio, neg_videos=self.videos, neg_audios=self.audios, frame_height=height,
                frame_width=width,
            ).total  # fmt: skip


@dataclass
class Timed:
    """A variant that is ready to run."""

    module: nn.Module
    loss: Callable[[], Tensor]
    tokens: int  # that one step trains on
    seconds: list[float]
    memory: float = 0.0  # GB

    def __post_init__(self) -> None:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make(args: Args, stage: str, variant: str) -> Timed:
    if stage == "prior":
        module = PriorModule(args)
        return Timed(module, module, module.tokens, [])
    config = model_config(args, args.quick)
    flow = flow_module(args, config, stage, ModelOps.fused() if variant == "fused" else ModelOps())
    batch = flow_batch(args, config, stage)
    frames, height, width = clip_of(args)
    grid = token_grid(config, *official_latents(frames, height, width, FPS))
    tokens = args.batch * (grid.audio + (grid.video if stage == "joint" else 0))
    return Timed(flow, lambda: flow(batch)["loss"], tokens, [])


def compare(args: Args, stage: str) -> None:
    """The variants agree at toy size: loss and gradients.

    Raises:
        AssertionError: they do not; nothing is timed.
    """
    small = Args(stages=(), dtype=args.dtype, device=args.device, train=args.train, quick=True)
    found = []
    for variant in ("eager", "fused"):
        made = make(small, stage, variant)
        loss = made.loss()
        loss.backward()
        named = made.module.named_parameters()
        found.append((loss.detach().float(), {name: p.grad for name, p in named if p.grad is not None}))
    (expected, gradients), (actual, others) = found
    bound = CLOSE[args.dtype]
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)
    assert gradients.keys() == others.keys()
    # What cancels out (a bias before a softmax) is rounding alone: hence the largest of all gradients as well.
    least = 1e-3 * max(float(value.double().norm()) for value in gradients.values())
    for name, value in gradients.items():
        error = float((others[name].double() - value.double()).norm()) / max(float(value.double().norm()), least)
        assert error <= bound, f"{stage}: gradient of {name} is {error:.3g} off"


def measure(args: Args, made: Timed) -> None:
    """One step's memory, which also warms up."""
    if args.device == "cuda":
        made.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        made.step()
        torch.cuda.synchronize()
        made.memory = torch.cuda.max_memory_allocated() / 1e9
        return
    weights = {p.untyped_storage()._cdata for p in made.module.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = made.loss()
    made.memory = sum(kept.values()) / 1e9
    loss.backward()
    made.optimizer.step()
    made.optimizer.zero_grad(set_to_none=True)


def time_stage(args: Args, stage: str) -> list[dict[str, Any]]:
    """Rows of one stage. On a GPU the variants do not share the memory: each is timed alone."""
    names = ("eager",) if stage == "prior" else args.variants
    if stage != "prior" and set(names) == {"eager", "fused"}:
        compare(args, stage)
    rows = []
    groups = [[name] for name in names] if args.device == "cuda" else [list(names)]
    for group in groups:
        made = {name: make(args, stage, name) for name in group}
        for one in made.values():
            measure(args, one)
        for _ in range(args.repeats):
            for one in made.values():
                started = time.perf_counter()
                one.step()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                one.seconds.append(time.perf_counter() - started)
        rows += [row_of(args, stage, name, one) for name, one in made.items()]
        del made
    base = next((row for row in rows if row["variant"] == "eager"), None)
    for row in rows:
        if base is not None and stage != "prior":
            row["times_eager_tokens_per_s"] = round(row["tokens_per_s"] / base["tokens_per_s"], 3)
            row["memory_of_eager"] = round(row["memory_gb"] / base["memory_gb"], 3)
    return rows


def row_of(args: Args, stage: str, variant: str, made: Timed) -> dict[str, Any]:
    every, trained = count(made.module.parameters())
    frames, height, width = clip_of(args)
    median = quantile(made.seconds, 0.5)
    return {
        "bench": "train_stages", "stage": stage, "variant": variant, "dtype": args.dtype, "train": args.train,
        "depth": model_config(args, args.quick).depth, "batch": args.batch, "frames": frames, "height": height,
        "width": width, "tokens": made.tokens, "parameters": every, "trained": trained,
        "threads": torch.get_num_threads(), "s_p20": round(quantile(made.seconds, 0.2), 4), "s_p50": round(median, 4),
        "s_p80": round(quantile(made.seconds, 0.8), 4), "tokens_per_s": round(made.tokens / median, 1),
        "memory_gb": round(made.memory, 4), "memory": "peak" if args.device == "cuda" else "kept for backward",
        **environment(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = Args(**vars(parser().parse_args(arguments)))
    if args.results is not None:
        bench.RESULTS = args.results
    ask_for_huge_pages()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for stage in args.stages:
        for row in time_stage(args, stage):
            rows.append(row)
            more = "".join(
                f"  x{row[name]:.2f} {what}"
                for name, what in (("times_eager_tokens_per_s", "tokens/s"), ("memory_of_eager", "memory"))
                if name in row
            )
            print(
                f"{stage:6s} {row['variant']:6s} {row['s_p50']:8.3f} s {row['tokens_per_s']:10.0f} tokens/s "
                f"{row['memory_gb']:8.3f} GB{more}"
            )
    if args.results is not None or not args.quick:
        append_rows(rows)
    return rows


if __name__ == "__main__":
    main()
