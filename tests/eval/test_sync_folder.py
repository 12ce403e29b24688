"""``javis eval sync`` on folders of good and bad clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from javis.cli import main
from javis.errors import FailedError
from javis.eval.folder import sync_folder
from javis.eval.sync_truth import against_truth, rotations, shuffled_f1, true_events
from javis.media import write_clip
from javis.world import render_audio, render_video, scene_from_prompt
from javis.world.make import encode_vp9

FPS, RATE = 16.0, 16000
PROMPTS = ("a large red metal ball bounces on the left", "a small blue wooden box knocks", "a green star flashes")


def write(folder: Path, name: str, video: np.ndarray, audio: np.ndarray | None, facts: Any = None) -> None:
    """A clip as `javis world make` writes it: the sound in a wav."""
    (folder / f"{name}.mp4").write_bytes(encode_vp9(video, FPS))
    if audio is not None:
        soundfile.write(folder / f"{name}.wav", audio, RATE)
    if facts is not None:
        (folder / f"{name}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    made = [scene_from_prompt(prompt, seed) for seed, prompt in enumerate(PROMPTS, 4)]
    return [(render_video(scene), render_audio(scene), scene.truth()) for scene in made]


def test_figures_of_real_clips_against_their_truth(scenes, tmp_path: Path) -> None:
    for name, (video, audio, truth) in zip("abc", scenes, strict=True):
        write(tmp_path, name, video, np.roll(audio, 800), truth)  # 50 ms late
    found = sync_folder(tmp_path)
    events = sum(len(source["events"]) for _, _, truth in scenes for source in truth["sources"])
    figures = found["summary"]
    assert figures["truth"]["video"]["events"] == figures["truth"]["audio"]["events"] == events
    assert figures["truth"]["video"]["f1"]["50"] == 1.0 and abs(figures["truth"]["video"]["mean_offset_ms"]) < 8
    assert figures["truth"]["audio"]["mean_offset_ms"] == pytest.approx(50, abs=5)
    assert figures["truth"]["audio"]["f1"] == {"33": 0.0, "50": pytest.approx(0.5, abs=0.5), "100": 1.0}
    assert figures["offset"]["mean_ms"] == pytest.approx(50, abs=8) and figures["offset"]["clips"] == 3
    assert figures["f1"]["100"][0] == 1.0 == figures["any_f1"]["100"] and figures["f1"]["33"][0] == 0.0
    assert figures["shuffled"]["any_f1"]["100"] < 0.7
    assert figures["count_error"] == {"mean": 0.0, "mean_abs": 0.0}
    assert figures["clips"] == 3 and figures["skipped"] == 0 and figures["remarks"] == {}
    assert figures["fingerprint"]["n"] == 3 and figures["fingerprint"]["fps"] == [16]
    assert json.loads(json.dumps(found)) == found


def test_bad_clips_are_named_and_counted_and_the_rest_is_evaluated(scenes, tmp_path: Path, capsys) -> None:
    video, audio, truth = scenes[0]
    write(tmp_path, "good", video, audio, truth)
    write(tmp_path, "mute", video, None)
    write(tmp_path, "silent", video, np.zeros_like(audio))
    write(tmp_path, "grey", np.full_like(video, 90), audio)
    write(tmp_path, "single", video[:1], audio[:1000])
    write(tmp_path, "long", video, np.concatenate([audio, audio]))
    write(tmp_path, "short", video[:20], audio[:20000])
    write(tmp_path, "empty_sound", video, audio[:0])
    write(tmp_path, "nan", video, audio)
    broken = audio.copy()
    broken[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, RATE, subtype="FLOAT")
    (tmp_path / "cut.mp4").write_bytes(encode_vp9(video, FPS)[:300])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "hollow.mp4").write_bytes(b"")
    write(tmp_path, "odd_json", video, audio)
    (tmp_path / "odd_json.json").write_text("{")
    assert main(["eval", "sync", str(tmp_path), "--json", str(tmp_path / "out" / "r.json")]) == 0
    report = json.loads((tmp_path / "out" / "r.json").read_text())
    assert set(report["skipped"]) == {f"{n}.mp4" for n in ("mute", "empty_sound", "nan", "cut", "text", "hollow")}
    assert "no sound" in report["skipped"]["mute.mp4"] and "NaN" in report["skipped"]["nan.mp4"]
    said = capsys.readouterr()
    assert all(f"skipped {name}" in said.err for name in report["skipped"])
    assert report["summary"]["skipped"] == 6 and report["summary"]["clips"] == 7
    remarks = {name.removesuffix(".mp4"): clip["remarks"] for name, clip in report["clips"].items()}
    assert remarks == {
        "good": [],
        "silent": ["silent"],
        "grey": ["still", "constant colour"],
        "single": ["one frame", "silent"],
        "long": ["lengths differ"],
        "short": [],
        "odd_json": ["unreadable json"],
    }
    assert report["summary"]["remarks"]["still"] == 1
    assert report["clips"]["good.mp4"]["sync_score"] > 0.4
    assert report["clips"]["silent.mp4"]["offset"]["method"] == "none"
    assert report["summary"]["truth"]["clips"] == 1


def test_a_folder_without_a_clip_that_can_be_measured_fails(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("nothing")
    with pytest.raises(FailedError, match=r"none of the 1 clips.*a\.mp4"):
        sync_folder(tmp_path)


def test_mp4_with_its_own_sound_and_no_prompt(scenes, tmp_path: Path) -> None:
    video, audio, _ = scenes[0]
    write_clip(tmp_path / "a.mp4", video, audio, FPS, RATE)
    report = sync_folder(tmp_path)
    clip = report["clips"]["a.mp4"]
    assert clip["prompt"] is None and clip["f1"]["62.5"] == 1.0 and clip["remarks"] == []
    assert abs(clip["offset"]["offset_ms"]) < 10
    assert "truth" not in report["summary"] and report["summary"]["shuffled"]["any_f1"]["50"] is None


def test_truth_in_closed_form() -> None:
    facts = {
        "format": 1,
        "sources": [
            {"visible": True, "audible": True, "events": [{"time_s": 0.5}, {"time_s": 1.0}]},
            {"visible": False, "audible": True, "events": [{"time_s": 0.2}]},
        ],
    }
    truth = true_events(facts)
    assert truth == ([0.5, 1.0], [0.2, 0.5, 1.0])
    report = {"video_events": [{"time_s": 0.54}], "audio_events": [{"time_s": t} for t in (0.2, 0.47, 1.05, 1.5)]}
    found = against_truth(truth, report)
    assert found["video"] == {
        "true": 2, "found": 1, "count_error": -1, "matched": {"33": 0, "50": 1, "100": 1}, "offsets_ms": [40.0],
    }  # fmt: skip
    assert found["audio"]["matched"] == {"33": 2, "50": 3, "100": 3} and found["audio"]["count_error"] == 1
    for other in (None, [], {"format": 1}, {"format": 1, "sources": [{"events": 3}]}, {"prompt": "a ball"}):
        assert true_events(other) is None


def test_the_shuffled_control_never_pairs_a_clip_with_itself() -> None:
    pairs = [([0.1 * k], [0.1 * k]) for k in range(5)]
    assert shuffled_f1(pairs, 0.05) == 0.0 and shuffled_f1(pairs[:1], 0.05) is None
    assert shuffled_f1([([0.5], [0.5])] * 3, 0.05) == 1.0
    for count in (2, 3, 9, 40):
        turns = rotations(count)
        assert len(set(turns)) == len(turns) == min(8, count - 1) and all(0 < k < count for k in turns)
