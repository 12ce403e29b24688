"""Seconds of one training step of the built-in model on CPU, by precision; variants interleaved in one process.

    python benchmarks/train_step.py [--repeats 7] [--batch 8]

Appends one row to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from javis.bench import append_rows, environment
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from javis.train.config import DemoTrainConfig
from javis.train.ops import cpu_training_ops
from javis.train.stages import FlowModule


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to time."""

    repeats: int = 7  # timed steps of each variant
    batch: int = 8  # clips a step
    threads: int = 1


def batch(config: DemoTrainConfig, size: int) -> dict[str, torch.Tensor]:
    """Random inputs with the shapes of a joint-stage batch."""
    c = config
    video = (c.video_codec.coefficients, 16, 8, 8)
    audio = (c.audio_codec.coefficients, 32, 4)
    prior = (size, c.prior_tokens, c.prior_channels)
    words = c.text.max_words
    return {
        "video": torch.randn(size, *video),
        "audio": torch.randn(size, *audio),
        "video_noise": torch.randn(size, *video),
        "audio_noise": torch.randn(size, *audio),
        "text": torch.randn(size, words, c.text.channels),
        "text_mask": torch.arange(words).expand(size, -1) < 12,
        "drop": torch.zeros(size, dtype=torch.bool),
        "t": torch.rand(size) * 1000,
        "spatial_prior": torch.randn(prior),
        "temporal_prior": torch.randn(prior),
    }


def make_step(config: DemoTrainConfig, ops: ModelOps, data: dict[str, torch.Tensor], matmul: str) -> Callable[[], None]:
    torch.manual_seed(0)
    module = FlowModule(JavisDiT(config.model(), ops), config, True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        torch.set_float32_matmul_precision(matmul)
        module(data)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    bf16 = DemoTrainConfig(precision="bf16")
    fp32 = replace(bf16, precision="fp32")
    data = batch(bf16, args.batch)
    variants = {
        "float32": make_step(fp32, ModelOps(), data, "highest"),
        "float32, matmul precision medium": make_step(fp32, ModelOps(), data, "medium"),
        "bf16 autocast": make_step(bf16, ModelOps(), data, "highest"),
        "bf16 autocast, float32 attention": make_step(bf16, cpu_training_ops(), data, "highest"),
    }
    for step in variants.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, step in variants.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    base = medians["float32"]
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        p20, p80 = (float(np.quantile(values, q)) for q in (0.2, 0.8))
        rows.append(
            {
                "bench": "train_step",
                "variant": name,
                "batch": args.batch,
                "threads": args.threads,
                "s_p20": round(p20, 4),
                "s_p50": round(medians[name], 4),
                "s_p80": round(p80, 4),
                "times_faster_than_float32": round(base / medians[name], 2),
                **environment(),
            }
        )
        Console().print(f"{name:36s} {medians[name]:.3f} s  x{base / medians[name]:.2f}")
    append_rows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
