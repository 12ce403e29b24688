"""The compiled parts: what they need from torch, and what happens where they cannot be built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from javis.errors import UsageError
from javis.kernels import native, ptxas

ROOT = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
needs_source = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not in a source tree")

UNSTABLE = re.compile(r"\b(at|c10|torch)::")


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
needs_cuda_ops = pytest.mark.skipif(native.WHY_NOT_CUDA is not None, reason=str(native.WHY_NOT_CUDA))


@needs_nm
@pytest.mark.parametrize(
    "library",
    [
        pytest.param(native.LIBRARY, marks=needs_native, id="CPU"),
        pytest.param(native.CUDA_LIBRARY, marks=needs_cuda_ops, id="CUDA"),
    ],
)
def test_library_needs_only_the_stable_abi(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert any("torch_library_impl" in symbol for symbol in symbols)  # it is a torch library at all
    assert [symbol for symbol in symbols if UNSTABLE.search(symbol)] == []
    assert [symbol for symbol in symbols if re.search(r"\bPy[A-Z_]", symbol)] == []


@needs_nm
@needs_cuda_ops
def test_the_cuda_library_needs_no_cuda_and_shows_little() -> None:
    """It loads beside a CPU build of torch; the CUDA runtime inside it cannot be mistaken for torch's."""
    symbols = undefined_symbols(native.CUDA_LIBRARY)
    assert [symbol for symbol in symbols if re.match(r"(cu[A-Z]|cuda[A-Z]|__cuda)", symbol)] == []
    command = ["nm", "-D", "--defined-only", "-C", str(native.CUDA_LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = {line.split(maxsplit=2)[2] for line in listing.splitlines() if line.split()[1] == "T"}
    assert {name for name in shown if not name.startswith("_")} == {
        "javis_cuda_architectures",
        "javis_cuda_kernel_attributes",
    }


@pytest.mark.parametrize(
    ("architectures", "runs", "refused"),
    [
        ("80;90a", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),  # 10.0 takes the PTX of 80
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("90;100f", [(9, 0), (10, 0), (10, 3), (12, 0)], [(8, 9)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (11, 0)]),
    ],
)
def test_which_devices_the_cuda_library_runs_on(
    architectures: str, runs: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    names = architectures.split(";")
    assert all(native.has_code_for(names, capability) for capability in runs)
    assert not any(native.has_code_for(names, capability) for capability in refused)


def test_kernel_attributes_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    why = "without a GPU" if native.WHY_NOT_CUDA is None else "the CUDA ops were not built"
    with pytest.raises(UsageError, match=why):
        native.kernel_attributes()
    monkeypatch.setattr(native, "WHY_NOT_CUDA", "the CUDA ops were not built; how to")
    with pytest.raises(UsageError, match="the CUDA ops were not built; how to"):
        native.kernel_attributes()
    assert native.cuda_architectures() == []


@pytest.mark.gpu
@needs_cuda_ops
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_attributes() -> None:
    kernels = native.kernel_attributes(threads=128)
    assert {kernel["name"].partition("<")[0] for kernel in kernels} >= {"norm_forward", "norm_backward"}
    for kernel in kernels:
        assert kernel["local_bytes"] == 0 and kernel["registers"] > 0, kernel
        assert kernel["threads"] <= kernel["max_threads"] and kernel["blocks_per_multiprocessor"] > 0, kernel


def test_the_search_finds_an_unstable_symbol() -> None:
    assert UNSTABLE.search("U at::_ops::add_Tensor::call(at::Tensor const&)")
    assert UNSTABLE.search("U c10::detail::torchCheckFail(char const*)")
    assert not UNSTABLE.search("U aoti_torch_get_sizes")
    assert not UNSTABLE.search("U torch_call_dispatcher")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what setup.py reads, so that a build leaves the working tree alone."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(
        ROOT / "javis", folder / "javis", ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "weights")
    )
    return folder


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("build", "dist"):
        shutil.rmtree(source / name, ignore_errors=True)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "build/lib", "--build-temp", "build/tmp"],
        cwd=source,
        env=os.environ | {"JAVIS_NATIVE": "auto"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def python_on_build(source: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source / "build/lib",
        env=os.environ | {"PYTHONPATH": str(source / "build/lib")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_source
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler: looked for /nonexistent/c++"),
        ({"CXX": "false"}, "the compiler failed"),
        ({"JAVIS_NATIVE": "0"}, "switched off by JAVIS_NATIVE=0"),
    ],
    ids=["no compiler", "compiler fails", "switched off"],
)
def test_builds_without_native_ops_and_says_why(source: Path, environment: dict[str, str], reason: str) -> None:
    done = build(source, **environment)
    assert done.returncode == 0, done.stderr
    assert f"installing without native ops: {reason}" in done.stdout
    package = source / "build/lib/javis"
    assert (package / "kernels/__init__.py").is_file()
    assert not list(package.rglob("*.so"))
    assert json.loads((package / "_build.json").read_text())["reason"].startswith(reason)
    printed = python_on_build(
        source,
        "import torch\n"
        "from javis.kernels import ada_layer_norm, native\n"
        "x, vector = torch.randn(1, 4, 8), torch.zeros(1, 8)\n"
        "print(native.__file__, ada_layer_norm(x, vector, vector).shape)\n"
        "try: ada_layer_norm(x, vector, vector, backend='cpu')\n"
        "except ValueError as error: print(error)\n",
    )
    assert str(source) in printed
    assert "torch.Size([1, 4, 8])" in printed
    assert "cannot run this call: the native ops were not built" in printed
    assert reason in printed


@needs_source
def test_native_ops_can_be_demanded(source: Path) -> None:
    done = build(source, JAVIS_NATIVE="1", CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "JAVIS_NATIVE=1, but the native ops cannot be built: no C++ compiler" in done.stderr + done.stdout


@needs_source
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"JAVIS_CUDA_ARCHS": "90a", "NVCC": "/nonexistent/nvcc"}, "no nvcc: looked for it in /nonexistent/nvcc"),
        ({"JAVIS_CUDA_ARCHS": "90a", "NVCC": "false"}, "JAVIS_CUDA_ARCHS is set, but .* the compiler failed"),
        ({"JAVIS_CUDA_ARCHS": "70"}, "JAVIS_CUDA_ARCHS='70': expected 80 or later without a dot"),
        ({"JAVIS_CUDA_ARCHS": "9.0"}, "JAVIS_CUDA_ARCHS='9.0': expected"),
    ],
    ids=["no nvcc", "nvcc fails", "too old", "a dot"],
)
def test_cuda_ops_that_were_asked_for_are_not_left_out(source: Path, environment: dict[str, str], why: str) -> None:
    for path in (source / "csrc").rglob("*.c*"):
        path.write_text("", encoding="utf-8")  # no need to compile the real ones
    done = build(source, **environment)
    assert done.returncode != 0
    assert re.search(why, done.stdout + done.stderr)


