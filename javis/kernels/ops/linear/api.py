"""linear: a linear layer, ``y = x W^T + b``.

The product is a library's everywhere. It is an op because the library behind ``F.linear`` is not the fastest on every
processor: see ``javis/kernels/onednn.py``. Most of a denoising step's time is in these products.

Read next: reference.py, contract.py (the gradient), docs/kernels/linear.md.
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.linear import contract
from javis.kernels.ops.linear.reference import linear_ref
from javis.kernels.ops.prior_injection.contract import autocasting

CHECKS: dict[Backend, Check] = {
    Backend.ONEDNN: contract.why_not_onednn,
    Backend.REFERENCE: lambda *_: None,
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | str = Backend.AUTO) -> Tensor:
    """Return ``x @ weight.T + bias``, accumulated in float32 (float64 for float64).

    Args:
        x: tokens, [B, N, C].
        weight: [F, C], in the dtype of ``x`` (under autocast any), as ``nn.Linear`` keeps it.
        bias: [F], in the dtype of ``x`` (under autocast any); or None.
        backend: ``"auto"`` picks the fastest that can run; any other value runs or raises.

    Returns:
        [B, N, F] in the dtype of ``x``, differentiable in x, weight and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UsageError: the named backend cannot run this call; the message says why.
    """
    validate(x, weight, bias)
    if select("linear", CHECKS, x, weight, bias, backend=backend) is Backend.ONEDNN:
        return contract.linear_onednn(x, weight, bias)
    return linear_ref(x, weight, bias)


def validate(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless these arguments fit together; shared with gelu_linear."""
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be a floating-point [B, N, C], got {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be [F, {x.shape[-1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not autocasting(x):
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
