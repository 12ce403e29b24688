"""The engine on a GPU: what only a GPU has. The rest of it is tested on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from javis.errors import UsageError
from javis.precision import why_not
from javis.train.engine import EngineConfig, Trainer
from javis.train.optimizers import make_adamw

from .engine_runs import Stop, stopping
from .engine_task import FlowSource, FlowTask, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "mlp_ratio": 2.0}


def config(out: Path, **changes: Any) -> EngineConfig:
    told: dict[str, Any] = {"steps": 10, "learning_rate": 3e-3, "log_every": 1, "save_every": 4, "ema": 0.9}
    return EngineConfig(out=out, **(told | changes))


def train(out: Path, callbacks: Any = (), **changes: Any) -> None:
    Trainer(FlowTask(layers=True, **SIZES), FlowSource(), config(out, **changes), callbacks).run()


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def test_float32_is_that_of_the_cpu(tmp_path: Path) -> None:
    train(tmp_path / "gpu", device="cuda", accumulation=2)
    train(tmp_path / "cpu", device="cpu", accumulation=2)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-te"])
@pytest.mark.parametrize("again", ["none", "selective", "full"])
def test_low_precision_trains(tmp_path: Path, precision: Any, again: Any) -> None:
    if precision != "bf16" and (reason := why_not(precision, "cuda")) is not None:
        pytest.skip(reason)
    train(tmp_path / "low", device="cuda", precision=precision, activation_checkpointing=again)
    train(tmp_path / "exact", device="cuda")
    low, exact = losses(tmp_path / "low"), losses(tmp_path / "exact")
    assert low == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "apex", "te"])
def test_an_interrupted_run_goes_on(tmp_path: Path, optimizer: Any) -> None:
    """Checkpoints of every make of AdamW, its step among them: the losses after it are those of the whole run."""
    weight = {"params": [torch.nn.Parameter(torch.ones(2, device="cuda"))], "weight_decay": 0.0}
    try:
        make_adamw([weight], config(tmp_path, optimizer=optimizer), torch.device("cuda"))
    except UsageError as error:
        pytest.skip(str(error))
    told = {"device": "cuda", "optimizer": optimizer, "precision": "bf16"}
    train(tmp_path / "whole", **told)
    with pytest.raises(Stop):
        train(tmp_path / "run", [stopping(6)], async_save=False, **told)
    train(tmp_path / "run", **told)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", str(torch.cuda.device_count()))):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="start fewer processes"):
        train(tmp_path, device="cuda")
