"""Distribution matching: its direction against Gaussians, its rollout against the sampler, a kill, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from javis import JavisPipeline
from javis.errors import UsageError
from javis.flow import add_noise, transform_timestep
from javis.model.dit import Velocity
from javis.plan import plan
from javis.plan_args import PlanArgs
from javis.sample import sample_in_order
from javis.train import distill, distill_dmd
from javis.train.checkpoint import load_state
from javis.train.config import StageConfig
from javis.train.distill_config import DistillConfig, parse_path
from javis.train.distill_dmd import Matching, average_gradients, matching_direction
from javis.train.distill_estimate import estimate
from javis.train.distill_lessons import Lessons, Task, student_of
from javis.train.stages import learning_rate
from javis.train.trajectories import Trajectories, conditioning, record

from ..tiny import write_tiny_checkpoint
from .test_distill import settings

PATHS = ("1000,900,750/947", "1000,600/1000,500,200")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("teacher"))


def dmd(teacher: Path, out: Path, **changes: Any) -> DistillConfig:
    usual = {"method": "dmd", "paths": PATHS, "path_shares": (0.5, 0.5), "critic_warmup": 1, "clips": 6, "batch": 4}
    return settings(teacher, out, **(usual | changes))


@pytest.fixture
def matching(teacher: Path, tmp_path: Path, in_process: None) -> Matching:
    config = dmd(teacher, tmp_path / "run")
    pipe = JavisPipeline.from_pretrained(teacher)
    ways = record(config, pipe)
    torch.manual_seed(1)
    student = student_of(pipe.model, config)
    for embedder in student.embed.student_inputs():  # so that it listens to the ends of its steps
        torch.nn.init.normal_(embedder.fc2.weight, std=0.5)
    return Matching(Task(student, config), Lessons(pipe, ways, config), 0, 1)


# -- the direction -----------------------------------------------------------------------------------------------------


def velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """Of the rectified flow from noise to a Gaussian: the clean sample is regressed on the noisy one."""
    s = (t / 1000).view(-1, *[1] * (x.ndim - 1))
    gain = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)
    return (mean + gain * (x - (1 - s) * mean) - x) / s


def test_the_direction_between_gaussians() -> None:
    torch.manual_seed(0)
    made = torch.randn(5, 2, 3, 4, 4, dtype=torch.float64) * 0.7 + 2
    t = torch.tensor([100.0, 400.0, 700.0, 900.0, 980.0], dtype=torch.float64)
    noisy = add_noise(made, torch.randn_like(made), t)
    real, fake = velocity(noisy, t, -1.0, 0.5), velocity(noisy, t, 2.0, 0.7)
    found = matching_direction(made, noisy, t, real, fake)
    for i in range(5):
        s = float(t[i]) / 1000
        clean = [noisy[i] + s * v[i] for v in (real, fake)]
        expected = (clean[1] - clean[0]) / (made[i] - clean[0]).abs().mean()
        torch.testing.assert_close(found[i], expected)
    assert bool((found.flatten(1).mean(1) > 0).all())  # descent goes down, to where the teacher's mean is
    assert not matching_direction(made, noisy, t, real, real).any()


def test_descent_along_it_ends_at_the_teachers_distribution() -> None:
    """Particles of N(3, 0.3) and a critic that knows their mean and spread come to the teacher's N(-1, 0.8)."""
    torch.manual_seed(0)
    x = torch.randn(128, 64) * 0.3 + 3
    for step in range(600):
        t = transform_timestep(20 + 960 * torch.rand(len(x)), 3.0)
        noisy = add_noise(x, torch.randn_like(x), t)
        fake = velocity(noisy, t, float(x.mean()), float(x.std()))
        x = x - 0.1 * (1 - step / 600) * matching_direction(x, noisy, t, velocity(noisy, t, -1.0, 0.8), fake)
    assert float(x.mean()) == pytest.approx(-1.0, abs=0.05)
    assert float(x.std()) == pytest.approx(0.8, abs=0.1)


