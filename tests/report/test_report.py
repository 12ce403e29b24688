"""``javis report`` on runs, clips and evaluations, good and broken."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import av
import pytest

from javis.cli import main

from . import runs


def report(source: Path, *arguments: str, code: int = 0) -> str:
    """The page of ``source``, after the command."""
    out = source.parent / "page.html"
    out.unlink(missing_ok=True)
    assert main(["report", str(source), "--out", str(out), *arguments]) == code
    return out.read_text(encoding="utf-8") if code == 0 else ""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "clips"
    runs.clips(folder)
    return folder


def videos(page: str) -> list[tuple[str, bytes]]:
    found = re.findall(r'<video [^>]*src="data:([a-z0-9/]+);base64,([^"]+)"', page)
    return [(kind, base64.b64decode(data)) for kind, data in found]


def test_clips_are_in_the_page_as_they_are(clips: Path) -> None:
    page = report(clips)
    assert videos(page) == [("video/mp4", (clips / f"clip_{i}.mp4").read_bytes()) for i in (1, 2)]
    assert page.count("<video ") == 2 and page.count('class="timeline"') == 2
    # Of the json: words, fingerprint and figures.
    for words in (runs.PROMPT, "0123456789abcdef", "F1 1"):
        assert words in page
    # Nothing of a caption is markup, and nothing is loaded from elsewhere.
    assert page.count("<script>") == 1 and "<img src=x" not in page
    assert "&lt;script&gt;document.title=&#x27;owned&#x27;" in page and "\x00" not in page
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*"?(?!data:|#)[a-z]+:', page.split("<script>")[0])


def test_limits_are_said_in_the_page_and_on_the_screen(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(clips / f"clip_{i}.mp4").stat().st_size for i in (1, 2)]
    page = report(clips, "--max-clip-mb", str((min(sizes) - 1) / 1e6))
    assert videos(page) == [] and "over the limit of" in page and "(--max-clip-mb)" in page
    assert "0 of 2 clips can be played here" in page and "do not fit" in capsys.readouterr().out
    # Both would fit, but the first one's poster is counted as well.
    page = report(clips, "--max-mb", str(sum(sizes) / 1e6))
    assert len(videos(page)) == 1 and "for all clips and pictures is reached (--max-mb)" in page
    assert runs.PROMPT in page  # the others are in the table


def test_what_no_browser_plays_is_encoded_anew(tmp_path: Path) -> None:
    """The world's clips are VP9 without sound, and a wav beside it."""
    assert main(["world", "make", str(tmp_path / "world"), "--count", "1", "--seconds", "1"]) == 0
    [(kind, data)] = videos(report(tmp_path / "world"))
    assert kind == "video/mp4"
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.audio[0].codec_context.name == "aac"
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 16


def test_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.training(tmp_path / "run")
    page = report(tmp_path / "run")
    assert "1001 rows, to step 1000, 16 min 40 s" in page
    # The loss at the first and the last step, in the words of the plot: 0.1 + exp(-step / 100).
    assert re.search(r"loss from 1\.0\d+ at .* to 0\.1\d* at", page)
    assert "<figcaption>lr</figcaption>" in page and "validation 2" in page
    assert "step_0001000" in page and "config.json" in page and "&lt;/pre&gt;&lt;script&gt;x" in page
    assert "codecs.json" in page and 'src="data:image/png' in page
    assert "1 lines are no json" in capsys.readouterr().out and "1 lines are no json" in page
    row = re.search(r'<th scope="row" class="words">loss</th>(.*?)</tr>', page)
    assert row is not None and row[1].endswith("<td>1</td>")  # one loss is not finite


def test_evaluations(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "world.json").write_text(json.dumps(runs.evaluation()))
    other = {"kind": "eval_experiment", "experiment": "priors", "x": {"value": 0.5}}
    (folder / "other.json").write_text(json.dumps(other))
    (folder / "strange.json").write_text(json.dumps({"kind": "eval_world", "generated": 3}))
    runs.picture(folder / "other.png")
    page = report(folder)
    assert "0.875 [0.75, 0.95]" in page and "Abacus 3000" in page and "abc1234" in page
    assert "Experiment: priors" in page and page.index("other.png") > page.index("Experiment: priors")
    assert "Not of the form that this version knows of eval_world" in page
    assert "&lt;b&gt;demo" in page and "<b>demo" not in page


def test_points_of_eval_steps(tmp_path: Path) -> None:
    point = {
        "measured": {"kind": "one_source", "sources": [[[0.5, 1.0], [0.5]]], "truth": None,
                     "checks": {"colour": [True]}, "objects_right": True, "onsets": 1},
        "features": {}, "seconds": 0.5, "forwards": 8.0,
    }  # fmt: skip
    for steps in (4, 8):
        setting = {"variant": "student", "steps": steps, "options": {}}
        about = {"setting": setting, "checkpoint_fingerprint": "feed", "prompts": {}, "batch_size": 1}
        lines = [{**about, "environment": runs.ENVIRONMENT}, {"clip": 0, **point}, {"clip": 1, **point}]
        (tmp_path / f"student-{steps}-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "broken.jsonl").write_text('{"setting": 1}\n')
    page = report(tmp_path)
    # One of two seen events is heard: F1 2/3, on both points, on one chart.
    assert page.count("0.6667 [0.6667, 0.6667]") >= 2 and "event F1. student from 0.6667 at 4 to 0.6667 at 8" in page
    assert "is no point of" in page and "feed" in page


def test_sync_reports_of_clips_that_have_none(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((clips / "clip_1.mp4").read_bytes())
    sync = json.loads((clips / "clip_1.json").read_text())["sync"]
    measured = {"summary": {"clips": 1}, "skipped": {"b<.mp4": "no sound"}, "clips": {"a.mp4": sync}}
    (tmp_path / "sync.json").write_text(json.dumps(measured))
    assert 'class="timeline"' not in report(folder)
    page = report(folder, "--eval", str(tmp_path / "sync.json"))
    assert 'class="timeline"' in page and "Synchrony of the clips" in page
    assert ">b&lt;.mp4</th>" in page and ">no sound</td>" in page


def test_broken_files_are_named_and_the_rest_is_shown(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "good.mp4").write_bytes((clips / "clip_1.mp4").read_bytes())
    (folder / "cut.mp4").write_bytes((clips / "clip_1.mp4").read_bytes()[:700])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "good.json").write_text(
        '{"sync": {"f1": 3, "matched": [1], "video_events": [{"time_s": "x"}]}, "text": 5}'
    )
    (folder / "eval.json").write_text("[" * 100_000)
    (folder / "fake.png").write_bytes(b"GIF")
    (folder / "log.jsonl").write_text("no json\n")
    page = report(folder)
    assert len(videos(page)) == 1
    section = page[page.index("Could not be read") :]
    for name in ("cut.mp4", "empty.mp4", "eval.json", "fake.png", "log.jsonl"):
        assert name in section


@pytest.mark.parametrize("name", ["none", "empty", "only.json"])
def test_nothing_to_report_is_said(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name == "only.json":
        (tmp_path / name).write_text("{")
    report(tmp_path / name, code=2)
    said = capsys.readouterr().err
    assert "expected" in said and said.count("\n") == 1


def test_unusable_arguments(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(clips, "--max-mb", "-1", code=2)
    report(clips, "--eval", "nowhere.json", code=2)
    assert main(["report", str(clips), "--out", str(clips / "page.pdf")]) == 2
    assert "ending in .html" in capsys.readouterr().err
    assert main(["report", str(clips)]) == 0  # its own place and name
    assert (clips / "report.html").is_file()
