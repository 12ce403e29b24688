"""benchmarks/decode.py at toy size, and that its eager baseline computes what the library computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not (Path(__file__).resolve().parents[2] / "benchmarks/decode.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks import decode as benchmark
from benchmarks.baselines.image_decoder import AutoencoderDecoder
from benchmarks.gpu.sections import Context, model
from javis.decode import video

from .codec import GROUPS, LAYERS, WIDTHS, make_autoencoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_baseline_is_the_library(dtype: torch.dtype) -> None:
    library = make_autoencoder(dtype)
    ours = AutoencoderDecoder(WIDTHS, LAYERS, GROUPS).to(dtype).eval()
    weights = {k: v for k, v in library.state_dict().items() if k.startswith(("decoder.", "post_quant_conv."))}
    ours.load_state_dict(weights, strict=True)
    z = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(ours.decode(z).sample, library.decode(z).sample)


def test_rows_of_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.bench, "RESULTS", benchmark.bench.RESULTS)
    rows = benchmark.main(["--quick", "--repeats", "2", "--dtypes", "float32", "--results", str(tmp_path)])
    assert [row["variant"] for row in rows] == list(benchmark.VARIANTS)
    for row in rows:
        assert row["samples"] == 2 and 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert row["max_difference_from_eager"] < 1e-3
        assert (row["predicted_bytes"] is None) == (row["variant"] in ("eager", "channels_last"))
        assert row["times_eager"] == 1.0 or row["variant"] != "eager"
    assert rows[3]["tflop"] < rows[2]["tflop"]
    (written,) = tmp_path.glob("*.jsonl")
    assert len(written.read_text().splitlines()) == len(rows)


def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = video.decode_whole
    monkeypatch.setattr(video, "decode_whole", lambda *a: 1.05 * original(*a))
    with pytest.raises(AssertionError, match="torch.float32: max error"):
        benchmark.main(["--quick", "--dtypes", "float32"])


def test_the_gpu_run_covers_it(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"packages": {}, "programs": {}, "gpu": "NVIDIA H100"}
    for dry in (False, True):
        steps = model(Context(python="python", dry=dry, facts=facts, out=tmp_path))
        commands = [step.command for step in steps if step.name.startswith("decode")]
        assert len(commands) == (1 if dry else 3)
        for command in commands:
            args = benchmark.parser().parse_args(command[3:])
            assert args.quick == dry and args.device == ("cpu" if dry else "cuda")
