"""A checkpoint with teacher and student: what is stored, what is shared, which of them a call gets, one-line errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from javis import JavisPipeline
from javis.acceleration import accelerate
from javis.cli import main
from javis.demo_checkpoint import DEMO_FOLDER
from javis.errors import UsageError
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.train.export import PACKAGE_LIMIT, export_student

from .tiny import randomize, write_tiny_checkpoint

PROMPT = "a red ball bounces on the left"
CHANGED = ("layers.0.video_spatial.mlp.fc1.weight", "video_final.linear.weight", "audio_final.linear.weight")
SETTINGS: dict[str, Any] = {"steps": 3, "guidance": 1.0, "order": "together", "timestep_ratio": 2.0}
QUICK: dict[str, Any] = {"seconds": 0.5, "seed": 3}


def model_state(folder: Path) -> dict[str, Tensor]:
    state = load_file(folder / "model.safetensors").items()
    return {name.removeprefix("model."): value.float() for name, value in state if name.startswith("model.")}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def trained(teacher: Path) -> dict[str, Tensor]:
    """A student's whole state: the teacher's, but for three tensors."""
    generator = torch.Generator().manual_seed(5)
    state = model_state(teacher)
    assert set(CHANGED) <= set(state)
    return state | {name: 0.2 * torch.randn(state[name].shape, generator=generator) for name in CHANGED}


@pytest.fixture(scope="session")
def both(teacher: Path, trained: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_student(teacher, trained, SETTINGS, tmp_path_factory.mktemp("both") / "checkpoint")


@pytest.fixture(scope="session")
def pipe(both: Path) -> JavisPipeline:
    return JavisPipeline.from_pretrained(both)


@pytest.fixture
def damaged(both: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the checkpoint with other settings or tensors of the student."""

    def change(settings: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None) -> Path:
        folder = Path(shutil.copytree(both, tmp_path / "damaged"))
        config = json.loads((folder / "config.json").read_text())
        config["student"] |= settings or {}
        (folder / "config.json").write_text(json.dumps(config))
        state: dict[str, Any] = {**load_file(folder / "model.safetensors"), **(tensors or {})}
        save_file({n: v for n, v in state.items() if v is not None}, folder / "model.safetensors")
        return folder

    return change


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_only_what_differs_is_stored_in_float16(teacher: Path, both: Path, trained: dict[str, Tensor]) -> None:
    before, after = load_file(teacher / "model.safetensors"), load_file(both / "model.safetensors")
    assert {name for name in after if name.startswith("student.")} == {f"student.{name}" for name in CHANGED}
    assert all(after[f"student.{name}"].dtype == torch.float16 for name in CHANGED)
    assert all(torch.equal(after[f"student.{name}"], trained[name].half()) for name in CHANGED)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((both / "config.json").read_text())["student"] == SETTINGS


def test_a_change_below_the_precision_of_float16_is_none(teacher: Path, tmp_path: Path) -> None:
    state = {name: value * (1 + 1e-5) for name, value in model_state(teacher).items()}
    folder = export_student(teacher, state, SETTINGS, tmp_path / "same")
    assert not any(name.startswith("student.") for name in load_file(folder / "model.safetensors"))


def test_the_student_computes_with_its_weights_and_the_teacher_with_its_own(
    teacher: Path, both: Path, trained: dict[str, Tensor], pipe: JavisPipeline
) -> None:
    """Against models built here, in one evaluation."""
    alone = JavisPipeline.from_pretrained(teacher)
    expected = JavisPipeline.from_pretrained(teacher)
    expected.model.load_state_dict({name: value.half().float() for name, value in trained.items()})
    options: dict[str, Any] = {**QUICK, "steps": 2, "order": "together"}
    for variant, other in (("teacher", alone), ("student", expected)):
        told = {} if variant == "student" else {"guidance": 1.0}
        given = pipe(PROMPT, variant=variant, **told, **options)
        # The timesteps are those of the variant: the tiny teacher's ratio stands in its configuration.
        ratio = other.description["sampling"] | ({"timestep_ratio": 2.0} if variant == "student" else {})
        other.description = {**other.description, "sampling": ratio}
        same = other(PROMPT, guidance=1.0, **options)
        assert np.array_equal(given.video, same.video) and np.array_equal(given.audio, same.audio)
    by_student, by_teacher = pipe(PROMPT, **options), pipe(PROMPT, variant="teacher", guidance=1.0, **options)
    assert not np.array_equal(by_student.video, by_teacher.video)


