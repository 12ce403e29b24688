"""All ops, for the tools that go over them: the model, ``javis doctor`` and the microbenchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from javis.kernels.backend import Backend, Check
from javis.kernels.cases import OpCase, ada_layer_norm_cases
from javis.kernels.ops.ada_layer_norm.api import CHECKS as ADA_LAYER_NORM_CHECKS
from javis.kernels.ops.ada_layer_norm.api import ada_layer_norm


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op: its public function, the backends it has, and the calls it is measured with."""

    function: Callable[..., Tensor]
    checks: Mapping[Backend, Check]  # fastest first
    cases: Callable[[], Sequence[OpCase]]


OPS: dict[str, Op] = {
    "ada_layer_norm": Op(function=ada_layer_norm, checks=ADA_LAYER_NORM_CHECKS, cases=ada_layer_norm_cases),
}


def fused_ops() -> dict[str, Callable[..., Tensor]]:
    """The ops under the names of the model's record: ``ModelOps(**fused_ops())`` runs the model on these kernels."""
    return {name: op.function for name, op in OPS.items()}
