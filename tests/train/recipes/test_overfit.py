"""The self test of training: its judgement, and the whole of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from javis.cli import main
from javis.train.recipes.overfit import event_f1, psnr
from javis.world import WorldConfig, render_audio, render_video, sample_scene


def test_events_of_the_clip_itself_are_all_there() -> None:
    """One and two sources, some silent or unseen; another clip's sound, or none, is told apart."""
    config = WorldConfig()
    for seed in (1, 3, 5):
        scene = sample_scene(seed, config, split="train")
        video, audio = render_video(scene), render_audio(scene)
        assert event_f1(scene, video, audio, config.fps, config.sample_rate) == {"f1_seen": 1.0, "f1_heard": 1.0}
        late = np.roll(audio, 4000)
        assert event_f1(scene, video, late, config.fps, config.sample_rate)["f1_heard"] < 0.7
        still = np.repeat(video[:1], len(video), axis=0)
        assert event_f1(scene, still, audio, config.fps, config.sample_rate)["f1_seen"] < 0.7


def test_psnr() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 255) == pytest.approx(0)
    assert psnr(a, a + 16) == pytest.approx(20 * math.log10(255 / 16))


def test_too_few_steps_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "overfit", "--out", str(tmp_path / "x"), "--steps", "1", "--batch", "1", "--json"]
    assert main(words) == 1
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["passed"] is False and facts["psnr_db"] < facts["bars"]["psnr_db"] < facts["codec_psnr_db"]
    assert "the clip did not come back" in said.err
    assert main(["train", "overfit", "--device", "tpu"]) == 2


@pytest.mark.slow
def test_a_clip_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the defaults."""
    code = main(["train", "overfit", "--out", str(tmp_path / "x"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == 0, facts
    assert facts["f1_seen"] == facts["f1_heard"] == 1.0 and facts["psnr_db"] >= 26
