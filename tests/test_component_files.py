"""Modules that are built without memory, filled from files, or made at random: ties, dtypes, and what is held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from javis.component_files import ComponentError, build_empty, build_random, fill, put_in_place, weight_files


class Small(nn.Module):
    """A tie, a missing bias, a buffer of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        nn.init.zeros_(self.first.weight)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("computed", torch.arange(5.0), persistent=False)


def test_an_empty_module_has_its_buffers_and_no_parameters() -> None:
    module = build_empty(Small, torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    assert module.computed.tolist() == [0, 1, 2, 3, 4] and module.first.weight is module.second.weight
    assert not nn.Linear(2, 2).weight.is_meta  # outside the block nothing is changed


def test_filling_keeps_ties_and_dtypes(tmp_path: Path) -> None:
    state = {"first.weight": torch.randn(4, 4), "second.bias": torch.randn(4), "kept": torch.randn(3)}
    for weights in (state, state | {"second.weight": state["first.weight"].clone()}):
        save_file(weights, tmp_path / "model.safetensors")
        module = build_empty(Small, torch.bfloat16)
        fill(module, weight_files(tmp_path, "model"), torch.device("cpu"))
        assert module.first.weight is module.second.weight
        assert torch.equal(module.first.weight, state["first.weight"].bfloat16())
        assert torch.equal(module.kept, state["kept"]) and module.kept.dtype == torch.float32


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    """Whichever came last would have won, and the clips would have been those of neither."""
    state = {"first.weight": torch.randn(4, 4), "second.bias": torch.randn(4), "kept": torch.randn(3)}
    save_file(state | {"second.weight": state["first.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ComponentError, match=r"model.safetensors holds 'second.weight' with other values"):
        fill(build_empty(Small, torch.float32), weight_files(tmp_path, "model"), torch.device("cpu"))


def test_random_modules_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    module = build_random(Small, torch.device("cpu"), torch.bfloat16, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert module.first.weight.dtype == torch.bfloat16 and module.first.weight is module.second.weight
    assert 0.1 < module.first.weight.float().std() < 2  # it started as zeros


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "user"])
def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Of three folders the last fails: neither the one that was replaced nor the one that was new is seen then."""
    rename, moves = Path.rename, {tmp_path / f"new-{name}": tmp_path / name for name in "abc"}
    for folder in (*moves, tmp_path / "a", tmp_path / "c"):
        folder.mkdir()
        (folder / "name").write_text(folder.name)

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new-c":
            raise error
        return rename(path, target)

    def there() -> dict[str, str]:
        return {p.name: (p / "name").read_text() for p in tmp_path.iterdir()}

    before = there()
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        put_in_place(moves)
    assert there() == before
    monkeypatch.undo()
    put_in_place(moves)
    assert there() == {name: f"new-{name}" for name in "abc"}


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from javis.component_files import build_empty, build_random, fill, weight_files, write_weights

def memory(which):  # VmRSS: now, VmHWM: the most since it was reset
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024

def make():
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(32)))

folder, cpu = Path(sys.argv[1]), torch.device("cpu")
build_random(lambda: nn.Linear(8, 8), cpu, torch.bfloat16, 0)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
if sys.argv[2] == "random":
    module = build_random(make, cpu, torch.bfloat16, 0)
    print(memory("VmHWM") - before)
    write_weights(folder, "model", module.state_dict())
else:
    fill(build_empty(make, torch.bfloat16), weight_files(folder, "model"), cpu)
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory of a process")
def test_nothing_is_held_twice(tmp_path: Path) -> None:
    """64 MiB of bfloat16: made with one parameter more, read with the file's pages beside it."""
    for how, allowed in (("random", 64 + 40), ("read", 64 + 64 + 40)):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path, how], capture_output=True, text=True, timeout=120, check=True
        )
        assert 50 * 2**20 < int(done.stdout) < allowed * 2**20, how
