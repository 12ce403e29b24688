"""Calls of ops as the tests make them: with gradients, non-contiguous, watched by the profiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from javis.kernels import native

ROOT = Path(__file__).resolve().parents[2]


def with_gradients(
    function: Callable[..., Tensor],
    names: Sequence[str],
    args: Sequence[Tensor],
    kwargs: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Output ``y`` and the gradients of the positional arguments, named ``d<name>``, for one fixed dy."""
    inputs = [value.detach().to(dtype or value.dtype).requires_grad_() for value in args]
    y = function(*inputs, **(kwargs or {}))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(args[0].dtype).to(y.dtype)
    gradients = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def ops_that_ran(function: Callable[[], object], prefix: str = "javis") -> list[str]:
    """Names of the ops of javis that PyTorch's profiler saw, in compiled code too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sorted(event.key for event in profile.key_averages() if event.key.startswith(prefix))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Views with the values of ``x`` [B, N, C] in other layouts; what lies around the values is NaN."""
    batch, tokens, width = x.shape
    wide = torch.full((batch, tokens, 3 * width), float("nan"), dtype=x.dtype)
    wide[:, :, width : 2 * width] = x
    return {
        "columns of a wider tensor": wide[:, :, width : 2 * width],
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
    }


def run_on_isa(isa: str, code: str) -> None:
    """Run ``code`` in a process that uses the copy of the native loops for ``isa``; skip where there is none."""
    if isa not in native.build_info().get("instruction_sets", "").split():
        pytest.skip(f"not built for {isa}")
    start = (
        "import sys; from javis.kernels import native\n"
        f"if native.cpu_isa() != {isa!r}: print('not here:', native.cpu_isa()); sys.exit(77)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=ROOT,
        env=os.environ | {"JAVIS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(f"this processor has no {isa}: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]


# Arguments that no backend of linear and gelu_linear takes, as changes of x [1, 2, 4], weight [3, 4], bias [3].
BAD_PRODUCTS = pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x must be"),
        ({"x": torch.zeros(1, 2, 4, dtype=torch.long)}, "x must be"),
        ({"weight": torch.zeros(3, 5)}, "weight must be \\[F, 4\\]"),
        ({"bias": torch.zeros(4)}, "bias must be \\[3\\]"),
        ({"weight": torch.zeros(3, 4).half()}, "weight must have the dtype"),
        ({"bias": torch.zeros(3).double()}, "bias must have the dtype"),
    ],
)