def test_a_round_trip_keeps_both(both: Path, pipe: JavisPipeline, tmp_path: Path) -> None:
    before = pipe(PROMPT, **QUICK)  # builds the student's model
    saved = JavisPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "built"))
    unbuilt = JavisPipeline.from_pretrained(both).save_pretrained(tmp_path / "unbuilt")
    again = saved(PROMPT, **QUICK)
    assert np.array_equal(before.video, again.video) and again.choice.variant == "student"
    for folder in (tmp_path / "built", unbuilt):
        first, second = load_file(both / "model.safetensors"), load_file(folder / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first)
        assert json.loads((folder / "config.json").read_text()) == json.loads((both / "config.json").read_text())


def test_a_model_with_inputs_of_its_own(teacher: Path, tmp_path: Path) -> None:
    """A student that takes guidance and the end of the step as input has parameters that the teacher lacks."""
    fields = {"guidance_input": True, "step_input": True}
    config = json.loads((teacher / "config.json").read_text())["model"]
    student = randomize(JavisDiT(JavisDiTConfig.from_dict(config | fields)), 7)
    state = model_state(teacher)
    state |= {name: value for name, value in student.state_dict().items() if name not in state}
    settings = {**SETTINGS, "guidance": 3.0, "audio_guidance": 4.0, "model": fields}
    with pytest.raises(UsageError, match="is missing, and the teacher has none like it"):
        export_student(teacher, model_state(teacher), settings, tmp_path / "lacking")
    folder = export_student(teacher, state, settings, tmp_path / "both")
    pipe = JavisPipeline.from_pretrained(folder)
    seen: list[tuple[int, Any]] = []
    model = pipe.model_of("student")
    condition = model.condition

    def spy(text: Tensor, **options: Any) -> Any:
        seen.append((len(text), options["guidance"].tolist()))
        return condition(text, **options)

    model.condition = spy  # type: ignore[method-assign]
    clip = pipe(PROMPT, **QUICK)
    assert (clip.steps, clip.guidance, clip.audio_guidance, clip.choice.variant) == (3, 3.0, 4.0, "student")
    other = pipe(PROMPT, variant="student", guidance=7.0, **QUICK)
    assert (other.guidance, other.audio_guidance) == (7.0, 7.0)
    assert seen == [(1, [[3.0, 4.0]]), (1, [[7.0, 7.0]])], "scales are an input, the batch is not doubled"
    assert not np.array_equal(clip.video, other.video)
    for asked, why in (
        ({"solver": "unipc"}, "solver 'unipc' needs velocities at an instant"),
        ({"audio_steps": 2}, "audio_steps beside those of the picture"),
    ):
        assert why in (pipe(PROMPT, steps=3, **asked, **QUICK).choice.because or "")
        with pytest.raises(UsageError, match="needs? velocities at an instant"):
            pipe(PROMPT, variant="student", steps=3, **asked, **QUICK)
    assert pipe(PROMPT, solver="euler", **QUICK).choice.variant == "student"


# -- memory ------------------------------------------------------------------------------------------------------------


def test_what_both_have_in_common_is_held_once_and_built_when_used(both: Path) -> None:
    pipe = JavisPipeline.from_pretrained(both)
    assert pipe.student is not None
    pipe(PROMPT, variant="teacher", steps=1, **QUICK)
    assert pipe.student.built is None
    pipe(PROMPT, steps=1, **QUICK)
    mine, theirs = dict(pipe.model_of("student").named_parameters()), dict(pipe.model.named_parameters())
    assert {name for name in mine if mine[name].data_ptr() != theirs[name].data_ptr()} == set(CHANGED)
    assert pipe.model_of("student") is pipe.model_of("student") is not pipe.model
    assert all(parameter.requires_grad for parameter in theirs.values())


