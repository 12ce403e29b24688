"""The curve of quality against steps: prompts, points that go on where they stopped, figures, differences, bars."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from javis import cli
from javis.errors import UsageError
from javis.eval.stats import Ratio
from javis.eval.steps_points import (
    MeasuredClip,
    Point,
    PointFile,
    Setting,
    check_options,
    counted_forwards,
    make_point,
    points_in,
)
from javis.eval.steps_prompts import Prompt, prompts
from javis.eval.steps_report import bars, compare, f1_of, row_of
from javis.eval.world_report import Measured, generated_clips, held_out_scenes, measure, summarise
from javis.world import caption, is_held_out, render_audio, render_video, scene_from_prompt

KEY = {"count": 2, "seed": 5}


class Unchanged:
    """A codec that does nothing."""

    def encode(self, x: Any) -> Any:
        return x

    def decode(self, x: Any, length: int) -> Any:
        return x


class FakePipe:
    """Renders the world's clips instead of generating any; with few steps the sound comes late."""

    size, fps, sample_rate = 64, 16, 16000
    video_codec = audio_codec = Unchanged()
    description = {"sampling": {"steps": 16, "guidance": 2.0}, "student": {"steps": 4}}  # noqa: RUF012

    def __init__(self, fail_after: int | None = None) -> None:
        self.calls: list[tuple[list[int], dict[str, Any]]] = []
        self.fail_after = fail_after

    def __call__(
        self,
        prompts: list[str],
        *,
        seed: list[int],
        steps: int,
        batch_size: int,
        variant: str | None = None,
        guidance: float | None = None,
    ) -> SimpleNamespace:
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((list(seed), {"steps": steps, "variant": variant, "guidance": guidance}))
        scenes = [scene_from_prompt(prompt, number) for prompt, number in zip(prompts, seed, strict=True)]
        late = 0 if variant == "student" else round(0.1 / steps * self.sample_rate)
        return SimpleNamespace(
            video=np.stack([render_video(scene) for scene in scenes]),
            audio=np.stack([np.roll(render_audio(scene), late) for scene in scenes]),
            fps=self.fps,
            sample_rate=self.sample_rate,
            seconds_per_stage={"denoise": 0.5 * len(scenes), "video_decode": 0.25 * len(scenes)},
            guidance=2.0 if guidance is None else guidance,
            steps=steps,
        )


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_of_all_kinds_and_held_out() -> None:
    chosen = prompts(8, 11)
    kinds = Counter()
    for scene, _ in chosen:
        seen = [source for source in scene.sources if source.visible]
        heard = [source for source in scene.sources if source.audible]
        assert is_held_out(scene)
        kinds[(len(seen), len(heard))] += 1
    # One source; two; a silent one; an unseen bell beside a sounding and beside a silent object.
    assert kinds == {(1, 1): 8 + 1, (2, 2): 8, (1, 0): 1, (1, 2): 1}
    assert len({prompt.seed for prompt in chosen}) == len(chosen)
    assert len({caption(scene) for scene, _ in chosen}) > 15


def test_prompts_are_those_of_eval_world_and_begin_with_every_kind() -> None:
    scenes = held_out_scenes(8, 11)
    chosen = {prompt.seed: prompt.scene for prompt in prompts(8, 11)}
    assert all(chosen[11 + i] == scene for i, scene in enumerate(scenes))
    first = prompts(8, 11)[:4]
    assert {len(scene.sources) for scene, _ in first} == {1, 2}
    assert any(not source.visible for scene, _ in first for source in scene.sources)
    assert any(not any(source.audible for source in scene.sources) for scene, _ in first)
    with pytest.raises(UsageError, match="split"):
        prompts(1, 1, split="test")


# -- points -----------------------------------------------------------------------------------------------------------


def point_of(pipe: FakePipe, file: PointFile, chosen: list[Prompt], alone: int = 0) -> Point:
    return make_point(pipe, file, chosen, batch_size=2, alone=alone, environment={"commit": "x", "dirty": False})


