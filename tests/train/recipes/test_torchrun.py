"""``javis train`` under torchrun, as it is used: two processes that share the tokens of every clip."""

from __future__ import annotations

from pathlib import Path

import pytest

from javis import JavisPipeline
from javis.cli import main

from ...parallel.processes import Process, wait_all
from ..engine_task import rows


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["audio", "joint"])
def test_two_that_share_clips_train_a_stage(stage: str, checkpoint: Path, tmp_path: Path) -> None:
    """The losses of one process, and one checkpoint that samples."""
    words = ["train", stage, "--init", str(checkpoint), "--batch", "2", "--steps", "3", "--log-every", "1"]
    words += ["--warmup", "1", "--device", "cpu", "--seconds", "0.5", "--train", "all", "--draws.masks.random", "0.4"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "javis", *words]
    command += ["--out", str(tmp_path / "two"), "--sequence-parallel", "2", "--activation-checkpointing", "full"]
    command += ["--sample-every", "3", "--sample-steps", "1", "--prompts", "a red ball bounces"]
    process = Process(command, tmp_path / "log.txt", {"TORCH_CPP_LOG_LEVEL": "ERROR"})
    assert wait_all([process], timeout=240) == [0], process.output[-3000:]
    names = ("loss", "audio", "norm")
    for x, y in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert [x[name] for name in names] == pytest.approx([y[name] for name in names], rel=2e-5)
    assert process.output.count(f"checkpoint: {tmp_path / 'two' / 'checkpoint'}") >= 1
    clip = JavisPipeline.from_pretrained(tmp_path / "two" / "checkpoint")("a red ball bounces", seconds=0.5, steps=1)
    assert clip.video.shape == (1, 8, 32, 32, 3)
