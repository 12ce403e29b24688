"""A prepared tiny run, and stages that run in this process."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from javis.train import demo, latents
from javis.train.config import DemoTrainConfig

from ..tiny import tiny_config


class PoolHere:
    """A process pool without processes: starting one takes longer than the tests."""

    def __init__(self, processes: int) -> None:
        assert processes >= 1

    def __enter__(self) -> PoolHere:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap_unordered(self, function: Any, jobs: Any) -> Iterator[Any]:
        return map(function, jobs)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pools and spawned workers (one) run here."""

    def spawn(function: Any, args: tuple[Any, ...], nprocs: int, **_: Any) -> None:
        assert nprocs == 1
        try:
            function(0, *args)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    monkeypatch.setattr(multiprocessing, "get_context", lambda _method: SimpleNamespace(Pool=PoolHere))
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    for name, value in (("MALLOC_MMAP_THRESHOLD_", "1"), ("MALLOC_TRIM_THRESHOLD_", "1"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)  # restores what a stage leaves in the environment
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codecs and latents of a tiny run."""
    out = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda _method: SimpleNamespace(Pool=PoolHere))
        patch.setattr(latents, "CHUNK", 4)
        demo.prepare(tiny_config(out))
    return out


@pytest.fixture
def config(prepared: Path, tmp_path: Path, in_process: None) -> DemoTrainConfig:
    """A tiny run of one's own that has its latents already. Many captions are dropped, so that few steps show it."""
    out = Path(shutil.copytree(prepared, tmp_path / "run"))
    return tiny_config(out, condition_dropout=0.5)
