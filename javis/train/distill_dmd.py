"""Distribution matching of both modalities (DMD2: Yin et al., arXiv 2405.14867), for ``javis train distill``.

The student's whole rollout, a few unguided steps from noise to latents, is one generator. Its latents get noise at a
random timestep; there the teacher's guided velocity says where the distribution of good clips lies, and that of a
critic, which learns the student's own clips as training goes on, where the student's lies. The difference of the two
is the gradient: clips move to where the teacher makes more of them than the student does. A regression on the
teacher's ways averages over what may sound; this does not.

Where the sound is made first, both parts of a clip are generators: the second begins from the draft and the sound that
the student itself has made in the first, as in sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from javis.errors import UsageError
from javis.flow import NUM_TIMESTEPS, _spread, add_noise, transform_timestep
from javis.model.dit import Conditioning, JavisDiT, Velocity
from javis.train.checkpoint import flatten_optimizer, restore_optimizer
from javis.train.distill_config import WITH_GRADIENT, DistillConfig, parse_path
from javis.train.distill_lessons import Lessons, Task, student_of
from javis.train.stages import build_optimizers
from javis.train.trajectories import conditioning, guidance_of

EDGE = 0.02  # share of the timesteps left out at either end when teacher and critic are compared
SMALLEST = 1e-3  # mean distance to the teacher's prediction below which it is not scaled up further


@dataclass(frozen=True)
class Made:
    """Clips of one part, as the student has made them.

    Attributes:
        numbers: of the recorded clips whose captions and priors they have.
        video, audio: latents, without gradient. given: whether the sound was given (the second part).
        told: arguments of ``condition``. scales: of guidance, [B, 2].
    """

    numbers: list[int]
    video: Tensor
    audio: Tensor
    given: bool
    told: dict[str, Any]
    scales: Tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of all processes' gradients, in one exchange; a parameter without one counts as zero."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    own = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(own, flat.split([p.numel() for p in own]), strict=True):
        parameter.grad = mean.view_as(parameter).clone()


def matching_direction(made: Tensor, noisy: Tensor, t: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The gradient with respect to the latents (DMD2, eq. 1 and 2, for a rectified flow).

    With ``x = noisy + t/1000 * velocity`` the prediction of the clean latents: the critic's minus the teacher's, over
    the mean distance of the teacher's to what was made, per sample.

    Args:
        made, noisy: latents [B, ...], and the same with noise at ``t`` [B].
        real, fake: velocities there, of the teacher and of the critic.
    """
    share = _spread(t / NUM_TIMESTEPS, noisy)
    distance = (made - (noisy + share * real)).abs().flatten(1).mean(1).clamp(min=SMALLEST)
    return share * (fake - real) / _spread(distance, made)