# -- the rollout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATHS)
def test_training_makes_clips_as_the_sampler_does(matching: Matching, text: str) -> None:
    """Latents of the second part, and through it the draft and sound of the first, are those of sample_in_order."""
    pipe, config, path = matching.lessons.pipe, matching.config, parse_path(text)
    numbers = [0, 3]
    generator = torch.Generator().manual_seed(5)
    shapes = [np.shape(x[0, 0]) for x in (matching.lessons.ways.video, matching.lessons.ways.audio)]
    noise = [torch.randn(2, *s, generator=generator) for s in shapes]
    matching.made = []
    matching._part(numbers, path, torch.Generator().manual_seed(5))
    (made,) = matching.made
    captions = [matching.lessons.ways.captions[n] for n in numbers]
    told = conditioning(pipe, config, captions, numbers, guided=False, model=Told(matching))
    video, audio = sample_in_order(
        matching.student, *noise, told, sum(map(len, path)), order="sound_first", audio_steps=len(path[0]),
        schedule=lambda counts: [torch.tensor(part) for part in path],
    )  # fmt: skip
    torch.testing.assert_close(made.video, video, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.audio, audio, rtol=1e-4, atol=1e-4)
    assert made.given and not matching.directions(made, generator).audio.any()


class Told:
    """The student, told the middle of the guidance that its clips have."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching

    def condition(self, text: Tensor, **told: Any) -> Any:
        scales = torch.tensor([[2.5, 4.0]] * len(text))
        return self.matching.student.condition(text, **told, guidance=scales)


def test_the_gradient_goes_through_the_last_two_evaluations(
    matching: Matching, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    velocity = matching._velocity

    def watched(*args: Any, **options: Any) -> Velocity:
        enabled.append(torch.is_grad_enabled())
        return velocity(*args, **options)

    monkeypatch.setattr(matching, "_velocity", watched)
    told = matching.lessons.told(np.array([0]))
    condition = matching.student.condition(**told, guidance=torch.tensor([[2.5, 4.0]]))
    start = Velocity(*(x[None] for x in matching.lessons.ways.window(0, 0, 0, 0)[:2]))
    made = matching.roll(start, condition, [1000.0, 900.0, 750.0], given=False, gradient=True)
    assert enabled == [False, True, True]
    (made.video.square().mean() + made.audio.square().mean()).backward()
    assert all(layer.video_spatial.attn.qkv.weight.grad.any() for layer in matching.student.layers)
    matching.roll(start, condition, [1000.0, 900.0], given=True, gradient=False)
    assert enabled[3:] == [False, False]


def test_the_gradient_is_the_direction(matching: Matching, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rollout replaced by one parameter the losses hand it the directions, over the number of values."""
    shift = torch.zeros((), requires_grad=True)
    roll = matching.roll

    def shifted(*args: Any, gradient: bool, **options: Any) -> Velocity:
        with torch.no_grad():
            out = roll(*args, gradient=False, **options)
        return Velocity(*(x + shift for x in out)) if gradient else out

    directions: list[Velocity] = []
    found = matching.directions

    def kept(*args: Any) -> Velocity:
        directions.append(found(*args))
        return directions[-1]

    monkeypatch.setattr(matching, "roll", shifted)
    monkeypatch.setattr(matching, "directions", kept)
    matching.config = dataclasses.replace(matching.config, reflow_weight=0.0)
    total, video, audio = matching.losses(0)
    total.backward()
    assert len(directions) == 2 and [m.given for m in matching.made] == [False, True]
    expected = sum(float(d.video.mean() + d.audio.mean()) / 2 for d in directions)
    assert float(shift.grad) == pytest.approx(expected, rel=1e-4)
    squares = [sum(float(d[i].square().mean()) / 4 for d in directions) for i in (0, 1)]
    assert [video.item(), audio.item()] == pytest.approx(squares, rel=1e-4)


