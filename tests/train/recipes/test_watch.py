"""What a run shows: TensorBoard, progress, samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from javis import JavisPipeline
from javis.errors import UsageError
from javis.train.recipes.config import Draws
from javis.train.recipes.task import FlowModule
from javis.train.recipes.watch import Board, Progress, Samples

from .small import small_batch, small_model


def test_tensorboard_has_losses_histograms_and_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = FlowModule(small_model(), "joint")
    board = Board(tmp_path / "tb", module)
    for step in (2, 4, 6):
        with torch.no_grad():
            module(small_batch("joint", step, Draws(masks={}), count=8))
        board.on_log(step, {"loss": float(step), "video": 1.0, "audio": 2.0, "lr": 1e-4})
    board.close()
    board = Board(tmp_path / "tb", module)  # killed, and taken up again from step 4 on
    board.on_log(6, {"loss": 60.0, "video": 1.0, "audio": 2.0, "lr": 1e-4})
    board.close()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"histograms": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert {"train/video", "train/audio", "train/lr"} <= set(events.Tags()["scalars"])
    histogram = events.Histograms("timesteps/video")[0].histogram_value
    assert histogram.num == 8
    seen = small_batch("joint", 2, Draws(masks={}), count=8)["t"]
    assert histogram.min == pytest.approx(float(seen.min())) and histogram.max == pytest.approx(float(seen.max()))
    assert any(name.startswith("loss_by_timestep/audio_") for name in events.Tags()["scalars"])


def test_progress_says_clips_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("joint stage", 100, 8)
    values = {"loss": 0.5, "audio": 0.25}
    progress.on_log(10, values)
    assert "clips_per_second" not in values
    assert progress.clips_per_second(20, 1e12) is not None
    said = capsys.readouterr().err
    assert "joint stage 10/100  loss 0.5000  audio 0.2500" in said
    meter = Progress("x", 1, 8)
    assert meter.clips_per_second(10, 5.0) is None
    assert meter.clips_per_second(30, 9.0) == pytest.approx(20 * 8 / 4)
    progress.close()


def test_samples_with_their_score(pipe: JavisPipeline, tmp_path: Path) -> None:
    prompts = ["a red ball bounces", "a blue square flashes"]
    options = {"steps": 1, "seconds": 0.5}
    made = Samples(pipe, tmp_path / "samples", prompts, every=2, options=options)
    module = FlowModule(pipe.model, "joint")
    made.on_sample(4, module)
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "step_0000004_0.png",
        "step_0000004_1.png",
    ]
    assert imread(tmp_path / "samples" / "step_0000004_0.png").ndim == 3
    assert len(made.scores[4]) == 2 and all(0 <= score <= 1 for score in made.scores[4])
    never = Samples(pipe, tmp_path / "never", prompts, every=0, options=options)
    never.on_sample(4, module)
    other = Samples(pipe, tmp_path / "never", prompts, every=2, rank=1, options=options)
    other.on_sample(4, module)
    assert not (tmp_path / "never").exists()


def test_weights_and_biases_must_be_there_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        Board(None, FlowModule(small_model(), "joint"), project="x")
