"""The benchmark of a training step, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import train_stages
from javis import bench


def test_rows_of_every_stage_and_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    rows = train_stages.main(["--quick", "--repeats", "1", "--dtype", "float32", "--results", str(tmp_path)])
    assert [(row["stage"], row["variant"]) for row in rows] == [
        ("audio", "eager"), ("audio", "fused"), ("prior", "eager"), ("joint", "eager"), ("joint", "fused"),
    ]  # fmt: skip
    (written,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line) for line in written.read_text().splitlines()] == rows
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["memory_gb"] > 0
        assert row["trained"] < row["parameters"] or row["stage"] == "prior"
    audio, joint = rows[1], rows[4]
    assert audio["tokens"] < joint["tokens"]
    assert "times_eager_tokens_per_s" in joint and "memory_of_eager" in audio


def test_nothing_is_timed_unless_the_variants_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_stages.flow_module

    def wrong(args, config, stage, ops):  # type: ignore[no-untyped-def]
        module = real(args, config, stage, ops)
        if ops.ada_layer_norm is not train_stages.ModelOps().ada_layer_norm:
            with torch.no_grad():
                module.model.audio_final.linear.weight.mul_(1.5)
        return module

    monkeypatch.setattr(train_stages, "flow_module", wrong)
    with pytest.raises(AssertionError):
        train_stages.main(["--quick", "--repeats", "1", "--dtype", "float32", "--stages", "audio"])
