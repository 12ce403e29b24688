"""What every Triton kernel of javis shares: when it can run, and what ahead-of-time compilation needs to know of it.

Triton is imported by ``ops/<op>/triton_impl.py`` alone, on the first launch: ``import javis.kernels`` stays light. With
``TRITON_INTERPRET=1`` in the environment (before the first launch) kernels run on CPU tensors, slowly, in numpy: that
is how their numerics are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # an import hook hides it
        return False


HAS_TRITON = _installed()  # probed once, not imported
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES) -> str | None:
    """Why no Triton kernel can take these tensors, or None. The first tensor's dtype must be one of ``dtypes``."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'javis[kernels]')"
    given = [tensor for tensor in tensors if tensor is not None]
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        return f"needs all tensors on one device, got {', '.join(sorted(map(str, devices)))}"
    device = given[0].device
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"needs a CUDA device (or TRITON_INTERPRET=1 on CPU), got {device}"
    if given[0].dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"no {str(given[0].dtype).removeprefix('torch.')} kernel, only {names}"
    if any(tensor.dtype == torch.float64 for tensor in given):
        return "an argument is float64, which the kernel would round to float32"
    return None


@dataclass(frozen=True, kw_only=True)
class AotSpec:
    """One configuration of a Triton kernel as ``make aot`` compiles it.

    ``ops/<op>/triton_impl.py`` lists its own in ``aot_specs() -> list[AotSpec]``.
    """

    name: str  # unique within the op, e.g. "forward C=1152 bf16"
    kernel: Any  # the function under @triton.jit
    signature: dict[str, str]  # argument -> "*bf16", "*fp32", "i32", "i64", "fp32"; "constexpr" for those in constants
    constants: dict[str, Any]  # constexpr arguments
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()  # pointers and sizes divisible by 16, as they are in the full-size model
    default: bool = True  # what ``auto`` launches for the full-size model: must not spill on sm_90a
    min_arch: int = 80  # compute capability from which the kernel compiles, e.g. 89 for float8 instructions
    options: dict[str, Any] = field(default_factory=dict)
