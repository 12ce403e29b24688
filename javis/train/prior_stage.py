"""Stage 2: the HiST-Sypo estimator, trained contrastively (arXiv 2503.23377, section 3.3).

Negatives are made from the latents of the same batch: out of place (the picture shifted sideways, another clip's sound)
and out of time (the picture or the sound shifted in time).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from javis.model.prior import PriorEstimator
from javis.model.text import WordEncoder
from javis.train.checkpoint import flatten_optimizer, load_state, restore_optimizer, save_state
from javis.train.config import DemoTrainConfig
from javis.train.latents import LatentSet
from javis.train.stages import learning_rate


def make_negatives(
    video: Tensor, audio: Tensor, rng: np.random.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Asynchronous twins of a batch of latents, one per kind, each [B, 1, ...].

    Args:
        video: [B, C, T, H, W]; audio: [B, C, Ta, M].
    """
    places, frames, bands = video.shape[-1], video.shape[2], audio.shape[2]
    sideways = int(rng.integers(places // 4, places - places // 4 + 1))
    late = int(rng.integers(frames // 8 + 1, frames - frames // 8))
    late_audio = int(rng.integers(bands // 8 + 1, bands - bands // 8))
    videos = {"spatial": video.roll(sideways, -1)[:, None], "temporal": video.roll(late, 2)[:, None]}
    audios = {"spatial": audio.roll(1, 0)[:, None], "temporal": audio.roll(late_audio, 2)[:, None]}
    return videos, audios


def run_prior_stage(config: DemoTrainConfig, *, batch: int = 32) -> PriorEstimator:
    """Train (or load, when finished) the estimator."""
    folder, stage = Path(config.out) / "prior", config.prior
    torch.set_num_threads(1)  # small operations: a second thread waits more than it works
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    estimator = PriorEstimator(config.prior_model())
    optimizer = torch.optim.AdamW(estimator.parameters(), lr=stage.learning_rate, weight_decay=config.weight_decay)
    names = [name for name, _ in estimator.named_parameters()]
    step, seconds = 0, 0.0
    found = load_state(folder)
    if found is not None:
        state, groups = found
        step, seconds = state["step"], state["seconds"]
        estimator.load_state_dict(groups["model"])
        restore_optimizer(optimizer, names, groups["optimizer"])
    data, encoder = LatentSet.open(Path(config.out) / "train"), WordEncoder(config.text)
    began = time.perf_counter()
    size = torch.full((batch,), float(config.world.size))
    while step < stage.steps:
        rng = np.random.default_rng([config.seed, 13, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        index = rng.integers(0, len(data), batch)
        video, audio = data.batch(index)
        text, _ = encoder([data.captions[i][0] for i in index])
        videos, audios = make_negatives(video, audio, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        priors = estimator.encode(text, generator=generator)
        loss = estimator.loss(
            priors, video, audio, neg_videos=videos, neg_audios=audios, frame_height=size, frame_width=size
        )
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(estimator.parameters(), config.clip_gradient)
        optimizer.step()
        step += 1
        spent = seconds + time.perf_counter() - began
        if step % config.log_every == 0:
            row = {name: round(float(value.detach()), 5) for name, value in loss.parts().items()}
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **row, "seconds": round(spent, 1)}) + "\n")
        if step % config.save_every == 0 or step == stage.steps:
            groups = {"model": estimator.state_dict(), "optimizer": flatten_optimizer(optimizer, names)}
            save_state(folder, step, groups, {"seconds": spent})
    return estimator.eval()
