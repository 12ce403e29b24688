"""javis doctor: facts that can be checked against their source."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from javis import doctor
from javis.kernels import native
from javis.kernels.registry import OPS


def test_facts() -> None:
    facts = json.loads(json.dumps(doctor.collect()))
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["devices"]["cpu"]["cores"] == os.cpu_count()
    assert len(facts["devices"]["cuda"]) == torch.cuda.device_count()
    assert facts["packages"]["core"]["numpy"]["installed"] is True
    assert facts["native"]["loaded"] is hasattr(torch.ops.javis_native, "ada_layer_norm")
    assert (facts["native"]["why_not"] is None) is facts["native"]["loaded"]


def test_every_op_and_backend_has_a_verdict() -> None:
    rows = [row for row in doctor.collect()["ops"] if row["device"] == "cpu"]
    assert {row["op"] for row in rows} == set(OPS)
    for name, variant in dict.fromkeys((row["op"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["variant"]) == (name, variant)]
        assert [row["backend"] for row in mine] == [backend.value for backend in OPS[name].checks]
        assert all((row["reason"] is None) is row["runs"] for row in mine)
        (auto,) = [row for row in mine if row["auto"]]
        # auto is the first that can; a Triton kernel can on a CPU, in the interpreter, which is for proof alone
        assert auto is next(row for row in mine if row["runs"] and row["backend"] != "triton")


def test_missing_native_ops_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WHY_NOT", "the native ops were not built: no C++ compiler [looked for c++]")
    facts = doctor.collect()
    assert facts["native"]["loaded"] is False
    row = next(row for row in facts["ops"] if row["backend"] == "cpu")
    assert row["runs"] is False
    assert "no C++ compiler" in row["reason"]
    text = rendered(facts)
    assert "native ops   missing: the native ops were not built" in text
    assert "[looked for c++]" in text  # brackets are text, not markup


def rendered(facts: dict[str, object]) -> str:
    out = io.StringIO()
    doctor.render(facts, Console(file=out, width=200))
    return out.getvalue()


def test_the_other_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    entry = doctor.collect()["packages"]["optional"]["apex"]
    assert entry["installed"] is False
    assert "another project" in entry["note"]
    (tmp_path / "apex/optimizers.py").write_text("")
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert doctor.collect()["packages"]["optional"]["apex"]["installed"] is True


def test_rendering_names_what_was_found() -> None:
    text = rendered(doctor.collect())
    assert torch.__version__ in text
    assert "safetensors" in text
    for name in OPS:
        assert name in text


def test_dali_is_listed_under_the_name_of_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"nvidia-dali-cuda120": "2.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_find", lambda module: True)
    assert doctor._package("nvidia-dali", "nvidia.dali")["version"] == "2.1"
    versions["nvidia-dali-cuda130"] = "2.4"
    assert doctor._package("nvidia-dali", "nvidia.dali")["version"] == "2.4"
    assert doctor._package("triton", "triton")["version"] is None
