"""Distillation at a tiny size: what is recorded, the targets against closed forms, that a student learns, a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from javis import JavisPipeline
from javis.errors import UsageError
from javis.model.dit import Velocity
from javis.plan import plan
from javis.plan_args import PlanArgs
from javis.train import distill, trajectories
from javis.train.config import StageConfig
from javis.train.distill_config import DistillConfig
from javis.train.distill_estimate import estimate
from javis.train.distill_lessons import Lessons, Task, student_of
from javis.train.stages import learning_rate
from javis.train.trajectories import Trajectories, conditioning, guidance_of, read_captions, record, seed_of

from ..tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("teacher"))


def settings(teacher: Path, out: Path, **changes: Any) -> DistillConfig:
    usual: dict[str, Any] = {
        "teacher": str(teacher), "out": out, "clips": 4, "held_out": 2, "teacher_steps": 4, "batch": 2, "processes": 1,
        "precision": "fp32", "stage": StageConfig(steps=2, warmup=1), "save_every": 1, "log_every": 1,
    }  # fmt: skip
    return DistillConfig(**(usual | changes))


@pytest.fixture
def recorded(teacher: Path, tmp_path: Path, in_process: None) -> tuple[DistillConfig, JavisPipeline, Trajectories]:
    config = settings(teacher, tmp_path / "run")
    pipe = JavisPipeline.from_pretrained(teacher)
    return config, pipe, record(config, pipe)


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "parts"), [("sound_first", 2), ("together", 1)])
def test_recorded_states_are_those_of_the_pipeline(
    order: str, parts: int, teacher: Path, tmp_path: Path, in_process: None
) -> None:
    pipe = JavisPipeline.from_pretrained(teacher)
    pipe.description["sampling"]["order"] = order
    config = settings(teacher, tmp_path / "run", clips=3, held_out=1, windows=(2, 1), window_shares=(0.5, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JavisPipeline, "from_pretrained", lambda *_, **__: pipe)
        ways = record(config, pipe)
    assert (ways.parts, len(ways), ways.video.shape[1], ways.audio.shape[1]) == (parts, 3, 1 + 2 * parts, 3)
    seen: list[tuple[Any, Any]] = []

    def keep(_: Any, step: int, __: float, latents: dict[str, Any]) -> None:
        seen.append((latents["video_latents"], latents["audio_latents"]))

    pipe(ways.captions[1], seed=seed_of(config, 1), steps=4 * parts, order=order, callback_on_step_end=keep)
    for part in range(parts):
        for state in (1, 2):
            video, audio = seen[4 * part + 2 * state - 1]
            found = ways.window(1, part, 0, state)
            torch.testing.assert_close(found[2], video[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(found[3], audio[0], rtol=2e-3, atol=2e-3)
    assert ways.grid[0] == 1000 and ways.grid[-1] == 0 and sorted(ways.grid, reverse=True) == ways.grid
    assert torch.equal(ways.window(1, 0, 0, 1)[0], ways.window(1, parts - 1, 0, 2)[0])


def test_a_killed_recording_goes_on(teacher: Path, tmp_path: Path, in_process: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(trajectories, "CHUNK", 2)
    config, pipe = settings(teacher, tmp_path / "run"), JavisPipeline.from_pretrained(teacher)
    whole = record(settings(teacher, tmp_path / "whole"), pipe)
    made: list[list[int]] = []
    usual = trajectories._sampled

    def breaks(*args: Any) -> Any:
        if made and args[3][0] >= 2 and len(made) == 1:
            made.append([])
            raise KeyboardInterrupt
        made.append(args[3])
        return usual(*args)

    monkeypatch.setattr(trajectories, "_sampled", breaks)
    with pytest.raises(KeyboardInterrupt):
        record(config, pipe)
    again = record(config, pipe)
    assert made == [[0, 1], [], [2, 3]]  # the first chunk was not made again
    assert np.array_equal(again.video, whole.video) and np.array_equal(again.audio, whole.audio)
    record(config, pipe)
    assert len(made) == 3
    with pytest.raises(UsageError, match="recording with other settings"):
        record(dataclasses.replace(config, seed=1), pipe)


def test_captions_and_scales(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a red ball bounces on the left\n\na blue box rings on the right\n")
    config = settings(teacher, tmp_path, captions=file, clips=5, guidance=(1.0, 3.0), audio_guidance=(2.0, 2.0))
    assert read_captions(config)[2:4] == ["a red ball bounces on the left", "a blue box rings on the right"]
    scales = [guidance_of(config, i) for i in range(50)]
    assert all(1 <= s.video <= 3 and s.audio == 2 for s in scales)
    assert max(s.video for s in scales) - min(s.video for s in scales) > 1
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a readable text file"):
        read_captions(config)
    file.write_text("\n")
    with pytest.raises(UsageError, match="no captions"):
        read_captions(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (3,), "window_shares": (1.0,)}, "must divide"),
        ({"windows": (4, 2)}, "needs 2 shares"),
        ({"method": "shortcut", "windows": (4,), "window_shares": (1.0,)}, "must be 1, 2, 4"),
        ({"guidance": (3.0, 2.0)}, "guidance must be a range"),
        ({"audio_guidance": (0.0, float("nan"))}, "audio_guidance must be a range"),
        ({"held_out": 4}, "held_out must be between"),
        ({"processes": 3}, "must be a multiple"),
    ],
)
def test_unusable_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        settings(tmp_path, tmp_path, **changes)


# -- targets -----------------------------------------------------------------------------------------------------------


def test_windows_lead_from_the_noise_to_the_clip(
    recorded: tuple[DistillConfig, JavisPipeline, Trajectories],
) -> None:
    """Each step count: x + target * (t - end) over a part's windows is the way from its first state to its last."""
    config, pipe, ways = recorded
    for steps in (1, 2, 4):
        lessons = Lessons(pipe, ways, dataclasses.replace(config, windows=(steps,), window_shares=(1.0,)))
        rng, pieces = np.random.default_rng(0), {}
        for _ in range(40):
            batch = lessons.draw(np.array([1]), rng)
            pieces[bool(batch["audio_mask"].all()), float(batch["t"])] = batch
        assert len(pieces) == 2 * steps
        for both in (True, False):
            mine = sorted((t, b) for (first, t), b in pieces.items() if first is both)[::-1]
            x, sound = mine[0][1]["video"], mine[0][1]["audio"]
            for t, b in mine:
                dt = (t - float(b["end"])) / 1000
                torch.testing.assert_close(b["video"], x, rtol=1e-3, atol=1e-3)
                x, sound = x + dt * b["video_target"], sound + dt * b["audio_target"]
            last = ways.window(1, 0 if both else 1, 0, 4)
            torch.testing.assert_close(x[0], last[2], rtol=1e-3, atol=2e-3)
            torch.testing.assert_close(sound[0], last[3], rtol=1e-3, atol=2e-3)


