"""Small tasks for the engine's tests: two linear layers with noise, and a tiny JavisDiT."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from javis.flow import flow_losses
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.train.sharding import called_blocks

Rows = list[dict[str, float]]


class Toy(nn.Module):
    """Regression; with ``noise`` every generator has a say in the loss. One parameter is smaller than two ranks."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x, y = batch["x"], batch["y"]
        if self.noise:
            x = x + self.noise * (torch.randn_like(x) + random.random() + float(np.random.rand()))
        self.seen += 1
        error = (self.last(torch.tanh(self.first(x)))[:, 0] - y).square()
        return {"loss": error.mean(), "largest": error.detach().max()}


class ToyTask:
    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = Toy(noise)

    def blocks(self) -> list[nn.Module]:
        return [self.module.first, self.module.last]


class ToySource:
    """Batches of 4 divided over ranks, a function of the number of the batch; ``bad`` ones hold a NaN on one rank."""

    def __init__(self, rank: int = 0, world: int = 1, bad: tuple[int, ...] = (), bad_rank: int = 0) -> None:
        self.rank, self.world, self.bad, self.bad_rank, self.number = rank, world, bad, bad_rank, 0

    def next(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + self.number)
        x = torch.randn(4, 6, generator=generator)
        batch: dict[str, Any] = {"x": x, "y": x.square().sum(1), "ids": ["a", "b", "c", "d"], "number": self.number}
        batch = {name: v[self.rank :: self.world] if isinstance(v, Tensor) else v for name, v in batch.items()}
        if self.number in self.bad and self.rank == self.bad_rank:
            batch["x"][0, 0] = torch.nan
        self.number += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def tiny_model(**changes: Any) -> JavisDiT:
    """Widths that two ranks do not divide evenly everywhere, all weights random."""
    sizes: dict[str, Any] = {
        "depth": 1, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2.0, "video_channels": 3, "audio_channels": 2,
        "caption_channels": 10, "caption_length": 3, "spatial_prior_len": 2, "temporal_prior_len": 3,
        "prior_channels": 6,
    }  # fmt: skip
    torch.manual_seed(1)
    model = JavisDiT(JavisDiTConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


CONFIG = tiny_model().config


class Flow(nn.Module):
    """The model by condition and denoise, or (``layers``) layer by layer."""

    def __init__(self, model: JavisDiT, layers: bool) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        model, count = self.model, len(batch["video"])
        text = torch.where(batch["drop"][:, None, None], model.null_text, batch["text"])
        told: dict[str, Any] = dict(
            text=text,
            fps=torch.full((count,), 16.0, device=text.device),
            height=torch.full((count,), 32.0, device=text.device),
            width=torch.full((count,), 32.0, device=text.device),
            video_sizes=tuple(batch["video"].shape[2:]),
            audio_sizes=tuple(batch["audio"].shape[2:]),
            spatial_prior=batch["spatial"],
            temporal_prior=batch["temporal"],
        )
        tokens, clip = model.prepare(**told) if self.layers else (None, model.condition(**told))

        def velocity(v: Tensor, a: Tensor, t: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
            if not self.layers:
                return model.denoise(v, a, t, clip, **masks)
            start = model.begin(v, a, t, clip, **masks)
            x, y = start.video, start.audio
            for layer in model.layers:
                x, y = layer(x, y, start, tokens, clip)
            return model.finish(x, y, start, v, a, t, clip)

        losses = flow_losses(
            velocity,
            batch["video"],
            batch["audio"],
            batch["t"],
            video_noise=batch["video_noise"],
            audio_noise=batch["audio_noise"],
        )
        return {"loss": losses.total.mean(), "video": losses.video.mean(), "audio": losses.audio.mean()}


class FlowTask:
    """The video branch is frozen, as in the paper's third stage."""

    def __init__(self, *, layers: bool = False, **changes: Any) -> None:
        self.module = Flow(tiny_model(**changes), layers)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_("video_spatial" not in name)

    def blocks(self) -> list[nn.Module]:
        return list(self.module.model.layers) if self.module.layers else called_blocks(self.module.model)


class FlowSource(ToySource):
    def next(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2000 + self.number)
        c = CONFIG
        shapes = {
            "video": (c.video_channels, 2, 4, 4), "audio": (c.audio_channels, 8, 4), "text": (3, c.caption_channels),
            "spatial": (c.spatial_prior_len, c.prior_channels), "temporal": (c.temporal_prior_len, c.prior_channels),
        }  # fmt: skip
        batch: dict[str, Any] = {name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()}
        for name in ("video", "audio"):
            batch[f"{name}_noise"] = torch.randn(batch[name].shape, generator=generator)
        batch["t"] = 1000 * torch.rand(4, generator=generator)
        batch["drop"] = torch.rand(4, generator=generator) < 0.3
        self.number += 1
        return {name: value[self.rank :: self.world] for name, value in batch.items()}


def rows(out: Path) -> Rows:
    """The log without its seconds."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]
