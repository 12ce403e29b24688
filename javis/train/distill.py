"""``javis train distill``: students of few unguided evaluations, of both modalities together.

- guidance: the student's velocity is the teacher's guided one (Meng et al., arXiv 2210.03142, stage one).
- reflow: piecewise rectified flow (Yan et al., arXiv 2405.07510): between two timesteps the student goes straight to
  where the teacher's guided sampler arrives. It is told where its step ends, so that one student serves several step
  counts, and learns on the teacher's own ways, so that in training it sees what it will see in sampling.
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
from javis.flow import NUM_TIMESTEPS, _spread, add_noise, masked_mean, transform_timestep
from javis.model.dit import JavisDiT, Velocity
from javis.train.checkpoint import Ema, flatten_optimizer, load_state, restore_optimizer, save_state
from javis.train.distill_config import DistillConfig
from javis.train.export import export_student
from javis.train.ops import cpu_training_ops
from javis.train.stages import _log, build_optimizers, learning_rate
from javis.train.trajectories import Trajectories, clip_settings, conditioning, guidance_of, record

log = logging.getLogger("javis.train")


def student_of(teacher: JavisDiT, config: DistillConfig) -> JavisDiT:
    """A model with the teacher's weights and the student's inputs, which change nothing yet."""
    changed = replace(teacher.config, guidance_input=True, step_input=config.method != "guidance")
    student = JavisDiT(changed, cpu_training_ops() if config.device == "cpu" else None)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith(("embed.end.", "embed.guidance."))]
    if foreign or unexpected:
        raise UsageError(f"the teacher's weights do not fit its student: {(foreign + unexpected)[:3]}")
    return student


class Task(nn.Module):
    """Student plus loss in one ``forward``, as DistributedDataParallel wants it."""

    def __init__(self, student: JavisDiT, config: DistillConfig) -> None:
        super().__init__()
        self.student, self.config = student, config

    def velocity(self, model: JavisDiT, batch: dict[str, Any], **changes: Tensor) -> Velocity:
        """The student's velocity (or that of its average) on a batch; ``changes`` take the place of its entries.

        Of a model with ``pred_sigma`` the first half of the channels, as in sampling.
        """
        b = batch | changes
        told = model.condition(**b["told"], guidance=b["scales"])
        end = {"end": b["end"]} if model.config.step_input else {}
        masks = {k: b[k] for k in ("video_mask", "audio_mask")}
        out = model.denoise(b["video"], b["audio"], b["t"], told, **masks, **end)
        return Velocity(out.video[:, : b["video"].shape[1]], out.audio[:, : b["audio"].shape[1]])

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """-> total, video and audio loss: mean square error of the velocity, of what is not given."""
        with torch.autocast(batch["t"].device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.velocity(self.student, batch)
        video = masked_mean((out.video.float() - batch["video_target"]).square(), None).mean()
        heard = batch["audio_mask"][:, 0].float()
        audio = masked_mean((out.audio.float() - batch["audio_target"]).square(), None)
        audio = (audio * heard).sum() / heard.sum().clamp(min=1)
        return video + audio * heard.mean(), video, audio


class Lessons:
    """Batches with their targets, as a pure function of (seed, step, rank): a resumed run sees the same ones."""

    def __init__(self, pipe: Any, ways: Trajectories, config: DistillConfig) -> None:
        self.pipe, self.ways, self.config = pipe, ways, config
        self.states = len(ways.grid) - 1

    def draw(self, index: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Windows of the given clips: latents at both ends, timesteps, masks, conditioning."""
        c, found = self.config, []
        for clip in index:
            part = int(rng.integers(self.ways.parts))
            steps = int(rng.choice(c.windows, p=np.array(c.window_shares) / sum(c.window_shares)))
            width, k = self.states // steps, int(rng.integers(steps))
            found.append((part, k * width, (k + 1) * width, int(clip)))
        windows = [self.ways.window(clip, part, begin, end) for part, begin, end, clip in found]
        video, audio, video_end, audio_end = (torch.stack([w[i] for w in windows]) for i in range(4))
        second = torch.tensor([part > 0 for part, *_ in found])
        grid = torch.tensor(self.ways.grid)
        batch = {
            "video": video,
            "audio": audio,
            "t": grid[[begin for _, begin, _, _ in found]],
            "end": grid[[end for _, _, end, _ in found]],
            "scales": torch.tensor([guidance_of(c, int(i)) for i in index], dtype=torch.float32),
            "video_mask": torch.ones(len(index), video.shape[2], dtype=torch.bool),
            "audio_mask": ~second[:, None].expand(-1, audio.shape[2]),
        }
        dt = (batch["t"] - batch["end"]) / NUM_TIMESTEPS
        batch["video_target"] = (video_end - video) / _spread(dt, video)
        batch["audio_target"] = (audio_end - audio) / _spread(dt, audio)
        return {name: value.to(self.pipe.device) for name, value in batch.items()}

    def anew(self, batch: dict[str, Any], index: np.ndarray, generator: torch.Generator, any_time: bool) -> None:
        """Other points for the methods that ask the teacher there: its finished clips with fresh noise.

        At any timestep (guidance), or at those where the windows begin (shortcut).
        """
        if any_time:
            middle = self.ways.grid[len(self.ways.grid) // 2] / NUM_TIMESTEPS  # says how the grid is shifted
            uniform = torch.rand(len(index), generator=generator) * NUM_TIMESTEPS
            batch["t"] = transform_timestep(uniform, middle / (1 - middle)).to(batch["t"].device)
        heard = batch["audio_mask"][:, 0]
        last = [self.ways.window(int(i), self.ways.parts - 1, self.states, self.states) for i in index]
        for name, clean in (("video", [w[0] for w in last]), ("audio", [w[1] for w in last])):
            x = torch.stack(clean).to(batch["t"].device)
            noisy = add_noise(x, torch.randn(x.shape, generator=generator).to(x), batch["t"])
            batch[name] = noisy if name == "video" else torch.where(_spread(heard, x), noisy, x)

    def told(self, index: np.ndarray) -> dict[str, Any]:
        """Arguments of ``condition`` for the given clips: the student computes its conditioning with gradients."""
        numbers = [int(i) for i in index]
        captured: dict[str, Any] = {}

        class Capture:
            """Stands for the model that is told, and keeps what it is told."""

            @staticmethod
            def condition(text: Tensor, **kwargs: Any) -> None:
                captured.update(kwargs, text=text)

        captions = [self.ways.captions[n] for n in numbers]
        conditioning(self.pipe, self.config, captions, numbers, guided=False, model=Capture)
        return captured

    @torch.no_grad()
    def guided(self, batch: dict[str, Any], told: Any) -> Velocity:
        """The teacher's guided velocity at the points of a batch."""
        twice = {k: torch.cat((batch[k], batch[k])) for k in ("video", "audio", "t", "video_mask", "audio_mask")}
        masks = {k: twice.pop(k) for k in ("video_mask", "audio_mask")}
        out = self.pipe.model.denoise(twice["video"], twice["audio"], twice["t"], told, **masks)
        parts = []
        for i, x in enumerate(out):
            seen, unseen = x[:, : batch["video" if i == 0 else "audio"].shape[1]].chunk(2)
            parts.append(unseen + _spread(batch["scales"][:, i], x) * (seen - unseen))
        return Velocity(*parts)

    def make(self, index: np.ndarray, seed: list[int], task: Task, average: JavisDiT | None) -> dict[str, Any]:
        """A batch with its targets. ``average``: the student whose half steps a shortcut imitates."""
        method, rng = self.config.method, np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = self.draw(index, rng)
        batch["told"] = self.told(index)
        if method == "reflow":
            return batch
        self.anew(batch, index, generator, any_time=method == "guidance")
        numbers = [int(i) for i in index]
        told = conditioning(self.pipe, self.config, [self.ways.captions[n] for n in numbers], numbers, guided=True)
        target = self.guided(batch, told)
        if method == "shortcut" and average is not None:
            target = self._two_halves(batch, task, average, target)
        batch["video_target"], batch["audio_target"] = target
        return batch

    @torch.no_grad()
    def _two_halves(self, batch: dict[str, Any], task: Task, average: JavisDiT, single: Velocity) -> Velocity:
        """Average velocity over two half steps of the averaged student; ``single`` where a window is the shortest."""
        grid = torch.tensor(self.ways.grid, device=batch["t"].device)
        begin = (grid[None] - batch["t"][:, None]).abs().argmin(1)
        stop = (grid[None] - batch["end"][:, None]).abs().argmin(1)
        middle = grid[(begin + stop) // 2]
        first = task.velocity(average, batch, end=middle)
        dt = (batch["t"] - middle) / NUM_TIMESTEPS
        heard = batch["audio_mask"][:, 0]
        video = batch["video"] + _spread(dt, batch["video"]) * first.video
        audio = batch["audio"] + _spread(dt * heard, batch["audio"]) * first.audio
        second = task.velocity(average, batch, video=video, audio=audio, t=middle)
        share = dt / ((batch["t"] - batch["end"]) / NUM_TIMESTEPS)
        longest = stop - begin > 1
        return Velocity(
            *(
                torch.where(_spread(longest, a), _spread(share, a) * a + _spread(1 - share, a) * b, c)
                for a, b, c in zip(first, second, single, strict=True)
            )
        )

    def training_batch(self, step: int, rank: int, world: int, task: Task, average: JavisDiT | None) -> dict[str, Any]:
        """Batch of a training step; clips of the validation are left out."""
        seed = [self.config.seed, 21, step]
        count = len(self.ways) - self.config.held_out
        index = np.random.default_rng(seed).integers(0, count, self.config.batch)
        return self.make(index[rank::world], [*seed, rank], task, average)

    @torch.no_grad()
    def validation(self, task: Task, average: JavisDiT | None) -> list[float]:
        """(total, video, audio) loss on the held-out clips."""
        first, sums, size = len(self.ways) - self.config.held_out, np.zeros(3), 16
        for start in range(first, len(self.ways), size):
            index = np.arange(start, min(start + size, len(self.ways)))
            losses = task(self.make(index, [5, start], task, average))
            sums += np.array([float(x) for x in losses]) * len(index)
        return [round(float(x), 5) for x in sums / self.config.held_out]


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
    named = [(n, p) for n, p in student.named_parameters() if n != "embed.audio_text.null" and p.requires_grad]
    student.embed.audio_text.null.requires_grad_(False)  # tied to the video's null caption
    optimizers = build_optimizers(named, config, stage.learning_rate)
    ema = Ema(student, config.ema)
    average = student_of(pipe.model, config).to(pipe.device).requires_grad_(False).eval()
    step, seconds = 0, 0.0
    if (found := load_state(folder)) is not None:
        state, groups = found
        step, seconds, ema.updates = state["step"], state["seconds"], state["ema_updates"]
        student.load_state_dict(groups["model"])
        ema.shadow = {name: value.to(pipe.device) for name, value in groups["ema"].items()}
        for optimizer, order in optimizers:
            mine = {k: x for k, x in groups["optimizer"].items() if k.rsplit("/", 1)[0] in order}
            restore_optimizer(optimizer, order, mine)
    task = Task(student, config)
    running: Any = torch.compile(task) if config.compile else task
    if world > 1:
        running = nn.parallel.DistributedDataParallel(
            running, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    lessons = Lessons(pipe, Trajectories.open(out / "trajectories"), config)
    began, parent, sums = time.perf_counter(), os.getppid(), []
    while step < stage.steps:
        if os.getppid() != parent:  # the command was killed; a worker left behind would write beside its successor
            raise SystemExit(f"distill {config.method}: the process that started this worker is gone")
        rate = learning_rate(step, stage)
        for optimizer, _ in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
        if config.method == "shortcut":
            average.load_state_dict(ema.shadow)
        losses = running(lessons.training_batch(step, rank, world, task, average))
        losses[0].backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), config.clip_gradient)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        ema.update(student)  # on every rank: the shortcut imitates it
        if rank:
            continue
        sums.append([*(float(x.detach()) for x in losses), float(norm)])
        spent = round(seconds + time.perf_counter() - began, 1)
        last = step == stage.steps
        if step % config.log_every == 0 or last:
            values = (round(float(x), 5) for x in np.mean(sums, axis=0))
            _log(folder, {"step": step, **dict(zip(("loss", "video", "audio", "norm"), values, strict=True)),
                          "lr": rate, "seconds": spent})  # fmt: skip
            sums = []
        if step % config.save_every == 0 or last:
            average.load_state_dict(ema.shadow)
            value = lessons.validation(Task(average, config).eval(), average)
            _log(folder, {"step": step, "validation": value, "seconds": spent})
            moments = {k: x for o, order in optimizers for k, x in flatten_optimizer(o, order).items()}
            groups = {"model": student.state_dict(), "ema": ema.shadow, "optimizer": moments}
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
    changed = {"guidance_input": True, "step_input": config.method != "guidance"}
    facts = {
        "model": changed, "method": config.method, "steps": state["step"], "seconds": round(state["seconds"]),
        "grid": ways.grid, "config": asdict(config),
    }  # fmt: skip
    (folder / "student.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    if "components" not in pipe.description:
        middle = [sum(scales) / 2 for scales in (config.guidance, config.audio_guidance)]
        _, _, ratio, order = clip_settings(pipe, config)
        settings = {
            "steps": 4, "guidance": middle[0], "audio_guidance": middle[1], "order": order, "timestep_ratio": ratio,
            "solver": "euler", "model": changed,
            "training": {"method": config.method, "clips": config.clips, "steps": state["step"],
                         "seconds": round(state["seconds"])},
        }  # fmt: skip
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
