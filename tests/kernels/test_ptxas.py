"""The gate of ``make native-cuda``: that it reads what ptxas prints, and is red when it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from javis.errors import UsageError
from javis.kernels.ptxas import collect, parse, table

# As nvcc 13.0 prints it with -Xptxas -v, for two architectures.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    48 bytes stack frame, 80 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes cumulative stack size, 256 bytes smem, 480 bytes cmem[0]
ptxas info    : Compile time = 63.811 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90a'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compile time = 2.5 ms
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90a'
ptxas info    : Function properties for _Z5firstPf
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compile time = 40.1 ms
"""


def log(stack: int = 0, stores: int = 0) -> str:
    return LOG.format(stack=stack, stores=stores)


def written(folder: Path, text: str) -> Path:
    (folder / "temp/javis_native").mkdir(parents=True)
    (folder / "temp/javis_native/csrc_cuda_norm.cu.o.log").write_text(text, encoding="utf-8")
    return folder


def test_registers_stack_spills_and_shared_memory() -> None:
    first80, second, first90 = parse("norm.cu", log())
    assert (first80.arch, first80.registers, first80.stack, first80.shared) == ("sm_80", 128, 48, 256)
    assert (first80.spill_stores, first80.spill_loads) == (80, 64)
    assert (second.name, second.registers, second.stack, second.shared) == ("_Z6secondPf", 32, 0, 0)
    assert (first90.arch, first90.registers, first90.shared) == ("sm_90a", 126, 256)


def test_names_are_readable(tmp_path: Path) -> None:
    kernels = collect(written(tmp_path, log()))
    assert [(kernel.source, kernel.name, kernel.arch) for kernel in kernels] == [
        ("norm.cu", "first", "sm_80"),
        ("norm.cu", "first", "sm_90a"),
        ("norm.cu", "second", "sm_90a"),
    ]


@pytest.mark.parametrize(("stack", "stores"), [(8, 0), (0, 4)])
def test_a_stack_or_a_spill_is_red_on_sm_90a_only(tmp_path: Path, stack: int, stores: int) -> None:
    green = collect(written(tmp_path / "green", log()))
    assert all(kernel.red() is None for kernel in green)  # sm_80 spills in it
    assert list(table(green))[-1] == "3 compiled, 2 of them for sm_90a: no stack, no spills"
    red = collect(written(tmp_path / "red", log(stack, stores)))
    assert [kernel.name for kernel in red if kernel.red() is not None] == ["first"]
    lines = list(table(red))
    assert lines[-1].endswith("1 red")
    assert lines[-2].startswith(f"RED  norm.cu, first, sm_90a: {stack} bytes of stack, {stores} stored")


def test_a_function_that_was_not_inlined_counts() -> None:
    called = (
        "ptxas info    : Function properties for _Z6calleev\n    16 bytes stack frame, 0 bytes spill stores, 0 bytes"
    )
    text = log().replace("ptxas info    : Used 126", f"{called} spill loads\nptxas info    : Used 126")
    assert parse("norm.cu", text)[-1].red() is not None


def test_silence_is_not_green(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no CUDA build below"):
        collect(tmp_path)
    cut = log().partition("    0 bytes stack frame")[0]
    with pytest.raises(ValueError, match="said nothing of _Z6secondPf for sm_90a"):
        parse("norm.cu", cut)
    old = [kernel for kernel in parse("norm.cu", log()) if kernel.arch == "sm_80"]
    assert any("nothing was compiled for sm_90a" in line for line in table(old))
