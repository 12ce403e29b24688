"""All ops, for the tools that go over them: the model, ``javis doctor`` and the microbenchmarks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from javis.kernels.backend import Backend, Check
from javis.kernels.cases import OpCase

# One line per op. ``ops/<name>/api.py`` has the function of that name and CHECKS, ``ops/<name>/cases.py`` has cases().
NAMES = (
    "ada_layer_norm",
    "prior_injection",
    "gated_residual_ada_layer_norm",
    "flow_update",
    "bidirectional_attention",
    "ada_layer_norm_fp8",
    "gated_residual_ada_layer_norm_fp8",
    "group_norm_silu",
    "factorized_attention",
    "qk_norm_rope",
    "folded_prior_injection",
    "gelu_linear",
    "text_cross_attention",
    "linear",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op: its public function, the backends it has, and the calls it is measured with."""

    function: Callable[..., Any]  # returns a tensor or a tuple of tensors
    checks: Mapping[Backend, Check]  # fastest first; each takes the function's arguments but ``backend``, in order
    cases: Callable[[], Sequence[OpCase]]


def _load(name: str) -> Op:
    api = importlib.import_module(f"javis.kernels.ops.{name}.api")
    cases = importlib.import_module(f"javis.kernels.ops.{name}.cases")
    return Op(function=getattr(api, name), checks=api.CHECKS, cases=cases.cases)


OPS: dict[str, Op] = {name: _load(name) for name in NAMES}


# Fields of javis.model.ops.ModelOps; the other ops serve the sampler, the codecs and library backends.
MODEL_OPS = (
    "ada_layer_norm",
    "gated_residual_ada_layer_norm",
    "factorized_attention",
    "text_cross_attention",
    "prior_injection",
    "folded_prior_injection",
    "bidirectional_attention",
    "gelu_linear",
    "linear",
)


def fused_ops() -> dict[str, Callable[..., Any]]:
    """The ops under the names of the model's record: ``ModelOps(**fused_ops())`` runs the model on these kernels."""
    return {name: OPS[name].function for name in MODEL_OPS if name in OPS}
