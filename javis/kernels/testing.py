"""How the ops are judged: against float64, with a budget that plain PyTorch in the same dtype sets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEASURES: dict[str, Callable[[Tensor], float]] = {
    "max": lambda error: error.abs().amax().item(),
    "rms": lambda error: error.square().mean().sqrt().item(),
}


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, same_dtype: Tensor) -> None:
    """Assert that a kernel is at most twice as wrong as plain PyTorch in the same dtype, in maximum and RMS error.

    Args:
        name: of the tensor, for the message.
        actual: the kernel's result.
        exact: the reference computed in float64.
        same_dtype: the reference computed in the kernel's own dtype.

    Raises:
        AssertionError: shapes or dtypes differ, values are not finite, or the budget is exceeded.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, expected {same_dtype.dtype}"
    assert torch.isfinite(actual.double()).all(), f"{name}: non-finite values"
    if actual.numel() == 0:
        return
    exact = exact.double()
    eps = torch.finfo(same_dtype.dtype).eps
    for measure, size in MEASURES.items():
        error = size(actual.double() - exact)
        allowed = 2 * size(same_dtype.double() - exact) + eps * size(exact)
        assert error <= allowed, f"{name}: {measure} error {error:.3e} exceeds {allowed:.3e}"
