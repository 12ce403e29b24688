"""One of two or four ranks that share the tokens of clips: what test_sequence_parallel.py compares with one process."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from javis.model.dit import JavisDiT
from javis.parallel.bidirectional import sharded_attention
from javis.parallel.collectives import exchange, gather, scatter_sum, span, split_sizes
from javis.parallel.ranks import Rank, data_place
from javis.train.engine import EngineConfig, Trainer
from javis.train.recipes.batches import draw
from javis.train.recipes.config import Draws
from javis.train.recipes.task import FlowTask
from tests.train.recipes.small import SMALL, small_clips, small_model

ALONE = Rank()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Nothing divides: 7 frames x 6 places of video tokens, 5 x 5 of audio (18 latents in patches of 4, the last one cut).
SIZES = ((7, 4, 6), (18, 5))
# Every kind of condition often enough to be in few batches.
DRAWS = Draws(
    drop_text=0.4,
    drop_prior=0.4,
    drop="independent",
    masks={"random": 0.3, "video_to_audio": 0.1, "audio_to_video": 0.1, "image_head": 0.2},
)
ENGINE: dict[str, Any] = {
    "steps": 20, "accumulation": 2, "clip_gradient": 0.5, "learning_rate": 3e-3, "warmup": 4, "weight_decay": 0.1,
    "ema": 0.9, "log_every": 1, "save_every": 10, "keep": 5,
}  # fmt: skip

# Models of which the gradients of all parameters are compared: changes of the configuration.
MODELS: dict[str, dict[str, Any]] = {
    "cross_attn": {},
    "addition": {"prior_mode": "addition"},
    "modulate": {"prior_mode": "modulate"},
    "clock": {"clock": True, "clock_attention": True},
    "sample prediction": {"prediction": "sample", "sigma_data": 0.5},
    "patches of time": {"video_patch": (2, 2, 2)},
}


def model_of(name: str) -> JavisDiT:
    return small_model(config=type(SMALL)(**SMALL.to_dict() | MODELS[name]))


def batch_of(number: int, stage: str, place: Rank = ALONE, count: int = 4) -> dict[str, Any]:
    """Samples of a share of batch ``number``."""
    g = torch.Generator().manual_seed(100 + number)
    clips = small_clips(count, number)
    for name, size in zip(("video", "audio"), SIZES, strict=True):
        clips[name] = torch.randn(*clips[name].shape[:2], *size, generator=g)
    clips["video_sizes"] = SIZES[0]
    if stage == "audio":
        del clips["video"]
    whole = draw(clips, DRAWS, [7, number], with_masks=stage == "joint")
    return {name: x[place.rank :: place.world] if isinstance(x, Tensor) else x for name, x in whole.items()}


class Batches:
    """The batches of a share."""

    def __init__(self, stage: str, place: Rank) -> None:
        self.stage, self.place, self.number = stage, place, 0

    def next(self) -> dict[str, Any]:
        self.number += 1
        return batch_of(self.number, self.stage, self.place)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class NotRead(Batches):
    """The source of a process that is sent its batches."""

    def next(self) -> dict[str, Any]:
        raise AssertionError("only the first of the processes that share clips reads them")


def train(out: Path, seq: int = 1, stage: str = "joint", name: str = "clock", **changes: Any) -> Trainer:
    source = (Batches if RANK % seq == 0 else NotRead)(stage, data_place(Rank(RANK, WORLD), seq))
    config = EngineConfig(out=out, device="cpu", sequence_parallel=seq, **(ENGINE | changes))
    trainer = Trainer(FlowTask(model_of(name), stage), source, config)
    trainer.run()
    return trainer


# -- gradients ---------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivative(run: Callable[..., Tensor], inputs: list[Tensor], *, shared: bool) -> tuple[float, float]:
    """Of one loss of all ranks along a random direction: by the gradients, and by differences.

    Args:
        run: this rank's inputs -> its part of the loss, or (``shared``) the loss that every rank computes.
    """
    directions = [random(*x.shape, seed=50 + 10 * RANK + i) for i, x in enumerate(inputs)]

    def total(value: Tensor) -> float:
        value = value.detach().clone()
        if not shared:
            dist.all_reduce(value)
        return float(value)

    given = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(run(*given), given)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert isinstance(along, Tensor)
    dist.all_reduce(along)
    e = 1e-5
    ahead, behind = (total(run(*(x + s * e * d for x, d in zip(inputs, directions, strict=True)))) for s in (1, -1))
    return float(along), (ahead - behind) / (2 * e)


def exchanges(group: ProcessGroup) -> dict[str, Any]:
    """Derivatives of each exchange, and gradients of the attention; sizes that differ between ranks."""
    frames, places = split_sizes(5, WORLD), split_sizes(7, WORLD)
    x = random(2, frames[RANK], 7, 3, seed=RANK)
    out = random(2, 5, places[RANK], 3, seed=20 + RANK)
    whole = random(2, 5, 7, 3, seed=30)
    found: dict[str, Any] = {
        "exchange": derivative(
            lambda x: (out * exchange(x, split=2, out_sizes=places, join=1, in_sizes=frames, group=group).sin()).sum(),
            [x],
            shared=False,
        ),
        "gather": derivative(lambda x: (whole * gather(x, 1, frames, group).sin()).sum(), [x], shared=True),
        "scatter_sum": scatter_sum(random(2, 5, 3, seed=40 + RANK), 1, frames, group),
    }
    heads, inputs = 2, attention_inputs()
    video, audio = (split_sizes(x.shape[1], WORLD) for x in inputs[:2])
    mine = [x[:, span(sizes, RANK)] for x, sizes in zip(inputs[:4], (video, audio, video, audio), strict=True)]
    wanted = [x[:, span(sizes, RANK)] for x, sizes in zip(inputs[4:], (video, audio), strict=True)]

    def attention(*given: Tensor, dtype: torch.dtype = torch.float64, backend: str = "reference") -> Tensor:
        results = sharded_attention(
            *(x.to(dtype) for x in given), heads, audio_sizes=audio, group=group, backend=backend
        )
        return sum((w * x).sum() for w, x in zip(wanted, results, strict=True))  # type: ignore[return-value]

    found["attention"] = derivative(attention, mine, shared=False)
    for name, dtype, backend in (
        ("reference", torch.float64, "reference"),
        ("auto", torch.float32, "auto"),
        ("bfloat16", torch.bfloat16, "auto"),
    ):
        given = [x.clone().requires_grad_() for x in mine]
        found[name] = torch.autograd.grad(attention(*given, dtype=dtype, backend=backend), given)
    return found


def attention_inputs() -> list[Tensor]:
    """Queries and values of both streams, and what their results are multiplied with."""
    return [random(2, 41 if i % 2 else 203, 16, seed=60 + i) for i in range(6)]


def gradients(name: str, stage: str, group: ProcessGroup | None) -> dict[str, Tensor]:
    """Of all parameters, in float64, of a function of the velocity; with a group the sum over it."""
    task = FlowTask(model_of(name).double(), stage)  # type: ignore[arg-type]
    for parameter in task.module.parameters():
        parameter.requires_grad_()
    undo = None if group is None else task.share_tokens(group)
    batch = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch_of(1, stage).items()
    }
    masks = {n: batch[n] for n in ("video_mask", "audio_mask") if n in batch}
    video, audio = task.module.velocity(batch, batch.get("video"), batch["audio"], **masks)
    loss = (audio * random(*audio.shape, seed=70)).sum()
    if stage == "joint":
        loss = loss + (video * random(*video.shape, seed=71)).sum()
    loss.backward()
    if undo is not None:
        undo()
        assert all("forward" not in vars(layer) for layer in task.module.model.layers)
    found = {n: x.grad for n, x in task.module.named_parameters() if x.grad is not None}
    if group is not None:
        for value in found.values():
            dist.all_reduce(value, group=group)
    return found


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # nothing may outlive the tests
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, timeout=timedelta(seconds=60), rank=RANK, world_size=WORLD)
    group = dist.group.WORLD
    assert group is not None
    torch.save(exchanges(group), folder / f"exchanges-{RANK}.pt")
    found = {f"{name} joint": gradients(name, "joint", group) for name in MODELS}
    found["clock audio"] = gradients("clock", "audio", group)
    if RANK == 0:
        torch.save(found, folder / "gradients.pt")
    if WORLD == 4:
        train(folder / "square", seq=2)
    else:
        train(folder / "joint", seq=2)
        train(folder / "audio", seq=2, stage="audio", steps=4)
        train(folder / "again", seq=2, steps=4, activation_checkpointing="full")
        train(folder / "low", seq=2, steps=4, precision="bf16", activation_checkpointing="selective")
        train(folder / "from_one", seq=2)  # goes on from a checkpoint that one process wrote
        train(folder / "divided")  # and each with clips of its own, from a checkpoint of the two together
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
