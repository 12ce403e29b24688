"""The report: its ceiling on real clips, its floor on shuffled sound, and closed forms on made-up measurements."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from javis.errors import UsageError
from javis.eval.stats import bootstrap_interval
from javis.eval.world_report import (
    Measured,
    evaluate,
    generated_clips,
    held_out_scenes,
    measure,
    real_clips,
    run,
    shuffled_agreement,
    summarise,
)
from javis.world import is_held_out, render_audio, render_video, scene_from_prompt
from tests.eval.clips import damaged_audio, damaged_video


@pytest.mark.parametrize("damage", [False, True], ids=["clean", "damaged"])
def test_ceiling_on_real_clips(damage: bool) -> None:
    codec = (lambda video, audio: (damaged_video(video), damaged_audio(audio))) if damage else None
    count = 6 if damage else 10
    report = evaluate(real_clips(held_out_scenes(count, 4242), codec))
    for kind, least in (("one_source", 0.98), ("two_sources", 0.95)):
        figures = report[kind]
        assert figures["clips"] == count
        assert figures["f1"]["62.5"] >= least
        assert abs(figures["mean_offset_ms"]) <= 3
        assert figures["mean_abs_offset_ms"] <= 8
        assert figures["shuffled_f1"] <= 0.30
        assert figures["video_truth"]["f1"] >= least and figures["audio_truth"]["f1"] >= least
        assert abs(figures["video_truth"]["bias_ms"]) <= 3 and abs(figures["audio_truth"]["bias_ms"]) <= 3
        assert figures["objects_right"] >= 0.95
    for name in ("colour", "shape", "side", "timbre", "pitch"):
        assert report["attributes"][name] >= 0.99, name
    assert report["silent"]["with_sound"] == 0
    assert json.loads(json.dumps(report)) == report


def made_up(seen: list[float], heard: list[float]) -> Measured:
    return Measured("one_source", [(seen, heard)], None, {"colour": [True], "shape": [False]})


def test_figures_in_closed_form() -> None:
    clips = [made_up([0.5, 1.0], [0.52, 1.03]), made_up([0.5, 1.0], [0.5]), made_up([], [])]
    figures = summarise(clips)["one_source"]
    # 3 of 4 seen and 3 of 3 heard are matched; the clip without any event counts as one missed on both sides.
    assert figures["f1"]["62.5"] == pytest.approx(6 / 9, abs=1e-4)
    assert figures["mean_offset_ms"] == pytest.approx(50 / 3, abs=0.01)
    assert (figures["events_seen"], figures["events_heard"], figures["sources_without_events"]) == (4, 3, 1)
    assert figures["attributes"] == {"colour": 1.0, "shape": 0.0}
    low, high = figures["f1_interval"]
    assert low <= figures["f1"]["62.5"] <= high


def test_shuffling_pairs_every_picture_with_another_clips_sound() -> None:
    clips = [made_up([0.1 + 0.3 * k], [0.1 + 0.3 * k]) for k in range(5)]
    derangements = shuffled_agreement(clips, shuffles=10)
    assert len(derangements) == 4  # all that are different
    assert all(counts.matched == 0 for derangement in derangements for counts in derangement)
    alike = shuffled_agreement([made_up([0.5], [0.5])] * 3)
    assert all(counts.f1 == 1.0 for derangement in alike for counts in derangement)
    assert shuffled_agreement([made_up([0.5], [0.5])]) == []


def test_a_false_sound_of_a_silent_clip_is_counted() -> None:
    quiet = scene_from_prompt("a red ball floats silently on the left", 0)
    (clip,) = real_clips([quiet])
    assert summarise([measure(clip)])["silent"] == {"clips": 1, "with_sound": 0.0, "sounds_per_clip": 0.0}
    loud = render_audio(scene_from_prompt("a red ball flashes on the left", 0))
    (noisy,) = real_clips([quiet], lambda video, audio: (video, loud))
    assert summarise([measure(noisy)])["silent"]["with_sound"] == 1.0


class FakePipe:
    """Renders the world's clips instead of generating any, late by ``late`` seconds."""

    size, fps, sample_rate = 64, 16, 16000
    description = {"sampling": {"steps": 16, "guidance": 2.0}}  # noqa: RUF012

    def __init__(self, late: float = 0.0) -> None:
        self.late, self.calls = late, []

    def __call__(self, prompts: list[str], *, seed: list[int], **options: object) -> SimpleNamespace:
        self.calls.append((list(prompts), list(seed), options))
        scenes = [scene_from_prompt(prompt, number) for prompt, number in zip(prompts, seed, strict=True)]
        audio = [np.roll(render_audio(scene), round(self.late * self.sample_rate)) for scene in scenes]
        video = np.stack([render_video(scene) for scene in scenes])
        return SimpleNamespace(video=video, audio=np.stack(audio), fps=self.fps, sample_rate=self.sample_rate)


