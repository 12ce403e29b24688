"""The recorded runs of the official model, replayed on the kernels: C++ twins, and Triton in its interpreter."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

from javis.kernels import native
from javis.kernels.backend import Backend
from javis.kernels.triton_support import HAS_TRITON, interpreting
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps
from tests.kernels.preferring import expected, prefer

from . import replay_dit
from .harness import GoldenCase, case_names, golden_dir

CASES = [name for name in case_names(golden_dir()) if name.startswith(("dit", "rflow")) and "tables" not in name]
FORWARD_PASSES = [name for name in CASES if name.startswith("dit")]
# In the interpreter a pass takes many seconds: only those of the default form of the priors, which has a kernel.
INTERPRETED = [name for name in FORWARD_PASSES if not name.endswith(("_addition", "_modulate"))]
absent = [pytest.param("", marks=pytest.mark.skip(reason=f"no golden cases in {golden_dir()}"), id="absent")]


def replay(name: str, ops: ModelOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_dit, "JavisDiT", partial(JavisDiT, ops=ops))
    case = GoldenCase.load(golden_dir(), name)
    importlib.import_module(f".replay_{case.family}", __package__).replay(case)
    assert not case.unchecked()


@pytest.mark.parametrize("name", CASES or absent)
def test_on_the_kernels_that_auto_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    replay(name, ModelOps.fused(), monkeypatch)


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
@pytest.mark.parametrize("name", FORWARD_PASSES or absent)
def test_on_every_cpu_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, ran = prefer(Backend.CPU)
    replay(name, ops, monkeypatch)
    # Not every recorded model attends to priors, or has both streams look at each other.
    absent_blocks = {"folded_prior_injection", "bidirectional_attention"}
    assert expected(Backend.CPU) - set(ran) <= absent_blocks, f"ran {dict(ran)}"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or not interpreting(), reason="needs triton's interpreter")
@pytest.mark.parametrize("name", INTERPRETED or absent)
def test_on_every_triton_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, ran = prefer(Backend.TRITON)
    replay(name, ops, monkeypatch)
    # Sampling folds the priors or does not, whichever is less work; and not every recorded model has all blocks.
    absent_blocks = {"prior_injection", "folded_prior_injection", "bidirectional_attention"}
    assert expected(Backend.TRITON) - set(ran) <= absent_blocks, f"ran {dict(ran)}"