def test_the_guided_velocity(recorded: tuple[DistillConfig, JavisPipeline, Trajectories]) -> None:
    """Against the definition, from two evaluations of their own; scales differ between the samples."""
    config, pipe, ways = recorded
    lessons = Lessons(pipe, ways, dataclasses.replace(config, method="guidance"))
    index = np.array([0, 1])
    batch = lessons.draw(index, np.random.default_rng(3))
    lessons.anew(batch, index, torch.Generator().manual_seed(1), any_time=True)
    batch["scales"] = torch.tensor([[2.0, 5.0], [1.0, 0.0]])
    captions = [ways.captions[i] for i in index]
    found = lessons.guided(batch, conditioning(pipe, config, captions, [0, 1], guided=True))
    told = lessons.told(index)
    masks = {k: batch[k] for k in ("video_mask", "audio_mask")}
    with torch.no_grad():
        seen = pipe.model.denoise(batch["video"], batch["audio"], batch["t"], pipe.model.condition(**told), **masks)
        null = told | {"text": pipe.model.null_text.expand(2, -1, -1)[:, : told["text"].shape[1]]}
        for name, tokens in zip(("spatial_prior", "temporal_prior"), pipe.model.null_prior, strict=True):
            null[name] = tokens.expand(2, -1, -1)
        unseen = pipe.model.denoise(batch["video"], batch["audio"], batch["t"], pipe.model.condition(**null), **masks)
    for i, (a, c, u) in enumerate(zip(found, seen, unseen, strict=True)):
        for b in range(2):
            scale = float(batch["scales"][b, i])
            torch.testing.assert_close(a[b], u[b] + scale * (c[b] - u[b]), rtol=1e-4, atol=1e-4)