def test_a_point_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    chosen = prompts(2, 5)
    assert len(chosen) == 6
    file = PointFile(tmp_path, Setting("teacher", 8), "abc", KEY)
    with pytest.raises(KeyboardInterrupt):
        point_of(FakePipe(fail_after=2), file, chosen)
    with file.path.open("a") as torn:  # a line that was cut off in the middle
        torn.write('{"clip": 4, "measured": {"ki')
    assert sorted(file.read().clips) == [0, 1, 2, 3]
    pipe = FakePipe()
    point = point_of(pipe, file, chosen)
    assert [seeds for seeds, _ in pipe.calls] == [[chosen[4].seed, chosen[5].seed]]
    (tmp_path / "whole").mkdir()
    whole = point_of(FakePipe(), PointFile(tmp_path / "whole", Setting("teacher", 8), "abc", KEY), chosen)
    assert row_of(point, {}) == row_of(whole, {})
    again = FakePipe()
    assert row_of(point_of(again, file, chosen), {}) == row_of(point, {})
    assert again.calls == []


def test_a_point_is_known_by_settings_weights_and_prompts(tmp_path: Path) -> None:
    given = [
        PointFile(tmp_path, Setting("teacher", 8), "abc", KEY),
        PointFile(tmp_path, Setting("teacher", 4), "abc", KEY),
        PointFile(tmp_path, Setting("student", 8), "abc", KEY),
        PointFile(tmp_path, Setting("teacher", 8, {"guidance": 2.0}), "abc", KEY),
        PointFile(tmp_path, Setting("teacher", 8), "abd", KEY),
        PointFile(tmp_path, Setting("teacher", 8), "abc", {**KEY, "seed": 6}),
    ]
    assert len({file.path for file in given}) == len(given)
    for file in given:
        point_of(FakePipe(), file, prompts(1, 5)[:1])
    found = points_in(tmp_path, lambda _: "abc", KEY)
    assert sorted(point.setting.label for point in found) == [
        "student, 8 steps",
        "teacher, 4 steps",
        "teacher, 8 steps",
        "teacher, 8 steps, guidance 2.0",
    ]


def test_figures_are_those_of_eval_world(tmp_path: Path) -> None:
    chosen = [prompt for prompt in prompts(4, 5) if len(prompt.scene.sources) == 1]
    pipe = FakePipe()
    point = point_of(pipe, PointFile(tmp_path, Setting("teacher", 2, {"guidance": 3.0}), "abc", KEY), chosen, alone=1)
    row = row_of(point, {"checkpoint": "demo"})
    scenes = [prompt.scene for prompt in chosen]
    late = [np.roll(render_audio(scene_from_prompt(caption(p.scene), p.seed)), 800) for p in chosen]
    clips = list(generated_clips(lambda *a, **k: FakePipe()(a[0], seed=[p.seed for p in chosen], steps=2, batch_size=9),
                                 scenes, seed=0, batch_size=9))  # fmt: skip
    assert all(np.array_equal(clip.audio, wave) for clip, wave in zip(clips, late, strict=True))
    expected = summarise([measure(clip) for clip in clips])
    one = expected["one_source"]
    assert row["f1_by_kind"]["one_source"]["value"] == one["f1"]["62.5"]
    assert row["mean_abs_offset_ms"]["value"] == pytest.approx(one["mean_abs_offset_ms"], abs=0.01)
    assert 40 < row["mean_abs_offset_ms"]["value"] < 60
    assert row["accuracy_of"]["timbre"]["value"] == expected["attributes"]["timbre"]
    assert row["frechet"] == {"picture": None, "sound": None, "both": None}  # too few clips
    assert row["seconds_per_clip"] == 0.75 and row["seconds_alone"] > 0
    assert row["used"] == {"steps": 2, "guidance": 3.0}
    assert all(options["variant"] == "teacher" and options["guidance"] == 3.0 for _, options in pipe.calls)
    assert [len(seeds) for seeds, _ in pipe.calls[-2:]] == [1, 1]  # one that does not count, and one
    assert json.loads(json.dumps(row)) == row