@needs_source
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_ops_are_built_and_shipped_if_asked_for(source: Path) -> None:
    for path in (source / "csrc").rglob("*.c*"):
        path.write_text("", encoding="utf-8")
    kernel = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }"
    (source / "csrc/cuda/ada_layer_norm.cu").write_text(kernel, encoding="utf-8")
    done = build(source, JAVIS_NATIVE="1", JAVIS_CUDA_ARCHS="90a;80")
    assert done.returncode == 0, done.stdout + done.stderr
    package = source / "build/lib/javis"
    assert (package / "lib/libjavis_cuda.so").is_file()
    assert json.loads((package / "_build.json").read_text())["cuda"] == ["80", "90a"]
    assert [(kernel.name, kernel.arch) for kernel in ptxas.collect(source / "build")] == [
        ("twice", "sm_80"),
        ("twice", "sm_90a"),
    ]
    plain = build(source, JAVIS_NATIVE="1")
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert [path.name for path in (package / "lib").iterdir()] == ["libjavis_cpu.so"]
    assert json.loads((package / "_build.json").read_text())["cuda"] == []


@needs_source
def test_weights_are_shipped(source: Path) -> None:
    weights = source / "javis/weights/demo"
    weights.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "notes.txt"):
        (weights / name).write_bytes(b"x")
    assert build(source, JAVIS_NATIVE="0").returncode == 0
    shipped = source / "build/lib/javis/weights/demo"
    assert sorted(path.name for path in shipped.iterdir()) == ["config.json", "model.safetensors"]


@needs_source
def test_a_stale_library_is_not_shipped(source: Path) -> None:
    (source / "javis/lib").mkdir(exist_ok=True)
    (source / "javis/lib/libjavis_cpu.so").write_bytes(b"from an older build")
    assert build(source, JAVIS_NATIVE="0").returncode == 0
    assert not list((source / "build/lib").rglob("*.so"))


@needs_source
@needs_compiler
@pytest.mark.slow
def test_builds_from_a_clean_copy(source: Path) -> None:
    done = build(source, JAVIS_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    package = source / "build/lib/javis"
    record = json.loads((package / "_build.json").read_text())
    assert record["native"] is True
    assert record["reason"] is None
    assert not [symbol for symbol in undefined_symbols(package / "lib/libjavis_cpu.so") if UNSTABLE.search(symbol)]
    printed = python_on_build(
        source,
        "import torch\n"
        "from javis.kernels import ada_layer_norm, native\n"
        "x, vector = torch.randn(1, 4, 8), torch.zeros(1, 8)\n"
        "print(native.LIBRARY, native.build_info()['torch_target'], native.cpu_isa())\n"
        "ada_layer_norm(x, vector, vector, backend='cpu')\n",
    )
    assert str(source) in printed
    assert " 2.11 " in printed


@pytest.mark.parametrize("load", [native._load, native._load_cuda], ids=["CPU", "CUDA"])
def test_a_library_that_does_not_load_is_a_reason(load: Callable[[Path], str | None], tmp_path: Path) -> None:
    broken = tmp_path / "libjavis_broken.so"
    broken.write_bytes(b"not a library")
    reason = load(broken)
    assert reason is not None
    assert "does not load" in reason
    assert "pip install" in reason
    assert ("JAVIS_CUDA_ARCHS" in reason) is (load is native._load_cuda)
    missing = load(tmp_path / "nowhere.so")
    assert missing is not None
    assert "not built" in missing


@needs_source
@pytest.mark.parametrize(("path", "ops"), [("csrc", native.OPS), ("csrc/cuda", native.CUDA_OPS)], ids=["CPU", "CUDA"])
def test_the_list_of_ops_is_that_of_the_registration(path: str, ops: tuple[str, ...]) -> None:
    source = (ROOT / path / "registration.cpp").read_text(encoding="utf-8")
    assert list(ops) == re.findall(r'"(\w+)\(', source)
    assert sorted(ops) == sorted(re.findall(r'm\.impl\("(\w+)"', source))


@needs_native
def test_a_library_of_an_earlier_version_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "OPS", ("ada_layer_norm", "op_of_tomorrow"))
    reason = native._load(native.LIBRARY)
    assert reason is not None and "earlier version: it lacks op_of_tomorrow; build" in reason


@needs_cuda_ops
def test_a_cuda_library_of_an_earlier_version_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CUDA_OPS", ("ada_layer_norm", "op_of_tomorrow"))
    reason = native._load_cuda(native.CUDA_LIBRARY)
    assert reason is not None and "earlier version: it lacks op_of_tomorrow; build" in reason