def test_run_measures_what_the_pipeline_makes() -> None:
    pipe, seen = FakePipe(late=0.02), []
    report = run(
        pipe, count=3, seed=7, ceiling=False, ablate=["prior"], batch_size=4, progress=lambda *step: seen.append(step)
    )
    assert (report["steps"], report["guidance"], report["ablate"]) == (16, 2.0, ["prior"])
    figures = report["generated"]["one_source"]
    assert figures["f1"]["62.5"] == 1.0
    assert figures["mean_offset_ms"] == pytest.approx(20, abs=5)
    assert "video_truth" not in figures  # event times of the scenes say nothing about generated clips
    assert seen == [(4, 7), (7, 7)]
    assert [number for _, seeds, _ in pipe.calls for number in seeds] == list(range(7, 14))
    assert all(options["ablate"] == ("prior",) and options["steps"] is None for _, _, options in pipe.calls)
    assert json.loads(json.dumps(report)) == report


def test_the_report_has_the_settings_of_the_variant_that_made_the_clips() -> None:
    pipe = FakePipe()
    student = {"steps": 4, "guidance": 3.0, "model": {"guidance_input": True}}
    pipe.description = {"sampling": {"steps": 16, "guidance": 2.0, "audio_guidance": 5.0}, "student": student}
    for asked, expected in (
        ({}, ("student", 4, 3.0, 3.0)),
        ({"steps": 16}, ("teacher", 16, 2.0, 5.0)),
        ({"guidance": 1.5}, ("teacher", 16, 1.5, 1.5)),
    ):
        report = run(pipe, count=1, seed=7, ceiling=False, **asked)
        assert tuple(report[key] for key in ("variant", "steps", "guidance", "audio_guidance")) == expected


def test_scenes_are_held_out_and_of_the_asked_kinds() -> None:
    scenes = held_out_scenes(8, 11)
    assert [len(scene.sources) for scene in scenes[:16]] == [1] * 8 + [2] * 8
    assert all(is_held_out(scene) for scene in scenes)
    assert [any(source.audible for source in scene.sources) for scene in scenes] == [True] * 16 + [False]
    assert held_out_scenes(2, 11)[0] == scenes[0]


def test_generation_is_in_batches_with_one_seed_a_clip() -> None:
    pipe, scenes = FakePipe(), held_out_scenes(2, 3)
    clips = list(generated_clips(pipe, scenes, seed=100, batch_size=2))
    assert len(clips) == len(scenes) == 5
    assert [seeds for _, seeds, _ in pipe.calls] == [[100, 101], [102, 103], [104]]
    assert all(clip.truth is None for clip in clips)


def test_unusable_arguments() -> None:
    for count, seed in ((0, 1), (4, -1)):
        with pytest.raises(UsageError, match="count"):
            held_out_scenes(count, seed)
    with pytest.raises(UsageError, match="ablate"):
        run(FakePipe(), count=1, ablate=["sound"])


def test_bootstrap_interval_covers_as_it_should() -> None:
    rng = np.random.default_rng(0)
    mean = lambda items: float(np.mean(items))  # noqa: E731
    covered = 0
    for trial in range(100):
        low, high = bootstrap_interval(list(rng.normal(3.0, 1.0, 60)), mean, draws=200, seed=trial)  # type: ignore[misc]
        covered += low <= 3.0 <= high
    assert 88 <= covered <= 99
    assert bootstrap_interval([2.0] * 5, mean) == (2.0, 2.0)
    assert bootstrap_interval([], mean) is None
    assert bootstrap_interval([1], lambda items: None) is None
