"""``javis sample``: what it writes, what it refuses, and what is left after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import javis.clips
from javis.cli import main
from javis.errors import FailedError
from javis.media import read_clip
from javis.model.ops import ModelOps
from javis.pipeline import JavisPipeline
from javis.world import scene_from_prompt

from .conftest import RenderingPipeline, files

PROMPT = "a large red metal ball bounces on the left"
CSV = "id,text,seed\na,a red ball bounces on the left,3\nb,a blue box knocks on the right,4\nc,a green star flashes,5\n"
BATCH = {f"many/{name}{suffix}" for name in "abc" for suffix in (".mp4", ".png", ".json")}


def run(*arguments: str) -> int:
    return main(["sample", *arguments])


def run_many(*arguments: str) -> int:
    """The rows of many.csv into many/, small so that encoding is quick."""
    size = () if "--resolution" in arguments else ("--resolution", "32x32")
    return run("--prompts", "many.csv", "--out", "many", *size, *arguments)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr().err
    lines = captured.splitlines()
    assert len(lines) == 1, captured
    assert lines[0].startswith("javis: ")
    return lines[0]


@pytest.mark.parametrize("pipe", ["real report and contact sheet"], indirect=True)
def test_one_clip_with_contact_sheet_and_report(pipe: RenderingPipeline, tmp_path: Path) -> None:
    assert run(PROMPT, "--seed", "7", "--out", "out/demo.mp4", "--resolution", "128x128", "--steps", "4") == 0
    assert files(tmp_path) == {"out/demo.mp4", "out/demo.png", "out/demo.json"}
    assert Path("out/demo.png").read_bytes().startswith(b"\x89PNG")
    clip = read_clip("out/demo.mp4")
    assert clip.video.shape == (32, 128, 128, 3)
    assert clip.audio.shape == (32000,)
    facts = json.loads(Path("out/demo.json").read_text())
    assert (facts["prompt"], facts["seed"], facts["steps"], facts["seconds"]) == (PROMPT, 7, 4, 2.0)
    assert {"load", "text", "denoise", "decode", "mp4", "contact_sheet"} <= set(facts["seconds_per_stage"])
    # The pipeline rendered a scene whose event times are known: the report must have found them.
    truth = [event.time for event in scene_from_prompt(PROMPT, 7).sources[0].events]
    for found in (facts["sync"]["video_events"], facts["sync"]["audio_events"]):
        assert sorted(event["time_s"] for event in found) == pytest.approx(truth, abs=0.03)
    assert facts["sync"]["f1"]["62.5"] == 1.0


def test_the_ops_are_chosen_and_reported(
    pipe: RenderingPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[ModelOps] = []
    monkeypatch.setattr(JavisPipeline, "from_pretrained", lambda _, ops: given.append(ops) or pipe)
    for arguments, expected in (((), "fused"), (("--ops", "fused"), "fused"), (("--ops", "reference"), "reference")):
        assert run(PROMPT, "--out", "a.mp4", "--resolution", "32x32", *arguments) == 0
        assert json.loads(Path("a.json").read_text())["request"]["ops"] == expected
    assert given == [ModelOps.fused(), ModelOps.fused(), ModelOps()]
    capsys.readouterr()
    assert run(PROMPT, "--ops", "fast") == 2
    assert "invalid choice 'fast'" in complaint(capsys)


def test_the_default_name_comes_from_the_prompt(pipe: RenderingPipeline, tmp_path: Path) -> None:
    assert run("A Red ball!") == 0
    assert files(tmp_path) == {f"out/a-red-ball.{suffix}" for suffix in ("mp4", "png", "json")}
    assert read_clip("out/a-red-ball.mp4").video.shape[1:3] == (256, 256)


def test_many_clips_and_then_nothing_to_do(
    pipe: RenderingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("many.csv").write_text(CSV)
    assert run_many("--batch-size", "2") == 0
    assert files(tmp_path) == {"many.csv"} | BATCH
    assert [call["seed"] for call in pipe.calls] == [[3, 4], [5]]
    before = {path: path.stat().st_mtime_ns for path in Path("many").iterdir()}
    assert run_many() == 0
    assert len(pipe.calls) == 2, "finished clips are skipped"
    assert "3 already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("many").iterdir()} == before


@pytest.mark.parametrize("damage", ["json gone", "mp4 gone", "json cut", "json of another kind", "row changed"])
def test_only_what_is_not_finished_is_made_again(pipe: RenderingPipeline, damage: str) -> None:
    Path("many.csv").write_text(CSV)
    assert run_many() == 0
    report = Path("many/b.json")
    match damage:
        case "json gone":
            report.unlink()
        case "mp4 gone":
            Path("many/b.mp4").unlink()
        case "json cut":
            report.write_text(report.read_text()[:100])
        case "json of another kind":
            report.write_text("[1, 2]")
        case "row changed":
            Path("many.csv").write_text(CSV.replace("right,4", "right,40"))
    assert run_many() == 0
    assert [len(call["seed"]) for call in pipe.calls] == [3, 1]
    assert pipe.calls[1]["prompt"] == ["a blue box knocks on the right"]
    assert json.loads(report.read_text())["seed"] == (40 if damage == "row changed" else 4)


@pytest.mark.parametrize(
    "option", [["--guidance", "3"], ["--steps", "8"], ["--resolution", "64x64"], ["--seconds", "1"]]
)
def test_other_options_make_other_clips(pipe: RenderingPipeline, option: list[str]) -> None:
    Path("many.csv").write_text(CSV)
    assert run_many() == 0
    assert run_many(*option) == 0
    assert pipe.made == 6


def test_a_changed_checkpoint_makes_other_clips(pipe: RenderingPipeline) -> None:
    Path("many.csv").write_text(CSV)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("model/model.safetensors").write_bytes(bytes(3_000_000))
    assert run_many("--checkpoint", "model") == run_many("--checkpoint", "model") == 0
    assert pipe.made == 3
    Path("model/model.safetensors").write_bytes(bytes(2_999_999) + b"x")
    assert run_many("--checkpoint", "model") == 0
    assert pipe.made == 6


def test_an_interruption_keeps_finished_clips_and_goes_on(
    pipe: RenderingPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(made: int) -> None:
        if made == 1:
            raise KeyboardInterrupt

    pipe.before_clip = interrupt
    Path("many.csv").write_text(CSV)
    assert run_many("--batch-size", "1") == 130
    assert "2 of 3 clips are left" in complaint(capsys)
    assert files(tmp_path) == {"many.csv", "many/a.mp4", "many/a.png", "many/a.json"}
    pipe.before_clip = lambda made: None
    assert run_many("--batch-size", "1") == 0
    assert files(tmp_path) == {"many.csv"} | BATCH
    assert pipe.made == 3


@pytest.mark.parametrize("stage", ["write_clip", "contact_sheet", "json"])
@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1), (FailedError("no"), 1)]
)
def test_a_failure_while_writing_leaves_no_file(
    pipe: RenderingPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    error: BaseException,
    code: int,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    target = {"write_clip": "javis.clip_files.write_clip", "contact_sheet": "javis.contact_sheet.contact_sheet"}
    monkeypatch.setattr(target.get(stage, "javis.clip_files.json.dumps"), fail)
    assert run(PROMPT, "--out", "out/clip.mp4") == code
    complaint(capsys)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        ([" \n\t"], "the prompt is empty"),
        (["a red b\udce4ll"], "the prompt is not text in UTF-8"),
        (["ball " * 2000], "prompt of 10000 characters; expected at most 1000"),
        (["--"], "expected either a prompt"),
        ([], "expected either a prompt"),
        ([PROMPT, "--prompts", "x.csv"], "not both"),
        (["--a red ball"], "goes after '--'"),
        (["-a red ball"], "goes after '--'"),
        (["a red dragon"], "unknown word(s) 'dragon'"),
        ([PROMPT, "--seconds", "-1"], "seconds must be a number above 0, got -1"),
        ([PROMPT, "--seconds", "0"], "got 0"),
        ([PROMPT, "--seconds", "nan"], "got nan"),
        ([PROMPT, "--seconds", "inf"], "got inf"),
        ([PROMPT, "--seconds", "1e9"], "seconds must be between"),
        ([PROMPT, "--seconds", "soon"], "Error parsing --seconds"),
        ([PROMPT, "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        ([PROMPT, "--steps", "-4"], "got -4"),
        ([PROMPT, "--steps", "4.5"], "Error parsing --steps"),
        ([PROMPT, "--steps", "1000000"], "got 1000000"),
        ([PROMPT, "--guidance", "nan"], "guidance must be"),
        ([PROMPT, "--guidance", "-1"], "guidance must be"),
        ([PROMPT, "--seed", "-1"], "seed -1"),
        ([PROMPT, "--seed", str(2**63)], "seed"),
        ([PROMPT, "--resolution", "0x0"], "resolution"),
        ([PROMPT, "--resolution", "63x63"], "even"),
        ([PROMPT, "--resolution", "big"], "resolution 'big'"),
        ([PROMPT, "--resolution", "256x128"], "square"),
        ([PROMPT, "--batch-size", "0"], "batch size"),
        ([PROMPT, "--out", "folder.mp4"], "is a folder"),
        ([PROMPT, "--out", "clip.avi"], "ending in .mp4"),
        ([PROMPT, "--out", ""], "ending in .mp4"),
        ([PROMPT, "--out", "file/clip.mp4"], "cannot write"),
        ([PROMPT, "--out", "/proc/clip.mp4"], "cannot write"),
        ([PROMPT, "--out", "y" * 300 + ".mp4"], "cannot write"),
        ([PROMPT, "--colour", "red"], "Unrecognized"),
        (["a", "red", "ball"], "Unrecognized options: red, ball"),
        (["--prompts", "nothing.csv"], "cannot read nothing.csv"),
        (["--prompts", "folder.mp4"], "cannot read folder.mp4"),
        (["--prompts", "empty.csv"], "has neither"),
        (["--prompts", "random.csv"], "random.csv"),
        (["--prompts", "words.csv"], "line 2: unknown word(s) 'unicorn'"),
        (["--prompts", "words.csv", "--out", "file"], "must be a folder"),
        (["--prompts", "words.csv", "--out", "x.mp4"], "must be a folder"),
        (["--prompts", "long.csv"], "line 2: seconds must be between"),
        ([PROMPT, "--seq-parallel", "2"], "1 processes cannot be divided into groups of 1 x 2"),
        ([PROMPT, "--seq-parallel", "0"], "cannot be divided"),
        (["--prompts", "words.csv", "--cfg-parallel", "2"], "cannot be divided"),
        ([PROMPT, "--cfg-parallel", "3"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    pipe: RenderingPipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    Path("file").write_text("")
    Path("empty.csv").write_text("")
    Path("random.csv").write_bytes(np.random.default_rng(0).bytes(4000))
    Path("words.csv").write_text("prompt\na unicorn\na gnome\n")
    Path("long.csv").write_text("prompt,seconds\na red ball,1000000\n")
    before = files(tmp_path)
    assert run(*arguments) == 2
    assert message in complaint(capsys)
    assert files(tmp_path) == before
    assert pipe.calls == [], "refused before anything is generated"


@pytest.mark.parametrize("content", ["none", "no weights", "random bytes", "no json", "json of another kind"])
def test_unusable_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    folder = tmp_path / "model"
    if content != "none":
        folder.mkdir()
        (folder / "config.json").write_text("{" if content == "no json" else "[]")
        if content != "no weights":
            (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(1000))
    assert run(PROMPT, "--checkpoint", str(folder), "--out", str(tmp_path / "clip.mp4")) == 2
    assert "checkpoint" in complaint(capsys)
    assert not (tmp_path / "clip.mp4").exists()


def test_a_bug_is_one_line_and_a_traceback_on_request(
    pipe: RenderingPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> JavisPipeline:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(javis.clips, "_load", broken)
    assert run(PROMPT) == 1
    assert "ZeroDivisionError: first second" in complaint(capsys)
    monkeypatch.setenv("JAVIS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run(PROMPT)
