"""``javis train distill``: students of few unguided evaluations, of both modalities together.

- guidance: the student's velocity is the teacher's guided one (Meng et al., arXiv 2210.03142, stage one).
- reflow: piecewise rectified flow (Yan et al., arXiv 2405.07510): between two timesteps the student goes straight to
  where the teacher's guided sampler arrives. It is told where its step ends, so that one student serves several step
  counts, and learns on the teacher's own ways, so that in training it sees what it will see in sampling.
- dmd: distribution matching of whole rollouts (javis/train/distill_dmd.py), after one of the others.
- shortcut: one step of the student is two of its own half steps (Frans et al., arXiv 2410.12557), down to the
  shortest, which is the teacher's guided velocity.

Where the teacher makes the sound first, half of the samples are of the second part, with the finished sound given.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from javis.errors import UsageError
from javis.sample.schedules import FITTED, fitted_key
from javis.train.checkpoint import Ema, flatten_optimizer, load_state, restore_optimizer, save_state
from javis.train.distill_config import DistillConfig, parse_path
from javis.train.distill_dmd import Matching, average_gradients, check_dmd
from javis.train.distill_lessons import Lessons, Task, keep_prior_attention, student_of
from javis.train.export import export_student
from javis.train.stages import _log, build_optimizers, learning_rate
from javis.train.trajectories import Trajectories, clip_settings, record

log = logging.getLogger("javis.train")


def _worker(rank: int, config: DistillConfig) -> None:
    from javis.pipeline import JavisPipeline

    out, stage = Path(config.out), config.stage
    folder = out / config.method
    if config.device == "cpu":
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    world = config.processes if config.device == "cpu" else 1
    store = f"file://{(out / f'{config.method}.store').resolve()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    pipe = JavisPipeline.from_pretrained(config.teacher, device=config.device)
    student = student_of(pipe.model, config).to(pipe.device)
    if config.init is not None:
        student.load_state_dict(_weights_of(config.init))
    if not config.train_prior_attention:
        keep_prior_attention(student, pipe.model)
    named = [(n, p) for n, p in student.named_parameters() if n != "embed.audio_text.null" and p.requires_grad]
    student.embed.audio_text.null.requires_grad_(False)  # tied to the video's null caption
    optimizers = build_optimizers(named, config, stage.learning_rate)
    ema = Ema(student, config.ema)
    average = student_of(pipe.model, config).to(pipe.device).requires_grad_(False).eval()
    step, seconds = 0, 0.0
    task = Task(student, config)
    lessons = Lessons(pipe, Trajectories.open(out / "trajectories"), config)
    matching = Matching(task, lessons, rank, world) if config.method == "dmd" else None
    if (found := load_state(folder)) is not None:
        state, groups = found
        step, seconds, ema.updates = state["step"], state["seconds"], state["ema_updates"]
        student.load_state_dict(groups["model"])
        ema.shadow = {name: value.to(pipe.device) for name, value in groups["ema"].items()}
        for optimizer, order in optimizers:
            mine = {k: x for k, x in groups["optimizer"].items() if k.rsplit("/", 1)[0] in order}
            restore_optimizer(optimizer, order, mine)
        if matching is not None:
            matching.load_state(groups)
    elif matching is not None and (before := _critic_of(config.init)) is not None:
        matching.critic.load_state_dict(before)
    elif matching is not None:
        for number in range(config.critic_warmup):
            matching.warm_up(stage.learning_rate / 2, number)
    running: Any = torch.compile(task) if config.compile else task
    if world > 1 and matching is None:
        running = nn.parallel.DistributedDataParallel(
            running, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    began, parent, sums = time.perf_counter(), os.getppid(), []
    names = ("loss", "video", "audio", "norm", *(("critic_video", "critic_audio") if matching else ()))
    while step < stage.steps:
        if os.getppid() != parent:  # the command was killed; a worker left behind would write beside its successor
            raise SystemExit(f"distill {config.method}: the process that started this worker is gone")
        rate = learning_rate(step, stage)
        for optimizer, _ in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
        if config.method == "shortcut":
            average.load_state_dict(ema.shadow)
        if matching is None:
            losses = running(lessons.training_batch(step, rank, world, task, average))
        else:
            losses = matching.losses(step)
        losses[0].backward()
        if matching is not None:
            average_gradients(student.parameters())
        norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip_gradient)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        critic = matching.follow(rate, step) if matching is not None else []
        step += 1
        ema.update(student)  # on every rank: the shortcut imitates it
        if rank:
            continue
        sums.append([*(float(x.detach()) for x in losses), float(norm), *critic])
        spent = round(seconds + time.perf_counter() - began, 1)
        last = step == stage.steps
        if step % config.log_every == 0 or last:
            values = (round(float(x), 5) for x in np.mean(sums, axis=0))
            _log(folder, {"step": step, **dict(zip(names, values, strict=True)), "lr": rate, "seconds": spent})
            sums = []
        if step % config.save_every == 0 or last:
            average.load_state_dict(ema.shadow)
            value = lessons.validation(Task(average, config).eval(), average)
            _log(folder, {"step": step, "validation": value, "seconds": spent})
            moments = {k: x for o, order in optimizers for k, x in flatten_optimizer(o, order).items()}
            groups = {"model": student.state_dict(), "ema": ema.shadow, "optimizer": moments}
            if matching is not None:
                groups |= matching.state()
            save_state(folder, step, groups, {"seconds": spent, "ema_updates": ema.updates})
    dist.barrier()
    dist.destroy_process_group()


def run(config: DistillConfig) -> Path:
    """Record, train, export; returns the folder with ``student.safetensors``, ``student.json`` and ``checkpoint``.

    Raises:
        UsageError: an unusable teacher, captions, or a folder that holds another run.
    """
    from javis.pipeline import JavisPipeline

    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000000")  # as in javis/train/stages.py
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    if config.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    if config.method == "dmd":
        check_dmd(config)
    if config.init is not None:
        _weights_of(config.init)  # before the recording
    pipe = JavisPipeline.from_pretrained(config.teacher, device=config.device)
    ways = record(config, pipe)
    log.info("recorded: %d clips", len(ways))
    folder = Path(config.out) / config.method
    found = load_state(folder)
    if found is None or found[0]["step"] < config.stage.steps:
        (Path(config.out) / f"{config.method}.store").unlink(missing_ok=True)
        processes = config.processes if config.device == "cpu" else 1
        torch.multiprocessing.spawn(_worker, args=(config,), nprocs=processes, daemon=True)
        found = load_state(folder)
    assert found is not None
    return _export(config, pipe, ways, *found)


def _weights_of(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run that has saved a state.

    Raises:
        UsageError: there is none, or it is of a student without the end of the step as input.
    """
    found = load_state(Path(folder))
    if found is None or "ema" not in found[1]:
        raise UsageError(f"--init {folder}: no student there; expected a folder such as runs/distill/reflow")
    if "embed.end.fc1.weight" not in found[1]["ema"]:
        raise UsageError(
            f"--init {folder}: its student is not told where steps end; expected one of reflow or shortcut"
        )
    return found[1]["ema"]


