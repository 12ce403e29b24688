"""Flow stages of the built-in model: the branches alone, then both together with priors and bidirectional attention."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from javis.errors import UsageError
from javis.flow import flow_losses, mean_over_generated, sample_timesteps
from javis.model.dit import JavisDiT
from javis.model.prior import PriorEstimator
from javis.model.text import WordEncoder
from javis.train.checkpoint import Ema, flatten_optimizer, load_state, restore_optimizer, save_state
from javis.train.config import DemoTrainConfig, StageConfig
from javis.train.latents import LatentSet
from javis.train.ops import cpu_training_ops

log = logging.getLogger("javis.train")


def learning_rate(step: int, stage: StageConfig) -> float:
    """Warm-up, constant, linear decay to zero; from every restart again."""
    begin = max((at for at in stage.restarts if at <= step), default=0)
    end = min((at for at in stage.restarts if at > step), default=stage.steps)
    step, steps = step - begin, end - begin
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    start = steps * (1 - stage.decay)
    cool = 1.0 if stage.decay == 0 or step < start else max(0.0, (steps - step) / (steps - start))
    return stage.learning_rate * warm * cool


class FlowModule(nn.Module):
    """Model plus loss in one ``forward``, as DistributedDataParallel wants it."""

    def __init__(self, model: JavisDiT, config: DemoTrainConfig, joint: bool) -> None:
        super().__init__()
        self.model, self.config, self.joint = model, config, joint

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """-> total loss, averaged over the batch; video and audio loss, averaged over samples that generate them."""
        model, world = self.model, self.config.world
        drop = batch["drop"][:, None, None]
        text = torch.where(drop, model.null_text, batch["text"])
        spatial = temporal = None
        if self.joint:
            null_spatial, null_temporal = model.null_prior
            spatial = torch.where(drop, null_spatial, batch["spatial_prior"])
            temporal = torch.where(drop, null_temporal, batch["temporal_prior"])
        count, device = len(text), text.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            condition = model.condition(
                text,
                text_mask=batch["text_mask"],
                fps=torch.full((count,), float(world.fps), device=device),
                height=torch.full((count,), float(world.size), device=device),
                width=torch.full((count,), float(world.size), device=device),
                video_sizes=tuple(batch["video"].shape[2:]),  # type: ignore[arg-type]
                audio_sizes=tuple(batch["audio"].shape[2:]),  # type: ignore[arg-type]
                spatial_prior=spatial,
                temporal_prior=temporal,
                with_prior=self.joint,
                with_bidirectional=self.joint,
            )
            losses = flow_losses(
                lambda v, a, t, **masks: model.denoise(v, a, t, condition, **masks),
                batch["video"],
                batch["audio"],
                batch["t"],
                video_noise=batch["video_noise"],
                audio_noise=batch["audio_noise"],
                video_mask=batch.get("video_mask"),
                audio_mask=batch.get("audio_mask"),
            )
        video, video_mean = mean_over_generated(losses.video, batch.get("video_mask"))
        audio, audio_mean = mean_over_generated(losses.audio, batch.get("audio_mask"))
        return video + audio, video_mean, audio_mean


class Batches:
    """Batches as a pure function of (seed, step, rank): a resumed run sees the same ones."""

    def __init__(self, data: LatentSet, config: DemoTrainConfig, prior: PriorEstimator | None) -> None:
        self.data, self.config, self.prior = data, config, prior
        self.encoder = WordEncoder(config.text)

    def make(self, index: np.ndarray, seed: list[int], *, training: bool = True, step: int = 0) -> dict[str, Tensor]:
        """Latents, captions, priors, noise and timesteps (those of training step ``step``) of the given clips."""
        c = self.config
        ratio, std = c.timesteps_at(step)
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        variants = np.where(rng.random(len(index)) < c.caption_full, 0, rng.integers(1, 4, len(index)))
        if not training:
            variants[:] = 0
        video, audio = self.data.batch(index)
        captions = [self.data.captions[i][v] for i, v in zip(index, variants, strict=True)]
        text, mask = self.encoder(captions)
        drop = rng.random(len(index)) < (c.condition_dropout if training else 0.0)
        batch = {
            "video": video,
            "audio": audio,
            "text": text,
            "text_mask": mask,
            "drop": torch.from_numpy(drop),
            "t": sample_timesteps(len(index), generator=generator, ratio=ratio, logit_std=std),
            "video_noise": torch.randn(video.shape, generator=generator),
            "audio_noise": torch.randn(audio.shape, generator=generator),
        }
        if self.prior is not None:
            with torch.no_grad():
                priors = self.prior.encode(text, generator=generator)
            batch |= {"spatial_prior": priors.spatial, "temporal_prior": priors.temporal}
            if training and c.given > 0:
                # One stream given clean, the other generated: what the paper's third stage calls v2a and a2v.
                given = torch.from_numpy(rng.random((len(index), 1)))
                batch["video_mask"] = (given >= c.given / 2).expand(-1, video.shape[2])
                batch["audio_mask"] = ((given < c.given / 2) | (given >= c.given)).expand(-1, audio.shape[2])
        return batch

    def training_batch(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        seed = [self.config.seed, 11, step]
        index = np.random.default_rng(seed).integers(0, len(self.data), self.config.batch)
        # The plan of timesteps counts joint steps; the branches (no prior) use its beginning.
        return self.make(index[rank::world], [*seed, rank], step=step if self.prior is not None else 0)


def _to(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch if device.type == "cpu" else {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def validation_loss(module: FlowModule, batches: Batches, weights: dict[str, Tensor]) -> list[float]:
    """(total, video, audio) loss of the averaged weights on held-out clips with fixed noise and timesteps."""
    model = module.model
    current = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    sums, count, size = np.zeros(3), 0, 32
    with torch.no_grad():
        for start in range(0, len(batches.data), size):
            index = np.arange(start, min(start + size, len(batches.data)))
            losses = module(_to(next(model.parameters()).device, batches.make(index, [5, start], training=False)))
            sums += np.array([float(x) for x in losses]) * len(index)
            count += len(index)
    model.load_state_dict(current)
    return [float(x) for x in sums / count]


# Parts of the model that the first stage leaves alone.
LATER = ("video_prior", "audio_prior", "bidirectional", "prior_time_block", "embed.prior")


def _prepare(model: JavisDiT, joint: bool, freeze_branches: bool) -> list[tuple[str, nn.Parameter]]:
    """Freeze what the stage does not train and return the rest."""
    for name, parameter in model.named_parameters():
        unused = name == "embed.audio_text.null"  # tied to the video's null caption
        later = any(part in name for part in LATER)
        parameter.requires_grad_(not unused and ((later or not freeze_branches) if joint else not later))
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


class OptimizerSettings(Protocol):
    """What :func:`build_optimizers` needs of a training's configuration."""

    @property
    def optimizer(self) -> str: ...
    @property
    def muon_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def build_optimizers(
    named: list[tuple[str, nn.Parameter]], config: OptimizerSettings, learning_rate: float
) -> list[tuple[optim.Optimizer, list[str]]]:
    """Optimizers with the names of their parameters, in their order.

    With ``optimizer="muon"`` the weight matrices of the layers follow Muon (orthogonalised momentum, scaled to the
    size of AdamW's updates and then by ``config.muon_rate``); tables, biases, embeddings and outputs follow AdamW.
    """

    def is_hidden(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and name.startswith("layers.") and name.endswith(".weight")

    hidden = [(n, p) for n, p in named if config.optimizer == "muon" and is_hidden(n, p)]
    taken = {n for n, _ in hidden}
    rest = [(n, p) for n, p in named if n not in taken]
    decayed = [(n, p) for n, p in rest if p.ndim > 1]
    plain = [(n, p) for n, p in rest if p.ndim <= 1]
    adamw = optim.AdamW(
        [
            {"params": [p for _, p in decayed], "weight_decay": config.weight_decay, "rate": 1.0},
            {"params": [p for _, p in plain], "weight_decay": 0.0, "rate": 1.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    optimizers: list[tuple[optim.Optimizer, list[str]]] = [(adamw, [n for n, _ in decayed + plain])]
    if hidden:
        muon = optim.Muon(
            [{"params": [p for _, p in hidden], "rate": config.muon_rate}],
            lr=learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append((muon, [n for n, _ in hidden]))
    return optimizers


def run_flow_stage(
    rank: int, name: str, config: DemoTrainConfig, prior: PriorEstimator | None, start_from: str | None
) -> None:
    """One worker of a flow stage. ``start_from``: folder of the stage whose averaged weights to start from."""
    joint = name == "joint"
    stage: StageConfig = getattr(config, name)
    if config.device == "cpu":
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    world, device = config.flow_processes, torch.device(config.device)
    folder = Path(config.out) / name
    dist.init_process_group(
        "gloo", init_method=f"file://{(Path(config.out) / f'{name}.store').resolve()}", rank=rank, world_size=world
    )
    torch.manual_seed(config.seed)
    model = JavisDiT(config.model(), cpu_training_ops() if config.device == "cpu" else None).to(device)
    if start_from is not None:
        before = load_state(Path(start_from))
        if before is None:
            raise FileNotFoundError(f"stage {name} starts from {start_from}, which holds no finished state")
        model.load_state_dict(before[1]["ema"])
    optimizers = build_optimizers(_prepare(model, joint, config.freeze_branches), config, stage.learning_rate)
    ema = Ema(model, config.ema)
    step, seconds = 0, 0.0
    found = load_state(folder)
    if found is not None:
        state, groups = found
        step, seconds, ema.updates = state["step"], state["seconds"], state["ema_updates"]
        model.load_state_dict(groups["model"])
        ema.shadow = {key: value.to(device) for key, value in groups["ema"].items()}
        for optimizer, order in optimizers:
            mine = {k: x for k, x in groups["optimizer"].items() if k.rsplit("/", 1)[0] in order}
            restore_optimizer(optimizer, order, mine)
    module = FlowModule(model, config, joint)
    parallel: Any = torch.compile(FlowModule(model, config, joint)) if config.compile and joint else module
    if world > 1:
        parallel = nn.parallel.DistributedDataParallel(parallel, gradient_as_bucket_view=True)
    batches = Batches(LatentSet.open(Path(config.out) / "train"), config, prior)
    held = Batches(LatentSet.open(Path(config.out) / "validation"), config, prior)
    began, parent = time.perf_counter(), os.getppid()
    sums: list[list[float]] = []
    while step < stage.steps:
        if os.getppid() != parent:  # the command was killed; a worker left behind would write beside its successor
            raise SystemExit(f"stage {name}: the process that started this worker is gone")
        rate = learning_rate(step, stage)
        for optimizer, _ in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
        losses = parallel(_to(device, batches.training_batch(step, rank, world)))
        losses[0].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_gradient)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if rank:
            continue
        ema.update(model)
        sums.append([*(float(x.detach()) for x in losses), float(norm)])
        spent = seconds + time.perf_counter() - began
        if step % config.log_every == 0 or step == stage.steps:
            mean = np.mean(sums, axis=0)
            sums = []
            row = dict(zip(("loss", "video", "audio", "norm"), (round(float(x), 5) for x in mean), strict=True))
            _log(folder, {"step": step, **row, "lr": rate, "seconds": round(spent, 1)})
        if step % config.save_every == 0 or step == stage.steps:
            if step % (4 * config.save_every) == 0 or step == stage.steps:
                value = validation_loss(module, held, ema.shadow)
                _log(folder, {"step": step, "validation": [round(x, 5) for x in value], "seconds": round(spent, 1)})
            moments = {k: x for o, order in optimizers for k, x in flatten_optimizer(o, order).items()}
            groups = {"model": model.state_dict(), "ema": ema.shadow, "optimizer": moments}
            save_state(folder, step, groups, {"seconds": spent, "ema_updates": ema.updates})
    dist.barrier()
    dist.destroy_process_group()


def _log(folder: Path, row: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    log.info("%s %s", folder.name, row)


def launch_flow_stage(
    name: str, config: DemoTrainConfig, prior: PriorEstimator | None, start_from: Path | None
) -> None:
    """Run a flow stage, on CPU in ``config.processes`` processes of one thread each; returns when it is finished."""
    # Keeping freed memory saves about a third of the time on CPU.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000000")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
    if config.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    elif not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    found = load_state(Path(config.out) / name)
    stage: StageConfig = getattr(config, name)
    if found is not None and found[0]["step"] >= stage.steps:
        return
    (Path(config.out) / f"{name}.store").unlink(missing_ok=True)
    if prior is not None:
        prior = prior.requires_grad_(False).eval()
    torch.multiprocessing.spawn(
        run_flow_stage,
        args=(name, config, prior, None if start_from is None else str(start_from)),
        nprocs=config.flow_processes,
        daemon=True,  # a killed parent takes its workers along
    )
