"""The sync report on clips with planted truth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from javis.errors import UsageError
from javis.eval.sync import clause_events, sync_report
from javis.world import caption, parse_prompt, render_audio, render_video, sample_scene, scene_from_prompt
from tests.eval.clips import struck

RATE, FPS = 16000, 16
PROMPT = "a large red metal ball knocks on the left"


def scene_with(events: int):
    """A knocking scene that has that many events."""
    scenes = (scene_from_prompt(PROMPT, seed) for seed in range(100))
    return next(scene for scene in scenes if len(scene.events) == events)


def test_a_real_clip_agrees_with_itself_and_is_json() -> None:
    for seed in range(3):
        scene = sample_scene(seed, sources=1 + seed % 2)
        report = sync_report(render_video(scene), render_audio(scene), FPS, RATE, caption(scene))
        assert json.loads(json.dumps(report)) == report
        assert set(report["f1"].values()) == {1.0}
        assert len(report["matched"]) == len(scene.events)
        assert report["mean_abs_offset_ms"] < 8
        assert report["confidence"] >= 0.75
        for pair, (time, source, _) in zip(
            sorted(report["matched"], key=lambda p: p["video_s"]), scene.events, strict=True
        ):
            assert pair["source"] == source
            assert abs(pair["video_s"] - time) < 0.035 and abs(pair["audio_s"] - time) < 0.01


@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_a_planted_offset_is_reported_with_its_sign(prompt: str | None) -> None:
    scene = scene_with(3)
    video, audio = render_video(scene), render_audio(scene)
    still = sync_report(video, audio, FPS, RATE, prompt)["mean_offset_ms"]
    for shift_ms in (-40, 25, 50):
        shift = round(shift_ms * RATE / 1000)
        moved = np.roll(audio, shift)
        report = sync_report(video, moved, FPS, RATE, prompt)
        assert report["mean_offset_ms"] - still == pytest.approx(shift_ms, abs=2)
        assert report["f1"]["62.5"] == 1.0
        assert report["f1"]["33"] == (1.0 if abs(shift_ms) < 33 else 0.0)
    assert sync_report(video, np.roll(audio, round(0.15 * RATE)), FPS, RATE, prompt)["f1"]["100"] == 0.0


def test_a_dropped_and_an_extra_sound_change_f1_as_in_closed_form() -> None:
    scene = scene_with(3)
    video, audio = render_video(scene), render_audio(scene)
    times = [event.time for event in scene.sources[0].events]
    cut = audio.copy()
    start = round(times[1] * RATE)
    cut[start - 20 : round(min(times[1] + 0.36, times[2] - 0.005) * RATE)] = 0
    assert sync_report(video, cut, FPS, RATE, PROMPT)["f1"]["62.5"] == pytest.approx(4 / 5, abs=1e-4)
    free = [t for t in np.arange(0.2, 1.7, 0.05) if min(abs(t - u) for u in times) > 0.2]
    extra = np.clip(audio + struck([free[0]], hz=370), -1, 1)
    report = sync_report(video, extra, FPS, RATE, PROMPT)
    assert report["f1"]["62.5"] == pytest.approx(6 / 7, abs=1e-4)
    assert report["confidence"] < sync_report(video, audio, FPS, RATE, PROMPT)["confidence"]


def test_nothing_seen_and_nothing_heard_is_no_agreement() -> None:
    report = sync_report(np.full((32, 64, 64, 3), 30, np.uint8), np.zeros(32000, np.float32), FPS, RATE)
    assert report["video_events"] == report["audio_events"] == report["matched"] == []
    assert set(report["f1"].values()) == {None}
    assert report["mean_offset_ms"] is None and report["confidence"] == 0


def test_sounds_of_two_sources_do_not_stand_in_for_each_other() -> None:
    prompt = "a large red wooden ball bounces on the left and a small blue glass box knocks on the right"
    other = "a small red glass ball bounces on the left and a large blue wooden box knocks on the right"
    for seed in range(3):
        scene = scene_from_prompt(prompt, seed)
        right = clause_events(render_video(scene), render_audio(scene), FPS, RATE, parse_prompt(prompt))
        assert all(len(seen) == len(heard) for seen, heard in right)
        # Told the timbres the wrong way round, each source is heard when the other is seen.
        swapped = clause_events(render_video(scene), render_audio(scene), FPS, RATE, parse_prompt(other))
        for (_, heard), source in zip(swapped, scene.sources[::-1], strict=True):
            np.testing.assert_allclose(heard, [e.time for e in source.events], atol=0.01)


def test_a_prompt_that_does_not_parse_is_refused() -> None:
    with pytest.raises(UsageError, match="dragon"):
        sync_report(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(100), FPS, RATE, "a dragon sings")
