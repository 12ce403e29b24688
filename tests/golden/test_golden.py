"""Every golden case found is replayed by its family's replayer; an unknown case fails."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from .harness import NOT_YET, GoldenCase, case_names, golden_dir


def replay(case: GoldenCase) -> None:
    """Dispatch ``case`` to its family and require that every recorded target was compared."""
    family = case.family
    assert family is not None, f"unknown golden case {case.name!r} of {case.official!r}: add it to OFFICIAL_TO_FAMILY"
    if family in NOT_YET:
        pytest.skip(f"not yet: {NOT_YET[family]}")
    importlib.import_module(f".replay_{family}", __package__).replay(case)
    assert not case.unchecked(), f"{case.name}: recorded but not compared: {case.unchecked()}"


def test_replay(golden_case: str) -> None:
    torch.manual_seed(0)
    replay(GoldenCase.load(golden_dir(), golden_case))


def test_unknown_case_fails(tmp_path: Path) -> None:
    (tmp_path / "novel.json").write_text(json.dumps({"official": "javisdit.models.novel.Thing"}))
    assert case_names(tmp_path) == ["novel"]
    with pytest.raises(AssertionError, match="unknown golden case 'novel'"):
        replay(GoldenCase.load(tmp_path, "novel"))


def test_family_comes_from_the_official_class_before_the_name() -> None:
    assert GoldenCase("anything", {"official": "javisdit.models.stdit.vastdit3.VASTDiT3"}, {}).family == "dit"
    assert GoldenCase("dit_x", {"official": "javisdit.schedulers.rf.RFLOW.multimodal_sample"}, {}).family == "rflow"
    assert GoldenCase("vae_temporal_3", {"official": ""}, {}).family == "vae"


def test_unchecked_outputs_and_wrong_values_are_found() -> None:
    case = GoldenCase(
        "c", {"tables": {"sizes": [1]}}, {"in.x": torch.zeros(1), "out.a.y": torch.ones(2), "out.b": torch.ones(1)}
    )
    with pytest.raises(AssertionError, match="out.a.y"):
        case.check("out.a.y", torch.tensor([1.0, 1.1]))
    with pytest.raises(AssertionError, match="shape"):
        case.check("out.a.y", torch.ones(3))
    case.check("out.b", 1.0)
    assert case.unchecked() == ["out.a.y", "tables.sizes"]
    case.check("out.a.y", torch.ones(2))
    case.table("sizes")
    assert case.unchecked() == []
