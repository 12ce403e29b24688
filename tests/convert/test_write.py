"""Destinations: complete folders or none, shards, and everything that must not happen to what is there."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import javis.convert.write as write_module
from javis.convert import convert
from javis.convert.kinds import KINDS, detect
from javis.convert.read import Checkpoint
from javis.errors import FailedError, UsageError
from javis.model.checkpoint import to_official

from .official import AUDIO, STDIT3, dit_state, imagebind_state, prior_state, write_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "prior", prior_state())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- shards and memory ------------------------------------------------------------------------------------------------


def test_shards_with_an_index(tmp_path: Path) -> None:
    state = dit_state(depth=2)
    convert(write_folder(tmp_path / "jav", state), tmp_path / "out", max_shard_bytes=200_000)
    folder = tmp_path / "out" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    assert [p.name for p in shards] == [
        f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert count == -(-index["metadata"]["total_size"] // 200_000) or count > 4
    ours: dict[str, torch.Tensor] = {}
    for shard in shards:
        assert sum(t.nbytes for t in load_file(shard).values()) <= 200_000
        with safe_open(shard, framework="pt") as file:
            assert {name for name, where in index["weight_map"].items() if where == shard.name} == set(file.keys())
        ours |= load_file(shard)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    assert all(torch.equal(value, state[name]) for name, value in to_official(ours).items())
    assert (shards[0].stat().st_mode & 0o777) == (0o666 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_never_more_than_one_shard_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    state = dit_state(depth=2)
    if suffix == "pth":
        torch.save(state, tmp_path / "jav.pth")
    else:
        write_folder(tmp_path / "jav", state)
    path = tmp_path / ("jav.pth" if suffix == "pth" else "jav")
    alive, peak = {"bytes": 0}, {"bytes": 0}
    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any) -> torch.Tensor:  # what a conversion copies into memory
        made = original(self, *args)
        alive["bytes"] += made.nbytes
        peak["bytes"] = max(peak["bytes"], alive["bytes"])
        weakref.finalize(made, lambda size=made.nbytes: alive.update(bytes=alive["bytes"] - size))
        return made

    monkeypatch.setattr(torch.Tensor, "to", to)
    convert(path, tmp_path / "out", dtype="bfloat16", max_shard_bytes=50_000)
    gc.collect()
    largest = max(t.nbytes for t in state.values()) // 2
    assert 0 < peak["bytes"] <= 50_000 + 2 * largest
    assert sum(t.nbytes for t in state.values()) // 2 > 4 * peak["bytes"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    state = {name: value.to(torch.float16) for name, value in prior_state().items()}
    report = convert(write_folder(tmp_path / "prior", state), tmp_path / "out", dtype=dtype)
    ours = load_file(tmp_path / "out" / "prior" / "diffusion_pytorch_model.safetensors")
    assert {row["dtype"] for row in report.used} == {dtype}
    for name, value in ours.items():
        assert value.dtype == getattr(torch, dtype) and torch.equal(value, state[name].to(value.dtype))


def test_the_dtypes_of_the_source_are_kept(tmp_path: Path) -> None:
    state = prior_state()
    for i, name in enumerate(state):
        state[name] = state[name].to((torch.float32, torch.float16, torch.bfloat16)[i % 3])
    convert(write_folder(tmp_path / "prior", state), tmp_path / "out")
    ours = load_file(tmp_path / "out" / "prior" / "diffusion_pytorch_model.safetensors")
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in state.items()}


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    state = prior_state()
    state["in_proj.bias"] = state["in_proj.bias"] + 1e5
    source = write_folder(tmp_path / "prior", state)
    with pytest.raises(FailedError, match="in_proj.bias: has values too large for float16; take bfloat16"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", dtype="bfloat16")


# -- what is there ----------------------------------------------------------------------------------------------------


def test_components_join_in_one_folder(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    convert(write_folder(tmp_path / "jav", dit_state(depth=1)), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["components"] == {"prior": "PriorEstimator", "transformer": "JavisDiT"}
    assert index["_class_name"] == "JavisPipeline" and index["random_weights"] is False
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_what_a_killed_run_left_is_said(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out" / ".prior-0123.partial").mkdir(parents=True)
    report = convert(source, tmp_path / "out")
    assert any(".prior-0123.partial" in note and "remove it" in note for note in report.notes)


def test_what_is_there_is_kept_unless_told(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    before = files(tmp_path / "out")
    other = write_folder(tmp_path / "other", {name: value + 1 for name, value in prior_state().items()})
    with pytest.raises(UsageError, match="prior is there already; --overwrite replaces it"):
        convert(other, tmp_path / "out")
    assert files(tmp_path / "out") == before
    convert(other, tmp_path / "out", overwrite=True)
    weights = "prior/diffusion_pytorch_model.safetensors"
    assert files(tmp_path / "out")[weights] != before[weights]
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_source_and_destination_may_not_touch(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="source and destination are both"):
        convert(source, source)
    with pytest.raises(UsageError, match="source and destination are both"):
        convert(source, source.parent / "x" / ".." / source.name)
    before = files(source)
    with pytest.raises(UsageError, match="is being read, and would be replaced"):
        convert(source, tmp_path, overwrite=True)  # the folder's name is that of the component
    assert files(source) == before


def test_a_destination_that_cannot_be(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        convert(source, tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write to"):
        convert(source, tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="cannot write to"):
        convert(source, "/proc/javis/checkpoint")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").write_text("[]")
    with pytest.raises(UsageError, match="model_index.json is not usable"):
        convert(source, tmp_path / "out")


def test_no_permission(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    if os.getuid() == 0:  # root may write anywhere: then the system's refusal is played

        def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
            if out in self.parents:
                raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UsageError, match="cannot write to .*out.*Permission denied.*give another folder"):
        convert(source, out)
    assert not any(out.iterdir())


# -- failures on the way ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_found_before(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FailedError, match="GB are free; make room"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
def test_a_disk_that_fills_up(tmp_path: Path, there: bool) -> None:
    """A limit on the size of files makes the writes of a real process fail halfway."""
    source = write_folder(tmp_path / "jav", dit_state(depth=2))
    if there:
        convert(write_folder(tmp_path / "before", dit_state(depth=1)), tmp_path / "out")
    before = files(tmp_path / "out") if there else {}
    code = (
        "import resource, signal, sys\n"
        "from javis.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["convert", str(source), str(tmp_path / "out"), "--overwrite"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "nothing half-written was left" in done.stderr and done.stderr.count("\n") == 1
    if there:
        assert files(tmp_path / "out") == before
        assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    else:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    convert(source, tmp_path / "out")
    before = files(tmp_path / "out")

    def stop(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(write_module, "_sync", stop)
    with pytest.raises(error):
        convert(source, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


# -- kinds ------------------------------------------------------------------------------------------------------------


def test_kinds_are_told_by_their_names(tmp_path: Path) -> None:
    states = {
        "jav": dit_state(depth=1),
        "audio": dit_state(AUDIO, depth=1),
        "stdit3": dit_state(STDIT3, depth=1),
        "prior": prior_state(),
        "imagebind": imagebind_state(),
    }
    for kind, state in states.items():
        assert detect(Checkpoint(write_folder(tmp_path / kind, state)), kind) == kind
        marked = {other for other, known in KINDS.items() if known.marks(set(state))} - {"jav-240p4s"}
        assert marked == {kind}


def test_unknown_and_ambiguous_sources(tmp_path: Path) -> None:
    unknown = write_folder(
        tmp_path / "unknown", {"blocks.0.attn.qkv.weight": torch.zeros(2), "pos_embed": torch.zeros(1)}
    )
    with pytest.raises(
        UsageError, match=r"of no known kind: it holds blocks \(1\), pos_embed \(1\)\. Known are jav: .*prior"
    ):
        convert(unknown, tmp_path / "out")
    both = write_folder(tmp_path / "both", prior_state() | imagebind_state(text_only=True))
    with pytest.raises(UsageError, match="looks like prior and imagebind at once; choose one with --kind"):
        convert(both, tmp_path / "out")
    with pytest.raises(FailedError, match="unexpected modality_"):
        convert(both, tmp_path / "out", kind="prior")
    with pytest.raises(UsageError, match="is not stdit3, which is OpenSora-STDiT-v3.*it looks like prior or imagebind"):
        convert(both, tmp_path / "out", kind="stdit3")


def test_what_is_converted_already(tmp_path: Path) -> None:
    convert(write_folder(tmp_path / "jav", dit_state(depth=1)), tmp_path / "out")
    with pytest.raises(UsageError, match="has the names of javis already"):
        convert(tmp_path / "out" / "transformer", tmp_path / "again")


def test_merging_needs_something_to_merge_into(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "v", dit_state(STDIT3, depth=1))
    with pytest.raises(UsageError, match="transformer to merge into; convert the other branch first"):
        convert(source, tmp_path / "out", merge=True)
    convert(write_folder(tmp_path / "prior", prior_state()), tmp_path / "out")
    shutil.move(tmp_path / "out" / "prior", tmp_path / "out" / "transformer")
    with pytest.raises(UsageError, match="is no converted transformer"):
        convert(source, tmp_path / "out", merge=True)


@pytest.mark.parametrize("arguments", [{"dtype": "int8"}, {"max_shard_bytes": 0}, {"kind": "lora"}])
def test_unusable_arguments(tmp_path: Path, source: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int8'|at least one byte|unknown kind 'lora'"):
        convert(source, tmp_path / "out", **arguments)