def test_a_dtype_and_a_residency_reach_both(both: Path, pipe: JavisPipeline) -> None:
    expected = pipe(PROMPT, **QUICK)
    other = JavisPipeline.from_pretrained(both)
    other(PROMPT, **QUICK)
    other.set_residency("offload", "cpu")
    for variant, clip in ((v, other(PROMPT, variant=v, steps=2, **QUICK)) for v in ("student", "teacher", "student")):
        assert clip.choice.variant == variant
        assert np.array_equal(clip.video, pipe(PROMPT, variant=variant, steps=2, **QUICK).video)
    assert other.model_of("student").time_block.weight is not other.model.time_block.weight, "they move one by one"
    other.set_residency("all", "cpu")
    assert np.array_equal(other(PROMPT, **QUICK).video, expected.video)
    other.to(dtype=torch.bfloat16)
    assert {p.dtype for p in other.model_of("student").parameters()} == {torch.bfloat16}
    assert other(PROMPT, **QUICK).video.std() > 1


def test_compiled_blocks_reach_both(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[Any] = []
    monkeypatch.setattr("javis.compiled.compile_blocks", changed.append)
    pipe = accelerate(JavisPipeline.from_pretrained(both), compile_blocks=True)
    assert changed == [pipe.model, pipe.model_of("student")]
    mine, theirs = ({p.data_ptr() for p in model.parameters()} for model in changed)
    assert not mine & theirs, "what changes the one in place must not change the other"


# -- which of them a call gets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "variant", "because"),
    [
        ({}, "student", None),
        ({"steps": 8}, "student", None),
        ({"steps": 9}, "teacher", "steps are more than 8"),
        ({"steps": 2, "guidance": 1.0}, "teacher", "guidance was given"),
        ({"steps": 2, "audio_guidance": 2.0}, "teacher", "audio_guidance 2.0 is not 1"),
        (
            {"steps": 2, "negative_prompt": "a blue box swings"},
            "teacher",
            "negative_prompt needs the unconditional half",
        ),
        (
            {"steps": 2, "audio_negative_prompt": "a blue box swings"},
            "teacher",
            "audio_negative_prompt needs the uncond",
        ),
        ({"steps": 2, "guidance_interval": (0.0, 500.0)}, "teacher", "guidance_interval needs the unconditional half"),
        ({"steps": 2, "uncond_every": 2}, "teacher", "uncond_every needs the unconditional half"),
        ({"steps": 2, "uncond_every": 1, "guidance_rescale": 0.0}, "student", None),
        ({"steps": 2, "solver": "heun"}, "student", None),
        ({"variant": "teacher", "steps": 2}, "teacher", None),
        ({"variant": "student", "steps": 9}, "student", None),
        ({"variant": "student", "steps": 1, "guidance": 1.0}, "student", None),
        ({"order": "sound_first", "steps": 2}, "student", None),
    ],
)
def test_which_model_a_call_gets(pipe: JavisPipeline, asked: dict[str, Any], variant: str, because: str | None) -> None:
    clip = pipe(PROMPT, seconds=0.25, seed=1, **asked)
    assert clip.choice.variant == variant
    assert clip.choice.because == because or (because is not None and because in (clip.choice.because or ""))
    assert clip.steps == asked.get("steps", 3)
    if variant == "student":
        assert (clip.guidance, clip.audio_guidance) == (1.0, 1.0)
        assert clip.forwards == clip.steps, "there is no unconditional half"
        assert clip.order == asked.get("order", "together")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"negative_prompt": "a blue box swings"}, "negative_prompt needs the unconditional half"),
        ({"guidance": 3.0}, "guidance 3.0 is not 1"),
        ({"schedule": "fitted"}, "schedule 'fitted' is of the teacher"),
        ({"variant": "pupil"}, "unknown variant 'pupil'; expected one of teacher, student"),
    ],
)
def test_a_student_that_cannot(pipe: JavisPipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, **{"variant": "student", **QUICK, **asked})


def test_processes_that_make_a_clip_together_have_the_teacher(both: Path) -> None:
    pipe = JavisPipeline.from_pretrained(both)
    assert pipe.student is not None
    pipe.student.why_not = "processes make a clip together"
    assert pipe(PROMPT, steps=1, **QUICK).choice == ("teacher", "processes make a clip together")
    with pytest.raises(UsageError, match="processes make a clip together"):
        pipe(PROMPT, variant="student", **QUICK)