def test_forwards_are_counted_in_the_model() -> None:
    from javis import JavisPipeline

    pipe = JavisPipeline.from_pretrained("demo")
    for guidance, expected in ((2.0, 2 * 2 * 2), (1.0, 2 * 2)):
        with counted_forwards() as count:
            batch = pipe(["a red ball flashes on the left"] * 2, seed=1, steps=2, guidance=guidance, seconds=0.5)
        assert count[0] == pytest.approx(expected)
        assert batch.forwards == expected / 2  # what the sampler itself has counted, per clip
    with counted_forwards() as count:
        pass
    assert count == [0.0]
    check_options(pipe, {"solver": "ab2", "guidance_interval": [300, 900], "order": "together"})
    with pytest.raises(UsageError, match=r"no option 'speed' here; expected some of .*solver"):
        check_options(pipe, {"speed": 2})


# -- figures, differences and bars ------------------------------------------------------------------------------------


def made_up(
    seen: list[float], heard: list[float], right: bool = True, joint: float = 0.0, seed: int = 0
) -> MeasuredClip:
    rng = np.random.default_rng(seed)
    features = {name: rng.normal(joint, 1, size) for name, size in (("picture", 24), ("sound", 24), ("both", 32))}
    return MeasuredClip(Measured("one_source", [(seen, heard)], None, {"colour": [right]}), features, 0.5, 60.0)


def made_point(
    variant: str, steps: int, clips: list[MeasuredClip], alone: float | None = None, **options: Any
) -> Point:
    return Point(Setting(variant, steps, options), dict(enumerate(clips)), {}, 8, alone, {})


def test_ratio_and_paired_difference() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, 60)  # of the prompts, for both
    a = Ratio((rng.uniform(size=60) < hard).astype(float) + 4 * hard, np.full(60, 5.0))
    b = Ratio(a.numerator - 0.1, np.full(60, 5.0))
    assert a.value == pytest.approx(a.numerator.sum() / 300)
    value, low, high = a.difference(b)  # type: ignore[misc]
    assert (value, low, high) == pytest.approx((0.02, 0.02, 0.02))  # the same on every clip, so there is no doubt
    alone = a.interval()
    assert alone is not None and alone[1] - alone[0] > 0.05
    assert Ratio(np.zeros(3), np.zeros(3)).value is None
    assert Ratio(np.zeros(3), np.zeros(3)).difference(Ratio(np.ones(3), np.ones(3))) is None
    with pytest.raises(ValueError, match="same"):
        a.difference(Ratio(np.ones(3), np.ones(3)))


def test_the_interval_covers_as_it_should() -> None:
    rng, covered = np.random.default_rng(2), 0
    for trial in range(200):
        counts = rng.integers(1, 6, 80).astype(float)
        low, high = Ratio(rng.binomial(counts.astype(int), 0.8), counts).interval(draws=300, seed=trial)  # type: ignore[misc]
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 199


def test_differences_in_closed_form() -> None:
    teacher = made_point("teacher", 30, [made_up([0.5, 1.0], [0.51, 1.01], seed=i) for i in range(40)])
    student = made_point("student", 4, [made_up([0.5, 1.0], [0.53], i % 4 > 0, seed=i) for i in range(40)])
    f1, offset, accuracy, joint = compare(student, teacher, (-0.02, 5.0, -0.02, 1.15))
    # 2 of 3 events of every clip against 4 of 4; 30 ms against 10 ms; 3 of 4 captions against all; the same features.
    assert f1.value == pytest.approx(2 / 3 - 1) and (f1.low, f1.high) == pytest.approx((f1.value, f1.value))
    assert offset.value == pytest.approx(20.0)
    assert accuracy.value == pytest.approx(-0.25) and accuracy.low < -0.25 < accuracy.high
    assert joint.value == pytest.approx(1.0)
    assert [bar.held for bar in (f1, offset, accuracy, joint)] == [False, False, False, True]
    assert f1.line().startswith("MISSED event F1, student, 4 steps - teacher, 30 steps: -0.333")