def test_fresh_noise_leaves_a_given_sound_clean(recorded: tuple[DistillConfig, JavisPipeline, Trajectories]) -> None:
    """x_t - (1 - s) x is s times standard normal noise where something is generated, and nothing where it is given."""
    config, pipe, ways = recorded
    lessons = Lessons(pipe, ways, config)
    index = np.arange(4).repeat(4)
    batch = lessons.draw(index, np.random.default_rng(0))
    heard = batch["audio_mask"][:, 0]
    assert heard.any() and not heard.all()
    for any_time in (False, True):
        lessons.anew(batch, index, torch.Generator().manual_seed(2), any_time)
        share = (batch["t"] / 1000).double()
        for b, clip in enumerate(index):
            last = ways.window(int(clip), 1, 4, 4)
            for name, clean, given in (("video", last[0], False), ("audio", last[1], not heard[b])):
                if given:
                    assert torch.equal(batch[name][b], clean)
                else:
                    noise = (batch[name][b].double() - (1 - share[b]) * clean.double()) / share[b]
                    assert abs(float(noise.std()) - 1) < 0.15 and abs(float(noise.mean())) < 0.15


def test_two_half_steps_of_a_shortcut(recorded: tuple[DistillConfig, JavisPipeline, Trajectories]) -> None:
    """A student that knows dx/ds = x exactly: its average velocity over a step is x (exp(-ds) - 1) / ds, so that two
    half steps give what one whole step does. A wrong middle, share or start would not. A given sound stays."""
    config, pipe, ways = recorded
    lessons = Lessons(pipe, ways, dataclasses.replace(config, method="shortcut"))
    grid = torch.tensor(ways.grid, dtype=torch.float64)

    def average(x: torch.Tensor, t: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        ds = ((t - end) / 1000).view(-1, *[1] * (x.ndim - 1))
        return x * torch.expm1(-ds) / ds

    class Knows:
        @staticmethod
        def velocity(_: Any, batch: dict[str, Any], **changes: torch.Tensor) -> Velocity:
            b = batch | changes
            given = b["audio_mask"][:, :1, None, None].double()
            return Velocity(average(b["video"], b["t"], b["end"]), given * average(b["audio"], b["t"], b["end"]))

    g = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        "video": torch.randn(3, 2, 3, 2, 2, generator=g, dtype=torch.float64),
        "audio": torch.randn(3, 2, 4, 3, generator=g, dtype=torch.float64),
        "t": grid[[0, 2, 1]], "end": grid[[4, 4, 2]],
        "video_mask": torch.ones(3, 3, dtype=torch.bool),
        "audio_mask": torch.tensor([[True], [False], [True]]).expand(3, 4),
    }  # fmt: skip
    lessons.ways.grid = [float(t) for t in grid]
    single = Velocity(torch.full_like(batch["video"], 7.0), torch.full_like(batch["audio"], 7.0))
    found = lessons._two_halves(batch, Knows(), None, single)  # type: ignore[arg-type]
    whole = Knows.velocity(None, batch)
    for a, e in zip(found, whole, strict=True):
        torch.testing.assert_close(a[:2].double(), e[:2], rtol=1e-5, atol=1e-5)
        assert (a[2] == 7).all()  # the shortest window is the teacher's


def test_a_student_begins_as_its_teacher(recorded: tuple[DistillConfig, JavisPipeline, Trajectories]) -> None:
    """Its loss on a guided velocity with scale 1 is zero before any training."""
    config, pipe, ways = recorded
    config = dataclasses.replace(config, method="guidance")
    lessons, task = Lessons(pipe, ways, config), Task(student_of(pipe.model, config), config)
    index = np.array([0, 1])
    batch = lessons.make(index, [4], task, None)
    batch["scales"] = torch.ones(2, 2)
    told = conditioning(pipe, config, [ways.captions[i] for i in index], [0, 1], guided=True)
    batch["video_target"], batch["audio_target"] = lessons.guided(batch, told)
    with torch.no_grad():
        assert float(task(batch)[0]) < 1e-8
        batch["video_target"] = batch["video_target"] + 1
        assert float(task(batch)[1]) == pytest.approx(1, abs=1e-3)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reflow", "shortcut", "guidance"])
