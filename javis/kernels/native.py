"""Loads the native ops once and remembers why they are missing, if they are.

``WHY_NOT`` is None when ``torch.ops.javis_native`` is there, the ops for CPUs; ``WHY_NOT_CUDA`` is None when
``torch.ops.javis_cuda`` is there, which loads without a GPU as well. Importing this module does the loading, so that
the ops exist before torch.compile traces anything.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch

import javis
from javis.errors import UsageError

_PACKAGE = Path(javis.__file__).parent
LIBRARY = _PACKAGE / "lib" / "libjavis_cpu.so"
# What csrc/registration.cpp defines. A library of an earlier checkout lacks some: it must be built again.
OPS = (
    "ada_layer_norm",
    "ada_layer_norm_backward",
    "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_backward",
    "bidirectional_softmaxes",
    "bidirectional_score_gradient",
    "temporal_attention",
    "temporal_attention_backward",
    "dense_attention",
    "group_softmax_",
    "bias_gelu",
    "bias_gelu_",
    "bias_gelu_backward",
    "qk_norm_rope",
    "qk_norm_rope_backward",
)
CUDA_LIBRARY = LIBRARY.with_name("libjavis_cuda.so")
# What csrc/cuda/registration.cpp defines.
CUDA_OPS: tuple[str, ...] = (
    "ada_layer_norm",
    "ada_layer_norm_backward",
    "ada_layer_norm_fp8",
    "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_backward",
    "gated_residual_ada_layer_norm_fp8",
    "temporal_attention",
    "bidirectional_attention",
)
HOW_TO_BUILD = "build them with `pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"
HOW_TO_BUILD_CUDA = HOW_TO_BUILD.replace("`pip", "`JAVIS_CUDA_ARCHS='80;90a' pip")


def build_record() -> dict[str, Any]:
    """What setup.py noted when javis was installed: native, host, reason, torch, compiler. Empty: it was never run."""
    path = _PACKAGE / "_build.json"
    if not path.is_file():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _load(path: Path) -> str | None:
    """Load the library; the reason if that is impossible."""
    if not path.is_file():
        reason = build_record().get("reason") or "javis was not installed by its setup.py"
        return f"the native ops were not built: {reason}; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}; {HOW_TO_BUILD}"
    missing = [name for name in OPS if not hasattr(torch.ops.javis_native, name)]
    if missing:
        return f"{path.name} is of an earlier version: it lacks {', '.join(missing)}; {HOW_TO_BUILD}"
    return None


def _load_cuda(path: Path) -> str | None:
    """Load the CUDA ops; the reason if that is impossible."""
    if not path.is_file():
        return f"the CUDA ops were not built; {HOW_TO_BUILD_CUDA}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}; {HOW_TO_BUILD_CUDA}"
    missing = [name for name in CUDA_OPS if not hasattr(torch.ops.javis_cuda, name)]
    if missing:
        return f"{path.name} is of an earlier version: it lacks {', '.join(missing)}; {HOW_TO_BUILD_CUDA}"
    return None


WHY_NOT: str | None = _load(LIBRARY)
WHY_NOT_CUDA: str | None = _load_cuda(CUDA_LIBRARY)
CUDA_DEVICE = "cuda"  # type of the devices that CUDA ops run on; "cpu" in tests that emulate them


def why_not_cuda(*tensors: torch.Tensor | None, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why no CUDA kernel can take these tensors, or None. The first tensor's dtype must be one of ``dtypes``."""
    first = tensors[0]
    assert first is not None
    for tensor in tensors:
        if tensor is not None and tensor.device.type != CUDA_DEVICE:
            return f"needs CUDA tensors, got one on {tensor.device}"
    if WHY_NOT_CUDA is not None:
        return WHY_NOT_CUDA
    if first.is_cuda:
        # Asked outside of torch.compile, which cannot trace it; inside, an eager call has usually asked before.
        if first.device.index not in _NO_CODE and not torch.compiler.is_compiling():
            _NO_CODE[first.device.index] = _why_no_code(torch.cuda.get_device_capability(first.device))
        reason = _NO_CODE.get(first.device.index)
        if reason is not None:
            return reason
    if first.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"no {str(first.dtype).removeprefix('torch.')} kernel, only {names}"
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return "an argument is float64, which the kernel would round to float32"
    return None