def test_joint_distance_of_worse_clips() -> None:
    teacher = made_point("teacher", 30, [made_up([0.5], [0.5], joint=0.5, seed=i) for i in range(80)])
    student = made_point("student", 4, [made_up([0.5], [0.5], joint=1.5, seed=i) for i in range(80)])
    joint = compare(student, teacher, (0, 0, 0, 1.15))[3]
    assert joint.value > 2 and joint.low > 1.15 and joint.held is False
    few = made_point("student", 4, [made_up([0.5], [0.5], seed=i) for i in range(10)])
    assert compare(few, teacher, (0, 0, 0, 1.15))[3].held is None


def test_bars_take_the_student_and_the_cheapest_teacher_that_holds() -> None:
    def clips(forwards: float, late: bool = False) -> list[MeasuredClip]:
        chosen = [made_up([0.5], [0.9 if late and i % 2 else 0.5], seed=i) for i in range(10)]
        return [MeasuredClip(clip.measured, clip.features, 0.5, forwards) for clip in chosen]

    points = [
        made_point("teacher", 30, clips(60)),
        made_point("teacher", 16, clips(32)),
        made_point("teacher", 15, clips(30)),
        made_point("teacher", 8, clips(16), solver="heun"),
        made_point("teacher", 4, clips(8, late=True)),
        made_point("student", 4, clips(4), alone=0.7),
        made_point("student", 8, clips(8, late=True)),
    ]
    found = bars(points)
    names = [bar.name for bar in found]
    assert len(found) == 4 + 4 + 1 + 1
    assert names[-1] == "event F1 with 3.75 times fewer forwards, teacher, 8 steps, solver heun" and found[-1].held
    assert found[-2].value == 0.7 and found[-2].held
    assert found[0].held and found[4].held is False  # the student with 8 steps is the worse one here
    assert bars(points[1:]) == [found[-2]]  # without the teacher's 30 steps nothing can be compared
    assert "not sure" not in found[0].line()
    assert f1_of(list(points[0].clips.values())).value == 1.0


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipe:
    pipe = FakePipe()
    monkeypatch.setattr("javis.pipeline.JavisPipeline.from_pretrained", lambda *args, **kwargs: pipe)
    return pipe


def test_the_command_writes_rows_and_a_picture(tmp_path: Path, fake: FakePipe, capsys: pytest.CaptureFixture) -> None:
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "steps.png"
    command = ["eval", "steps", "--steps", "1", "8", "--count", "1", "--limit", "2", "--alone", "0"]
    command += ["--out", str(tmp_path / "points")]
    assert cli.main(command) == 0
    assert len(fake.calls) == 4
    assert cli.main([*command, "--append", str(rows), "--plot", str(picture)]) == 0
    assert len(fake.calls) == 4  # finished points are not made again
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    points = [row for row in written if row["kind"] == "eval_steps"]
    assert [(row["variant"], row["steps"]) for row in points] == [
        ("teacher", 1), ("teacher", 8), ("student", 1), ("student", 8), ("real", None), ("codec", None),
    ]  # fmt: skip
    assert points[0]["f1"]["value"] < 0.5 < points[1]["f1"]["value"]  # 100 ms and 12 ms late
    assert points[4]["f1"] == points[5]["f1"] and points[4]["f1"]["value"] > 0.9
    assert {"device", "commit", "date", "torch"} <= set(points[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "teacher, 8 steps" in said and "caption 1.000" in said
    again = tmp_path / "again.png"
    assert cli.main(["eval", "steps", "--from-rows", str(rows), "--plot", str(again)]) == 0
    assert again.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--steps", "1000000"], "--steps 1000000"),
        (["--count", "0"], "--count 0"),
        (["--limit", "0"], "--limit 0"),
        (["--option", "speed"], "NAME=VALUE"),
        (["--option", "speed=2"], "no option 'speed'"),
        (["--option", "seed=2"], "no option 'seed'"),
        (["--solver", "heun"], "no option 'solver'"),  # of a pipeline that has one solver
        (["--from-rows", "none.jsonl"], "--plot"),
        (["--from-rows", "none.jsonl", "--plot", "PLOT"], "cannot read"),
    ],
)
def test_unusable_arguments(
    arguments: list[str], message: str, tmp_path: Path, fake: FakePipe, capsys: pytest.CaptureFixture
) -> None:
    given = [str(tmp_path / "x.png") if word == "PLOT" else word for word in arguments]
    assert cli.main(["eval", "steps", "--out", str(tmp_path / "points"), *given]) == 2
    assert message in capsys.readouterr().err
    assert fake.calls == []


