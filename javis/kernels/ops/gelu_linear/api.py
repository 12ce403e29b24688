"""gelu_linear: the first half of an MLP, a linear layer followed by GELU in its tanh form.

    z = x W^T + b        y = z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2

The product is the library's everywhere; on a CPU, bias and GELU are one native pass over its result, in place when no
gradient is wanted.

Read next: reference.py, contract.py (what torch.compile sees), csrc/cpu/bias_gelu_rows.cpp (the loops).
"""

from __future__ import annotations

from torch import Tensor

from javis.kernels.backend import Backend, Check, select
from javis.kernels.ops.gelu_linear import contract
from javis.kernels.ops.gelu_linear.reference import gelu_linear_ref
from javis.kernels.ops.linear.api import validate

CHECKS: dict[Backend, Check] = {
    Backend.CPU: contract.why_not_cpu,
    Backend.REFERENCE: lambda *_: None,
}


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | str = Backend.AUTO) -> Tensor:
    """Return ``gelu_tanh(x @ weight.T + bias)``, the product accumulated in float32.

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
    if select("gelu_linear", CHECKS, x, weight, bias, backend=backend) is Backend.CPU:
        return contract.gelu_linear_native(x, weight, bias)
    return gelu_linear_ref(x, weight, bias)