def test_a_student_learns(method: str, teacher: Path, tmp_path: Path, in_process: None) -> None:
    stage = StageConfig(steps=40, learning_rate=1e-3, warmup=4, decay=0.5)
    config = settings(teacher, tmp_path / "run", method=method, stage=stage, save_every=20, ema=0.9, clips=10, batch=4)
    folder = distill.run(config)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pipe = JavisPipeline.from_pretrained(teacher)
    lessons = Lessons(pipe, Trajectories.open(config.out / "trajectories"), config)
    start = student_of(pipe.model, config)
    before = lessons.validation(Task(start, config), start)[0]
    after = [row["validation"][0] for row in rows if "validation" in row]
    assert len(after) == 2 and after[-1] < 0.8 * before
    state, facts = load_file(folder / "student.safetensors"), json.loads((folder / "student.json").read_text())
    assert set(state) == set(start.state_dict()) and facts["model"]["step_input"] is (method != "guidance")
    assert facts["steps"] == 40
    both = JavisPipeline.from_pretrained(folder / "checkpoint")
    clip = both(read_captions(config)[0], seed=1)
    assert (clip.choice.variant, clip.steps) == ("student", 4)
    assert both(read_captions(config)[0], seed=1, steps=30).choice.variant == "teacher"


@pytest.mark.parametrize("method", ["reflow", "dmd"])
def test_the_attention_to_the_priors_is_the_teachers(
    method: str, teacher: Path, tmp_path: Path, in_process: None
) -> None:
    """Unless it is asked for; also where a student begins that had trained it."""
    stage = StageConfig(steps=2, warmup=1, learning_rate=1e-2)
    shared: dict[str, Any] = {"clips": 6, "batch": 4, "stage": stage}
    own = distill.run(settings(teacher, tmp_path / "own", train_prior_attention=True, **shared))
    paths = {"paths": ("1000,500/900",), "path_shares": (1.0,)} if method == "dmd" else {}
    kept = distill.run(settings(teacher, tmp_path / "kept", method=method, init=own, **paths, **shared))
    held = JavisPipeline.from_pretrained(teacher).model.state_dict()
    names = [name for name in held if "_prior." in name and ".attn." in name]
    before, after = (load_file(folder / "student.safetensors") for folder in (own, kept))
    assert names and any(not torch.equal(before[name], held[name].half()) for name in names)
    assert all(torch.equal(after[name], held[name].half()) for name in names)
    others = [name for name in held if "_prior." in name and ".mlp." in name]
    assert any(not torch.equal(after[name], before[name]) for name in others)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(teacher: Path, tmp_path: Path, in_process: None) -> None:
    stage = StageConfig(steps=4, warmup=1, decay=0.5)
    distill.run(settings(teacher, tmp_path / "whole", stage=stage))
    part = settings(teacher, tmp_path / "part", stage=stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "learning_rate", lambda step, stage: 1 / 0 if step == 2 else learning_rate(step, stage))
        with pytest.raises(ZeroDivisionError):
            distill.run(part)
    assert json.loads((tmp_path / "part" / "reflow" / "state.json").read_text())["step"] == 2
    distill.run(part)
    found = [load_file(tmp_path / name / "reflow" / "student.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_the_full_size_recipe_at_toy_size(
    in_process: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs whole, and says what it costs: by hand, forward passes times FLOPs of one."""
    caplog.set_level("INFO", logger="javis.train")
    for method, passes in (("reflow", 3), ("shortcut", 7)):
        config = DistillConfig(method=method, windows=(4, 2, 1), teacher_steps=32, clips=100, held_out=1, dry_run=True)  # type: ignore[arg-type]
        distill.main(config)
        found = estimate(config)
        forward = plan(PlanArgs(resolution="240p", steps=1, guidance=False))["tflop_per_step"]["total"] / 1e3
        assert found.recording_pflop == pytest.approx(forward * 100 * 32 * 2)
        assert found.training_pflop == pytest.approx(forward * 2400 * 16 * passes)
        assert found.hours == pytest.approx((found.recording_pflop + found.training_pflop) * 1e15 / 500e12 / 3600)
        assert f"{found.hours:.3g} GPU hours" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["reflow", "shortcut", "guidance"])
def test_distillation_on_a_gpu(method: str, teacher: Path, tmp_path: Path) -> None:
    folder = distill.run(settings(teacher, tmp_path / "run", method=method, device="cuda"))
    assert json.loads((folder / "student.json").read_text())["steps"] == 2