class Matching:
    """The teacher, the critic, and the losses of one process: pure functions of (seed, step, weights)."""

    def __init__(self, task: Task, lessons: Lessons, rank: int, world: int) -> None:
        self.task, self.student, self.lessons, self.config = task, task.student, lessons, lessons.config
        self.rank, self.world, self.parts = rank, world, lessons.ways.parts
        self.paths = [parse_path(text) for text in self.config.paths]
        for text, path in zip(self.config.paths, self.paths, strict=True):
            if len(path) != self.parts:
                raise UsageError(
                    f"path {text!r} has {len(path)} parts, and this teacher makes a clip in {self.parts}; separate the "
                    "timesteps of the parts by '/'"
                )
        middle = lessons.ways.grid[len(lessons.ways.grid) // 2] / NUM_TIMESTEPS
        recorded = middle / (1 - middle)  # how those timesteps are shifted
        self.ratio = recorded if self.config.matching_ratio is None else self.config.matching_ratio
        self.critic = student_of(lessons.pipe.model, replace(self.config, method="guidance")).to(lessons.pipe.device)
        self.critic.embed.audio_text.null.requires_grad_(False)  # tied to the video's null caption
        named = [(n, p) for n, p in self.critic.named_parameters() if p.requires_grad]
        self.optimizers = build_optimizers(named, self.config, self.config.stage.learning_rate)
        self.made: list[Made] = []

    # -- the student ---------------------------------------------------------------------------------------------------

    def losses(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> total, video and audio loss, of matching; the total has the reflow loss with its weight, too.

        The gradient of matching is the direction; its values are half the direction's mean square.
        """
        seed = [self.config.seed, 31, step]
        count = len(self.lessons.ways) - self.config.held_out
        index = np.random.default_rng(seed).integers(0, count, self.config.batch)[self.rank :: self.world]
        shares = np.array(self.config.path_shares) / sum(self.config.path_shares)
        path = self.paths[int(np.random.default_rng([*seed, 1]).choice(len(self.paths), p=shares))]
        generator = torch.Generator().manual_seed(int(np.random.default_rng([*seed, self.rank]).integers(2**62)))
        video = audio = torch.zeros(())
        self.made = []
        for part, numbers in enumerate(np.array_split(index, self.parts)):
            losses = self._part([int(n) for n in numbers], path[: part + 1], generator)
            video = video + losses[0] * len(numbers) / len(index)
            audio = audio + losses[1] * len(numbers) / len(index)
        total = video + audio
        if self.config.reflow_weight:
            batch = self.lessons.make(index[::2], [*seed, self.rank, 2], self.task, None)
            total = total + self.config.reflow_weight * self.task(batch)[0]
        return total, video, audio

    def _part(self, numbers: list[int], path: Sequence[Sequence[float]], generator: torch.Generator) -> list[Tensor]:
        """Video and audio loss of the last part of ``path``; what comes before it is made without gradient."""
        pipe, ways = self.lessons.pipe, self.lessons.ways
        told = self.lessons.told(np.array(numbers))
        scales = torch.tensor([guidance_of(self.config, n) for n in numbers], dtype=torch.float32).to(pipe.device)
        shapes = [np.shape(x[0, 0]) for x in (ways.video, ways.audio)]
        noise = Velocity(*(torch.randn(len(numbers), *s, generator=generator).to(pipe.device) for s in shapes))
        with self._precision():
            condition = self.student.condition(**told, guidance=scales)
        latents = noise
        for number, times in enumerate(path):
            given, last = number > 0, number == len(path) - 1
            if given:  # as sample_in_order does
                start = torch.full((len(numbers),), times[0], device=pipe.device)
                latents = latents._replace(video=add_noise(latents.video, noise.video, start))
            latents = self.roll(latents, condition, times, given=given, gradient=last)
        made = Made(numbers, latents.video.detach(), latents.audio.detach(), given, told, scales)
        self.made.append(made)
        losses = []
        for x, direction in zip(latents, self.directions(made, generator), strict=True):
            losses.append(0.5 * (x - (x.detach() - direction)).square().mean())
        return losses

    def roll(
        self, start: Velocity, condition: Conditioning, times: Sequence[float], *, given: bool, gradient: bool
    ) -> Velocity:
        """The student's steps through ``times`` to 0; with ``gradient`` through the last evaluations."""
        video, audio = start
        for number, (begin, end) in enumerate(pairwise([*times, 0.0])):
            wanted = gradient and number >= len(times) - WITH_GRADIENT
            with torch.set_grad_enabled(wanted):
                t, until = (torch.full((len(video),), float(x), device=video.device) for x in (begin, end))
                v, a = self._velocity(self.student, video, audio, t, condition, given, end=until)
                video = video + (begin - end) / NUM_TIMESTEPS * v
                if not given:
                    audio = audio + (begin - end) / NUM_TIMESTEPS * a
        return Velocity(video, audio)

    @torch.no_grad()
    def directions(self, made: Made, generator: torch.Generator) -> Velocity:
        """Gradients with respect to the latents, of video and audio; zero for a sound that was given."""
        u = EDGE + (1 - 2 * EDGE) * torch.rand(len(made.video), generator=generator)
        video, audio, t, _ = self._noised(made, u, generator)
        masks = self._masks(video, audio, made.given)
        pipe, ways = self.lessons.pipe, self.lessons.ways
        told = conditioning(pipe, self.config, [ways.captions[n] for n in made.numbers], made.numbers, guided=True)
        shares = torch.tensor(self.config.matching_guidance, device=made.scales.device)
        batch = {"video": video, "audio": audio, "t": t, "scales": 1 + shares * (made.scales - 1)} | masks
        with self._precision():
            real = self.lessons.guided(batch, told)
            condition = self.critic.condition(**made.told, guidance=made.scales)
        fake = self._velocity(self.critic, video, audio, t, condition, made.given)
        seen = matching_direction(made.video, video, t, real.video.float(), fake.video)
        heard = matching_direction(made.audio, audio, t, real.audio.float(), fake.audio)
        return Velocity(seen, torch.zeros_like(heard) if made.given else heard)

    # -- the critic ----------------------------------------------------------------------------------------------------

    def warm_up(self, rate: float, step: int) -> list[float]:
        """One update of the critic on clips of the teacher, which the student's are like at first -> its losses."""
        pipe, ways = self.lessons.pipe, self.lessons.ways
        index = np.random.default_rng([self.config.seed, 30, step, self.rank]).integers(
            0, len(ways) - self.config.held_out, self.config.batch // self.world
        )
        self.made = []
        for part, some in enumerate(np.array_split(index, self.parts)):
            numbers = [int(n) for n in some]
            ends = [ways.window(n, part, self.lessons.states, self.lessons.states) for n in numbers]
            video, audio = (torch.stack([end[i] for end in ends]).to(pipe.device) for i in (0, 1))
            scales = torch.tensor([guidance_of(self.config, n) for n in numbers], dtype=torch.float32)
            told = self.lessons.told(some)
            self.made.append(Made(numbers, video, audio, part > 0, told, scales.to(pipe.device)))
        return self.follow(rate, -1 - step)

    def follow(self, rate: float, step: int) -> list[float]:
        """One update of the critic on the clips of the last :meth:`losses` -> its video and audio loss."""
        seed = int(np.random.default_rng([self.config.seed, 32, abs(step), step < 0, self.rank]).integers(2**62))
        generator, total = torch.Generator().manual_seed(seed), torch.zeros(())
        sums = torch.zeros(2)
        for made in self.made:
            losses = self.critic_losses(made, generator)
            share = len(made.numbers) / sum(len(m.numbers) for m in self.made)
            total = total + share * (losses[0] + losses[1])
            sums += share * torch.stack([x.detach().cpu() for x in losses])
        total.backward()
        own = [p for p in self.critic.parameters() if p.requires_grad]
        average_gradients(own)
        nn.utils.clip_grad_norm_(own, self.config.clip_gradient)
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.config.critic_rate * group["rate"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [float(x) for x in sums]

    def critic_losses(self, made: Made, generator: torch.Generator) -> list[Tensor]:
        """Rectified-flow losses of the critic on the student's clips: video, audio (zero for a given sound)."""
        u = torch.rand(len(made.video), generator=generator)
        video, audio, t, noise = self._noised(made, u, generator)
        with self._precision():
            condition = self.critic.condition(**made.told, guidance=made.scales)
        v, a = self._velocity(self.critic, video, audio, t, condition, made.given)
        heard = 0.0 if made.given else 1.0
        seen = (v - (made.video - noise.video)).square().mean()
        return [seen, heard * (a - (made.audio - noise.audio)).square().mean()]

    # -- both ----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors for a checkpoint of the run."""
        moments = {k: x for o, order in self.optimizers for k, x in flatten_optimizer(o, order).items()}
        return {"critic": self.critic.state_dict(), "critic_optimizer": moments}

    def load_state(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of :meth:`state`."""
        self.critic.load_state_dict(groups["critic"])
        for optimizer, order in self.optimizers:
            mine = {k: x for k, x in groups["critic_optimizer"].items() if k.rsplit("/", 1)[0] in order}
            restore_optimizer(optimizer, order, mine)

    def _precision(self) -> torch.autocast:
        kind = torch.device(self.lessons.pipe.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _noised(self, made: Made, u: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Velocity]:
        """Latents with noise at the timesteps of uniform ``u`` [B] -> video, audio, timesteps, the noise."""
        device = made.video.device
        t = transform_timestep(u * NUM_TIMESTEPS, self.ratio).to(device)
        noise = Velocity(*(torch.randn(x.shape, generator=generator).to(device) for x in (made.video, made.audio)))
        audio = made.audio if made.given else add_noise(made.audio, noise.audio, t)
        return add_noise(made.video, noise.video, t), audio, t, noise

    @staticmethod
    def _masks(video: Tensor, audio: Tensor, given: bool) -> dict[str, Tensor]:
        ones = torch.ones(len(video), video.shape[2], dtype=torch.bool, device=video.device)
        heard = torch.full((len(audio), audio.shape[2]), not given, dtype=torch.bool, device=video.device)
        return {"video_mask": ones, "audio_mask": heard}

    def _velocity(
        self,
        model: JavisDiT,
        video: Tensor,
        audio: Tensor,
        t: Tensor,
        condition: Conditioning,
        given: bool,
        **end: Tensor,
    ) -> Velocity:
        """Float32, without the channels of ``pred_sigma``."""
        with self._precision():
            out = model.denoise(video, audio, t, condition, **self._masks(video, audio, given), **end)
        return Velocity(out.video[:, : video.shape[1]].float(), out.audio[:, : audio.shape[1]].float())


def check_dmd(config: DistillConfig) -> None:
    """Refuse what this method cannot do.

    Raises:
        UsageError: fewer clips a process than parts, or ``compile``.
    """
    if config.batch // config.processes < 2:
        raise UsageError(f"method dmd needs two clips a process, got batch {config.batch} for {config.processes}")
    if config.compile:
        raise UsageError("method dmd evaluates three models a step and is not compiled; leave --compile out")