def _critic_of(folder: Path | None) -> dict[str, Tensor] | None:
    """The critic of a run of distribution matching; None of another method."""
    found = None if folder is None else load_state(Path(folder))
    return None if found is None else found[1].get("critic")


def _settings(config: DistillConfig, pipe: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What the exported checkpoint says of its student ("student" in config.json)."""
    middle = [sum(scales) / 2 for scales in (config.guidance, config.audio_guidance)]
    _, _, ratio, order = clip_settings(pipe, config)
    made: dict[str, Any] = {
        "steps": 4, "guidance": middle[0], "audio_guidance": middle[1], "order": order, "timestep_ratio": ratio,
        "solver": "euler", "model": {"guidance_input": True, "step_input": config.method != "guidance"},
        "training": {"method": config.method, "clips": config.clips, "steps": state["step"],
                     "seconds": round(state["seconds"])},
    }  # fmt: skip
    if config.method == "dmd":
        paths = [parse_path(text) for text in config.paths]
        made |= {
            "steps": sum(map(len, paths[0])),
            "schedule": FITTED,
            FITTED: {order: {fitted_key([len(part) for part in path]): path for path in paths}},
        }
    return made


def _export(
    config: DistillConfig, pipe: Any, ways: Trajectories, state: dict[str, Any], groups: dict[str, dict[str, Tensor]]
) -> Path:
    """``student.safetensors`` and ``student.json``, and of a small teacher ``checkpoint``, which holds both."""
    folder = Path(config.out) / config.method
    weights = {name: value.to(torch.float16).contiguous() for name, value in groups["ema"].items()}
    weights["embed.audio_text.null"] = weights["embed.video_text.null"].clone()
    temporary = folder / "student.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "student.safetensors")
    settings = _settings(config, pipe, state)
    facts = {
        "model": settings["model"], "method": config.method, "steps": state["step"], "seconds": round(state["seconds"]),
        "grid": ways.grid, "config": asdict(config),
    }  # fmt: skip
    (folder / "student.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    if "components" not in pipe.description:
        export_student(config.teacher, weights, settings, folder / "checkpoint", overwrite=True, revert=True)
    return folder


def rehearse(config: DistillConfig) -> None:
    """The whole recipe once at toy size, full-size components with few channels and random weights; then its cost."""
    from tempfile import TemporaryDirectory

    from javis.pipeline import JavisPipeline
    from javis.train.distill_estimate import estimate

    with TemporaryDirectory() as folder:
        toy = JavisPipeline.with_random_weights("toy", device="cpu")
        teacher = toy.save_pretrained(Path(folder) / "teacher")
        captions = Path(folder) / "captions.txt"
        captions.write_text("rain on a tin roof\na dog barks at the sea\n", encoding="utf-8")
        small = replace(
            config, teacher=str(teacher), captions=captions, out=Path(folder) / "run", resolution="64x64", seconds=0.5,
            clips=4, held_out=1, batch=2, processes=1, device="cpu", precision="fp32", compile=False, save_every=2,
            teacher_steps=max(config.windows), stage=replace(config.stage, steps=2, warmup=1),
        )  # fmt: skip
        run(small)
    cost = estimate(config)
    log.info("toy size: recorded, trained and exported with random weights")
    log.info(
        "full size, %s: %.3g PFLOP to record %d clips, %.3g PFLOP to train %d steps of %d: %.3g GPU hours if %.0f "
        "TFLOP/s are sustained (an assumption)", config.resolution or "240p", cost.recording_pflop, config.clips,
        cost.training_pflop, config.stage.steps, config.batch, cost.hours, cost.tflops,
    )  # fmt: skip


def main(config: DistillConfig) -> int:
    """Command-line entry: distil, then say where the student is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.dry_run:
        rehearse(config)
    else:
        log.info("student: %s", run(config))
    return 0