def test_a_checkpoint_without_a_student(tmp_path: Path, fake: FakePipe, capsys: pytest.CaptureFixture) -> None:
    fake.description = {"sampling": {"steps": 16, "guidance": 2.0}}  # type: ignore[misc]
    assert cli.main(["eval", "steps", "--variant", "student", "--out", str(tmp_path)]) == 2
    assert "has no student" in capsys.readouterr().err
    command = ["eval", "steps", "--steps", "8", "--count", "1", "--limit", "1", "--no-ceiling", "--alone", "0"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    assert [options["variant"] for _, options in fake.calls] == ["teacher"]


def test_the_page_shows_the_newest_rows(tmp_path: Path, fake: FakePipe) -> None:
    from benchmarks.steps_tables import steps_section
    from benchmarks.tables import table, where

    rows = tmp_path / "rows.jsonl"
    command = ["eval", "steps", "--steps", "8", "--count", "1", "--limit", "1", "--no-ceiling", "--alone", "0"]
    for _ in range(2):
        assert cli.main([*command, "--out", str(tmp_path / "points"), "--append", str(rows)]) == 0
    text = steps_section([json.loads(line) for line in rows.read_text().splitlines()], table, where)
    assert text.count("| teacher | 8 |") == 1 and text.count("| student | 8 |") == 1
    assert "## Quality against steps" in text
    assert steps_section([], table, where) == ""


def test_the_picture_shows_the_newest_rows_of_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from javis.eval.steps_plot import draw, newest_rows

    clips = [made_up([0.5, 1.0], [0.51, 1.01], seed=i) for i in range(40)]
    facts = {"checkpoint": "demo", "checkpoint_fingerprint": "new", "count": 1, "seed": 2, "split": "any"}
    late = [made_up([0.5, 1.0], [0.9, 1.01], seed=i) for i in range(40)]
    rows = [
        row_of(made_point("teacher", 8, late), {**facts, "checkpoint_fingerprint": "old"}),
        row_of(made_point("teacher", 8, late), facts),
        row_of(made_point("teacher", 2, late), facts),
        row_of(made_point("teacher", 8, clips), facts),
        row_of(made_point("student", 4, clips[:3], alone=0.7), facts),
        row_of(Point(Setting("real", None), dict(enumerate(clips)), {}, 8, None, {}), facts),
    ]
    figure = draw(newest_rows(rows))
    panels = {axis.get_title(): axis for axis in figure.axes}
    lines = {line.get_label(): line for line in panels["event F1 at 62.5 ms"].lines}
    assert list(lines["teacher"].get_xdata()) == [2, 8]
    assert list(lines["teacher"].get_ydata()) == [0.5, 1.0]
    assert list(lines["student"].get_xdata()) == [4]
    assert list(lines["teacher, shuffled sound"].get_ydata()) == [rows[2]["shuffled_f1"], rows[3]["shuffled_f1"]]
    assert set(lines["real clips"].get_ydata()) == {1.0}
    assert panels["event F1 at 62.5 ms"].get_xscale() == "log"
    assert [line.get_label() for line in panels["seconds a clip, made alone"].lines] == ["student"]
    joint = [
        line for line in panels["Frechet distance, both"].lines if line.get_label() == "teacher"
    ]  # not the student:
    assert list(joint[0].get_ydata()) == [rows[2]["frechet"]["both"]["corrected"]] * 2  # 3 clips have no distance
