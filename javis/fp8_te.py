"""Linear layers on Transformer Engine (``--precision fp8-te``); the package loads on first use.

It scales whole tensors. "current" scaling takes the maximum of each tensor, "delayed" the largest of the steps before,
which saves a pass over the tensor; its scales are 1 in the first step after loading.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

Scaling = Literal["delayed", "current"]


def _recipe(scaling: Scaling) -> Any:
    from transformer_engine.common import recipe

    if scaling == "current":
        return recipe.Float8CurrentScaling(fp8_format=recipe.Format.E4M3)
    # A window of some steps: the maxima of the first, noisy ones say little about the last.
    return recipe.DelayedScaling(
        fp8_format=recipe.Format.E4M3, amax_history_len=16, amax_compute_algo="max", reduce_amax=False
    )


class TeContext(AbstractContextManager[None]):
    """What a denoising step on Transformer Engine runs in: entered once per step, not once per layer.

    Delayed scales are renewed when the context is left, but only where gradients are on: in sampling they would stay at
    1 for ever. So it is left with gradients on.

    Attributes:
        steps: that were finished.
    """

    def __init__(self, scaling: Scaling) -> None:
        self.scaling, self.recipe, self.steps = scaling, _recipe(scaling), 0

    def __call__(self) -> TeContext:
        return self

    def __enter__(self) -> None:
        import transformer_engine.pytorch as te

        if hasattr(te, "autocast"):  # since 2.9
            self._inner = te.autocast(enabled=True, recipe=self.recipe)
        else:
            self._inner = te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        with torch.enable_grad():
            self._inner.__exit__(*error)
        self.steps += 1


class TeLinear(nn.Module):
    """Transformer Engine's linear layer, whose weight is quantised once.

    With current scaling the weight exists in FP8 only. With delayed scaling every scale is 1 at first, which is too
    coarse for weights: their first step measures, the second quantises, and later ones reuse that.
    """

    def __init__(self, linear: nn.Linear, context: TeContext) -> None:
        super().__init__()
        import transformer_engine.pytorch as te

        self._context = context
        in_fp8: Any = nullcontext()
        if context.scaling == "current":
            in_fp8 = getattr(te, "quantized_model_init", None) or te.fp8_model_init  # renamed in 2.9
            in_fp8 = in_fp8(enabled=True, recipe=context.recipe)
        size_out, size_in = linear.weight.shape
        with in_fp8:
            self.inner = te.Linear(
                size_in, size_out, bias=True, params_dtype=torch.bfloat16, device=linear.weight.device
            )
        with torch.no_grad():
            self.inner.weight.copy_(linear.weight)
            self.inner.bias.copy_(linear.bias)
        self.bias = None

    @property
    def weight(self) -> TeLinear:
        return self

    def forward(self, x: Tensor) -> Tensor:
        # "First of several microbatches" is what the library calls a step that quantises weights for the later ones.
        quantises = self._context.steps < 2 if self._context.scaling == "delayed" else None
        out: Tensor = self.inner(x, is_first_microbatch=quantises)
        return out


__all__ = ["Scaling", "TeContext", "TeLinear"]
