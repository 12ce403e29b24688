"""What PyTorch knows of prior_injection: valid arguments, when each backend can run, shapes, the gradient.

``validate`` and ``attention_sdpa`` serve ``text_cross_attention`` as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from javis.kernels.triton_support import why_not_triton

MAX_KEYS = 128  # one tile of scores holds all keys
MAX_HEAD_SIZE = 128


def autocasting(x: Tensor) -> bool:
    """Whether autocast will bring the dtypes of a call together, so that they may differ."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def validate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError for arguments that do not fit together."""
    if q.ndim != 3 or not q.dtype.is_floating_point:
        raise ValueError(f"q must be a floating-point [B, N, C], got {q.dtype} {tuple(q.shape)}")
    batch, _, width = q.shape
    fits = k.ndim == 4 and k.shape[0] == batch and k.shape[1] * k.shape[3] == width and k.shape[2] > 0 and width > 0
    if not fits:
        raise ValueError(f"k must be [{batch}, H, M, D] with H * D = {width} > 0 and M > 0, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype and not autocasting(q):
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, k.shape[2])):
        raise ValueError(f"mask must be a bool [{batch}, {k.shape[2]}], got {mask.dtype} {tuple(mask.shape)}")


def why_not_triton_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why the Triton kernel cannot take this call, or None."""
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"needs q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if k.shape[2] > MAX_KEYS:
        return f"at most {MAX_KEYS} keys, got {k.shape[2]}"
    if k.shape[3] > MAX_HEAD_SIZE:
        return f"head size at most {MAX_HEAD_SIZE}, got {k.shape[3]}"
    return why_not_triton(q, k, v, mask)


def why_not_sdpa(q: Tensor, *_: object) -> str | None:
    """float64 goes to the reference, as for every op."""
    return "float64 is computed by the reference" if q.dtype == torch.float64 else None


# -- PyTorch's attention -----------------------------------------------------------------------------------------------


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``F.scaled_dot_product_attention`` on arguments that ``validate`` has accepted."""
    queries = q.unflatten(-1, (k.shape[1], k.shape[3])).transpose(1, 2)
    bias = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias)
    if q.device.type == "cpu" and q.numel():
        out = _keep_nan(out, queries, k)
    return out.transpose(1, 2).flatten(2)


def _keep_nan(out: Tensor, queries: Tensor, k: Tensor) -> Tensor:
    """PyTorch's CPU kernel takes a row whose scores are all NaN for one without keys and returns zeros (torch 2.13)."""
    lost = queries.detach().amax(-1).isnan() | k.detach().amax((-1, -2)).isnan()[:, :, None]
    if torch.compiler.is_compiling() or bool(lost.any()):
        out = out.masked_fill(lost[..., None], float("nan"))
    return out


# -- Triton ------------------------------------------------------------------------------------------------------------

torch.library.define("javis::prior_injection", "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor")
torch.library.define(
    "javis::prior_injection_backward",
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("javis::prior_injection", ("cpu", "cuda"))
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    from javis.kernels.ops.prior_injection import triton_impl

    return triton_impl.forward(q, k, v, mask)


@torch.library.impl("javis::prior_injection_backward", ("cpu", "cuda"))
def _backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from javis.kernels.ops.prior_injection import triton_impl

    return triton_impl.backward(dy, q, k, v, mask)


@torch.library.register_fake("javis::prior_injection")
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)  # new_empty, not empty_like: dense whatever the strides of q


@torch.library.register_fake("javis::prior_injection_backward")
def _backward_shapes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class PriorInjection(torch.autograd.Function):
    """Keeps the inputs alone: the scores of M keys are cheaper to compute again than to store."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return torch.ops.javis.prior_injection.default(q, k, v, mask)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.javis.prior_injection_backward.default(dy, *ctx.saved_tensors), None)


def prior_injection_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The Triton kernel on arguments that ``why_not_triton_kernel`` has accepted."""
    out: Tensor = PriorInjection.apply(q, k, v, mask)
    return out