def test_without_a_student_there_is_the_teacher(teacher: Path) -> None:
    pipe = JavisPipeline.from_pretrained(teacher)
    assert pipe(PROMPT, steps=1, **QUICK).choice == pipe(PROMPT, steps=1, variant="teacher", **QUICK).choice
    with pytest.raises(UsageError, match="this checkpoint has no student"):
        pipe(PROMPT, variant="student", **QUICK)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "student steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 2.5}, "student steps must be"),
        ({"guidance": 3.0}, "student guidance must be 1 unless its model has guidance_input"),
        ({"guidance": float("nan")}, "student guidance must be a positive number"),
        ({"order": "picture_first"}, "student order must be one of"),
        ({"model": {"hidden": 3}}, "unknown model configuration fields"),
        ({"model": [1]}, "student must be an object"),
        ({"model": {"video_channels": 7}}, "student model.video_channels differs"),
        ({"model": {"depth": 2}}, "is missing, and the teacher has none like it"),
    ],
)
def test_unusable_settings_of_a_student(damaged: Callable[..., Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        JavisPipeline.from_pretrained(damaged(settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"student.layers.9.fc": torch.zeros(2)}, "the student's model has no parameter layers.9.fc"),
        ({f"student.{CHANGED[1]}": torch.zeros(3, 3)}, r"video_final.linear.weight has shape \[3, 3\], expected"),
        ({f"student.{CHANGED[1]}": torch.full((1,), torch.nan)}, "has shape"),
    ],
)
def test_unusable_tensors_of_a_student(
    damaged: Callable[..., Path], tensors: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        JavisPipeline.from_pretrained(damaged(tensors=tensors))
    assert "\n" not in str(caught.value)


def test_tensors_of_a_student_that_config_json_does_not_name(damaged: Callable[..., Path]) -> None:
    folder = damaged()
    config = json.loads((folder / "config.json").read_text())
    del config["student"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"student\.\S+ is there, but config.json has no student"):
        JavisPipeline.from_pretrained(folder)


def test_what_cannot_be_exported(teacher: Path, trained: dict[str, Tensor], tmp_path: Path) -> None:
    for state, settings, limit, message in (
        ({**trained, CHANGED[0]: trained[CHANGED[0]] * 1e9}, SETTINGS, None, "not finite in float16"),
        ({**trained, "other": torch.zeros(1)}, SETTINGS, None, "no parameter other"),
        (trained, {"steps": 4}, None, "guidance"),
        (trained, SETTINGS, 10_000, r"MB more than 0.01 MB; train fewer of the student's parameters"),
    ):
        with pytest.raises(UsageError, match=message):
            export_student(teacher, state, settings, tmp_path / "out", limit=limit)
        assert not (tmp_path / "out").exists()


def test_the_command_line_makes_students_clips(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    report = {"video_events": [], "audio_events": [], "matched": [], "mean_abs_offset_ms": None}
    monkeypatch.setattr("javis.eval.sync.sync_report", lambda *_: report)
    monkeypatch.setattr("javis.contact_sheet.contact_sheet", lambda path, *_, **__: Path(path).write_bytes(b"png"))
    command = [
        "sample",
        PROMPT,
        "--checkpoint",
        str(both),
        "--seconds",
        "0.5",
        "--resolution",
        "32x32",
        "--out",
        "a.mp4",
    ]
    no_scales = "guidance 7.0 is not 1, and its model does not take guidance as input"
    for options, expected in (
        ((), ("student", None, 3, 3, 1.0)),
        (("--steps", "30", "--guidance", "7"), ("teacher", no_scales, 30, 60, 7.0)),
        (("--variant", "teacher", "--steps", "2", "--guidance", "1"), ("teacher", None, 2, 2, 1.0)),
        (("--variant", "student", "--steps", "9"), ("student", None, 9, 9, 1.0)),
    ):
        assert main([*command, *options]) == 0
        facts = json.loads(Path("a.json").read_text())
        keys = ("variant", "variant_because", "steps", "forwards", "guidance")
        assert tuple(facts.get(key) for key in keys) == expected
    capsys.readouterr()
    assert main([*command, "--variant", "student", "--negative-prompt", "a blue box swings"]) == 2
    assert "the student cannot make this: negative_prompt needs" in capsys.readouterr().err


# -- the packaged weights ----------------------------------------------------------------------------------------------


def test_the_packaged_weights_are_within_their_limit() -> None:
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= PACKAGE_LIMIT == 25_000_000
