"""What a step of distillation learns from: clips of the teacher's sampler, and targets for the student's velocity.

See javis/train/distill.py for the methods.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from javis.errors import UsageError
from javis.flow import NUM_TIMESTEPS, _spread, add_noise, masked_mean, transform_timestep
from javis.model.dit import JavisDiT, Velocity
from javis.train.distill_config import DistillConfig
from javis.train.ops import cpu_training_ops
from javis.train.trajectories import Trajectories, conditioning, guidance_of


def student_of(teacher: JavisDiT, config: DistillConfig) -> JavisDiT:
    """A model with the teacher's weights and the student's inputs, which change nothing yet."""
    changed = replace(teacher.config, guidance_input=True, step_input=config.method != "guidance")
    student = JavisDiT(changed, cpu_training_ops() if config.device == "cpu" else None)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith(("embed.end.", "embed.guidance."))]
    if foreign or unexpected:
        raise UsageError(f"the teacher's weights do not fit its student: {(foreign + unexpected)[:3]}")
    return student


def keep_prior_attention(student: JavisDiT, teacher: JavisDiT) -> None:
    """Give the student its teacher's attention to the priors, and do not train it."""
    held = teacher.state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "_prior." in name and ".attn." in name:
                parameter.copy_(held[name])
                parameter.requires_grad_(False)


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
        if method in ("reflow", "dmd"):
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