def test_the_teachers_guidance_may_be_weaker(matching: Matching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share 0 is the conditional velocity alone, 1 the guided one; the critic is told the whole scale in any case."""
    pipe, config = matching.lessons.pipe, matching.config
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(
        distill_dmd, "matching_direction", lambda *args: seen.append(args[1:4]) or torch.zeros_like(args[0])
    )
    matching._part([0, 3], parse_path(PATHS[0])[:1], torch.Generator().manual_seed(5))
    (made,) = matching.made
    real = {}
    for shares in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.25)):
        seen.clear()
        matching.config = dataclasses.replace(config, matching_guidance=shares)
        matching.directions(made, torch.Generator().manual_seed(6))
        real[shares] = [velocity for _, _, velocity in seen]
    captions = [matching.lessons.ways.captions[n] for n in (0, 3)]
    told = conditioning(pipe, config, captions, [0, 3], guided=False)
    with torch.no_grad():
        alone = pipe.model.denoise(*(noisy for noisy, _, _ in seen), seen[0][1], told)
    for i, (scale, share) in enumerate(((2.5, 0.5), (4.0, 0.25))):
        plain, whole = real[0.0, 0.0][i], real[1.0, 1.0][i]
        torch.testing.assert_close(plain, alone[i], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain, whole, atol=1e-3)
        difference = (whole - plain) / (scale - 1)  # between with and without caption
        torch.testing.assert_close(real[0.5, 0.25][i], plain + share * (scale - 1) * difference, rtol=1e-3, atol=1e-4)


def test_at_which_timesteps_clips_are_compared(matching: Matching) -> None:
    """As the recorded ones are shifted, or by a ratio of one's own."""
    pipe, lessons = matching.lessons.pipe, matching.lessons
    half = torch.full((2,), 0.5)
    matching._part([0, 3], parse_path(PATHS[0])[:1], torch.Generator().manual_seed(5))
    (made,) = matching.made
    ratio = pipe.description["sampling"]["timestep_ratio"]
    _, _, t, _ = matching._noised(made, half, torch.Generator())
    assert t.tolist() == pytest.approx([1000 * ratio / (1 + ratio)] * 2, rel=1e-3)
    lower = Lessons(pipe, lessons.ways, dataclasses.replace(matching.config, matching_ratio=3.0))
    _, _, t, _ = Matching(matching.task, lower, 0, 1)._noised(made, half, torch.Generator())
    assert t.tolist() == [750.0] * 2


def test_the_critic_learns_what_the_student_makes(matching: Matching) -> None:
    """On the same clips over and over its loss falls, and the losses are those of the flow to them."""
    matching.losses(3)
    losses = [sum(matching.follow(2e-3, 7)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    given = next(made for made in matching.made if made.given)
    assert matching.critic_losses(given, torch.Generator().manual_seed(1))[1].item() == 0


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_from_reflow_to_a_checkpoint_that_samples(teacher: Path, tmp_path: Path, in_process: None) -> None:
    """With its paths as fitted timesteps: 4 steps are 3 of the sound and one of the picture from its draft."""
    usual = {"clips": 6, "batch": 4, "stage": StageConfig(steps=2, warmup=1, learning_rate=1e-3)}
    first = distill.run(settings(teacher, tmp_path / "run", **usual))
    config = dmd(teacher, tmp_path / "run", init=first, **usual)
    folder = distill.run(config)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"critic_video", "critic_audio", "norm"} <= rows[0].keys()
    begun, ended = (load_file(f / "student.safetensors") for f in (first, folder))
    assert any(not torch.equal(begun[name], ended[name]) for name in begun)
    pipe = JavisPipeline.from_pretrained(folder / "checkpoint")
    clip = pipe("a red ball bounces", seed=1)
    assert (clip.choice.variant, clip.steps) == ("student", 4)
    assert pipe.description["student"]["fitted"]["sound_first"]["3+1"] == [[1000, 900, 750], [947]]
    by_hand = pipe("a red ball bounces", seed=1, schedule="fitted", audio_steps=3, steps=4)
    assert torch.equal(torch.as_tensor(clip.audio), torch.as_tensor(by_hand.audio))
    even = pipe("a red ball bounces", seed=1, schedule="uniform", steps=4)
    assert not torch.equal(torch.as_tensor(clip.audio), torch.as_tensor(even.audio))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(teacher: Path, tmp_path: Path, in_process: None) -> None:
    stage = StageConfig(steps=3, warmup=1, decay=0.5)
    distill.run(dmd(teacher, tmp_path / "whole", stage=stage))
    part = dmd(teacher, tmp_path / "part", stage=stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "learning_rate", lambda step, stage: 1 / 0 if step == 2 else learning_rate(step, stage))
        with pytest.raises(ZeroDivisionError):
            distill.run(part)
    distill.run(part)
    found = [load_file(tmp_path / name / "dmd" / "student.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_further_course_goes_on_with_the_critic(
    teacher: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = distill.run(dmd(teacher, tmp_path / "first"))
    found = load_state(first)
    assert found is not None
    begun: list[dict[str, Tensor]] = []
    losses, warmed = Matching.losses, []

    def watched(self: Matching, step: int) -> Any:
        begun.append({name: value.clone() for name, value in self.critic.state_dict().items()})
        return losses(self, step)

    monkeypatch.setattr(Matching, "losses", watched)
    monkeypatch.setattr(Matching, "warm_up", lambda self, rate, step: warmed.append(step))
    distill.run(dmd(teacher, tmp_path / "second", init=first))
    assert not warmed
    assert all(torch.equal(begun[0][name], value) for name, value in found[1]["critic"].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matching_ratio": float("inf")}, "matching_ratio must be a number from 0.01 to 100"),
        ({"matching_guidance": (0.5, 1.5)}, "matching_guidance must be two shares from 0 to 1"),
        ({"paths": ("900,800/700", PATHS[0])}, "a path is a list of timesteps.*list from 1000; got '900,800/700'"),
        ({"paths": ("1000,1000/900", PATHS[0])}, "decreasing"),
        ({"paths": ("1000,0/900", PATHS[0])}, "above 0"),
        ({"paths": ("1000/900/800", PATHS[0])}, "a path is"),
        ({"paths": ("1000,nan/800", PATHS[0])}, "a path is"),
        ({"paths": ("a", PATHS[0])}, "a path is"),
        ({"path_shares": (1.0,)}, "path_shares needs 2 shares"),
        ({"critic_rate": float("nan")}, "critic_rate must be a number from 0 to 1000"),
        ({"batch": 1}, "needs two clips a process"),
        ({"compile": True}, "leave --compile out"),
        ({"init": Path("nowhere")}, "--init nowhere: no student there"),
        ({"paths": ("1000,900", "1000,500")}, "has 1 parts, and this teacher makes a clip in 2"),
    ],
)
def test_unusable_settings(
    changes: dict[str, Any], message: str, teacher: Path, tmp_path: Path, in_process: None
) -> None:
    with pytest.raises(UsageError, match=message):
        distill.run(dmd(teacher, tmp_path, **changes))


def test_what_it_costs() -> None:
    """One part of two evaluations: 2 forward, 2 back at twice the price, teacher 2, critic 1 + 3, reflow 1.5."""
    config = DistillConfig(method="dmd", paths=("1000,500",), path_shares=(1.0,), clips=100, held_out=1)
    forward = plan(PlanArgs(resolution="240p", steps=1, guidance=False))["tflop_per_step"]["total"] / 1e3
    assert estimate(config).training_pflop == pytest.approx(forward * 2400 * 16 * (2 + 4 + 2 + 1 + 3 + 1.5))
    longer = dataclasses.replace(config, paths=("1000,750,500/900",))  # (3 + 4) / 2 + (3 + 1 + 2) / 2
    assert estimate(longer, parts=2).training_pflop == pytest.approx(forward * 2400 * 16 * (6.5 + 7.5))


def _averaged(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    (a * (rank + 1.0)).sum().backward()
    if rank:
        (b * 4.0).sum().backward()
    average_gradients([a, b])
    assert a.grad.tolist() == [1.5] * 3 and b.grad.tolist() == [2.0] * 3
    torch.distributed.destroy_process_group()


def test_gradients_of_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_averaged, args=(str(tmp_path),), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(teacher: Path, tmp_path: Path) -> None:
    folder = distill.run(dmd(teacher, tmp_path / "run", device="cuda"))
    assert json.loads((folder / "student.json").read_text())["steps"] == 2
    assert Trajectories.open(tmp_path / "run" / "trajectories").parts == 2