_NO_CODE: dict[int | None, str | None] = {}  # device -> why the library cannot run there


def _why_no_code(capability: tuple[int, int]) -> str | None:
    """Why the CUDA library has no code for this compute capability, or None."""
    names = cuda_architectures()
    if has_code_for(names, capability):
        return None
    compiled = ", ".join(f"sm_{name}" for name in names)
    return f"the CUDA ops were built for {compiled}, this device is sm_{capability[0]}{capability[1]}"


def has_code_for(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether one of these architectures, as setup.py compiles them, runs on a device of this compute capability.

    "80": that one and later ones of its generation. "90a": that one alone. "100f": that one and later ones of its
    family. Of the first without a letter there is also PTX, which every later device takes.
    """
    portable = True
    for name in architectures:
        digits = name.rstrip("af")
        major, minor = int(digits[:-1]), int(digits[-1])
        if name.endswith("a"):
            fits = capability == (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
            if name.isdigit():
                fits = fits or (portable and capability >= (major, minor))
                portable = False
        if fits:
            return True
    return False


def cuda_architectures() -> list[str]:
    """The architectures that the CUDA ops were compiled for, such as ["80", "90a"]; empty without CUDA ops."""
    if WHY_NOT_CUDA is not None:
        return []
    function = ctypes.CDLL(str(CUDA_LIBRARY)).javis_cuda_architectures
    function.restype = ctypes.c_char_p
    names: bytes = function()
    return names.decode().split(";")


def cpu_isa() -> str | None:
    """Which copy of the CPU kernels runs on this machine: baseline, avx2 or avx512. None without native ops."""
    if WHY_NOT is not None:
        return None
    function = ctypes.CDLL(str(LIBRARY)).javis_cpu_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def multiplies_bf16() -> bool:
    """Whether the CPU ops multiply bfloat16 as such (AVX512_BF16); never where ``JAVIS_CPU_ISA`` names a copy."""
    return WHY_NOT is None and bool(ctypes.CDLL(str(LIBRARY)).javis_cpu_multiplies_bf16())


def kernel_attributes(threads: int = 0) -> list[dict[str, Any]]:
    """What the current GPU says of each compiled CUDA kernel.

    Keys: ``name``, ``registers`` and ``local_bytes`` (per thread), ``shared_bytes`` (static, per block),
    ``max_threads``, ``binary_version`` and ``ptx_version`` (90: compute capability 9.0), and for blocks of ``threads``
    threads (0 or too many: ``max_threads``) ``threads`` and ``blocks_per_multiprocessor``.

    Raises:
        UsageError: the CUDA ops or the ``javis._host`` module were not built, or there is no GPU.
    """
    if WHY_NOT_CUDA is not None:
        raise UsageError(WHY_NOT_CUDA)
    try:
        from javis import _host
    except ImportError as error:
        raise UsageError(f"javis._host is missing ({error}); {HOW_TO_BUILD}") from error
    try:
        kernels: list[dict[str, Any]] = _host.kernel_attributes(str(CUDA_LIBRARY), threads)
    except RuntimeError as error:
        raise UsageError(f"the kernels cannot be asked without a GPU that runs them: {error}") from error
    for kernel in kernels:  # "... [with auto KERNEL = javis::cuda::norm_forward<...>; ...]" and the like
        name = kernel["name"].partition("KERNEL = ")[2].rpartition("]")[0]
        kernel["name"] = name.removeprefix("&").replace("javis::cuda::", "").replace("{anonymous}::", "")
    return sorted(kernels, key=lambda kernel: kernel["name"])


def build_info() -> dict[str, str]:
    """Facts about the compiled parts from the ``javis._host`` module; empty where that was not built."""
    try:
        from javis import _host
    except ImportError:
        return {}
    info: dict[str, str] = _host.build_info()
    return info
