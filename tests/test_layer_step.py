"""benchmarks/layer_step.py at toy size: every variant is timed, compared and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not (Path(__file__).resolve().parents[1] / "benchmarks/layer_step.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks.layer_step import Args, Size, main
from javis.model.ops import ModelOps


def test_all_variants_in_both_dtypes() -> None:
    rows = main(Args(quick=True, repeats=2, append=False))
    assert [(r["dtype"], r["variant"], r["samples"]) for r in rows] == [
        (dtype, variant, samples)
        for dtype in ("float32", "bfloat16")
        for variant, samples in (("upstream", 1), ("eager", 2), ("fused", 2))
    ]
    for row in rows:
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert (row["condition_s"] is None) == (row["variant"] == "upstream")
        assert (row["times_eager"] == 1.0) or row["variant"] != "eager"
        assert {"device", "torch", "commit", "date"} <= row.keys()


def test_the_full_size_is_that_of_the_design() -> None:
    size = Size()
    assert (size.frames, size.places, size.audio_tokens) == (15, 1024, 224)
    config = size.config()
    assert (config.hidden_size, config.head_size, config.num_heads, config.depth) == (1152, 72, 16, 1)


def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> torch.Tensor:
        return 1.01 * ModelOps().gelu_linear(*args)

    monkeypatch.setattr(ModelOps, "fused", classmethod(lambda cls: cls(gelu_linear=wrong)))
    with pytest.raises(AssertionError, match="fused, torch.float32: .* from float32 eager"):
        main(Args(quick=True, dtypes=("float32",), append=False))
