"""Triton kernels of gated_residual_ada_layer_norm: those of ada_layer_norm with the residual update before the norm.

The kernels are in ../ada_layer_norm/triton_impl.py; here are the outputs they fill and the configurations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from javis.kernels.ops.ada_layer_norm import aot_specs as specs
from javis.kernels.ops.ada_layer_norm import triton_impl as norm
from javis.kernels.triton_support import AotSpec


def forward(
    x: Tensor,
    h: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate0: Tensor | None,
    shift0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """javis::gated_residual_ada_layer_norm: r, y, mean, rstd."""
    r, y = x.new_empty(x.shape), x.new_empty(x.shape)
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    on, off = (gate, shift, scale), (gate0, shift0, scale0)
    norm.launch_forward(x, h, on, off, frame_mask, eps, r=r, y=y, mean=mean, rstd=rstd)
    return r, y, mean, rstd


def backward(
    dr: Tensor,
    dy: Tensor,
    r: Tensor,
    h: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    gate0: Tensor | None,
    scale0: Tensor | None,
    frame_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """javis::gated_residual_ada_layer_norm_backward: dx, dh (empty without a gate), dmodulation [k or 2k, B, C]."""
    dx = r.new_empty(r.shape)
    dh = r.new_empty(0) if h is None else h.new_empty(h.shape)
    sums = (2 if gate is None else 3) * (1 if frame_mask is None else 2)
    dmodulation = scale.new_empty((sums, *scale.shape))
    norm.launch_backward(
        dr,
        dy,
        r,
        h,
        mean,
        rstd,
        gate,
        gate0,
        scale,
        scale0,
        frame_mask,
        dx=dx,
        dh=None if h is None else dh,
        dmodulation=dmodulation,
    )
    return dx, dh, dmodulation


def aot_specs() -> list[AotSpec]:
    """The configurations of the full-size model (C = 1152, bfloat16), with and without gate and frame mask."""
    options = norm.row_options(specs.WIDTH)
    return [
        spec
        for gate in (True, False)
        for name in (f"{'gated' if gate else 'plain'} residual",)
        for spec in (
            *specs.forward(norm.forward_rows, f"{name} forward", options, residual=True, gate=gate),
            *specs.backward(
                norm.backward_rows, norm.sum_partials, f"{name} backward", options, residual=True, gate=gate
            ),
        )
    ]
