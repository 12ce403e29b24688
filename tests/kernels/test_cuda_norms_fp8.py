"""The float8 output of the CUDA norms, in the emulator and on a GPU, held to what test_norms_fp8.py holds Triton to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from javis.kernels import OPS
from tests.kernels.test_norms_fp8 import CASES, exact_y, ulp

each_op = pytest.mark.parametrize("name", CASES)
SHAPES: list[dict[str, Any]] = [
    {"batch": 2, "frames": 1, "places": 5, "width": 40},
    {"batch": 2, "frames": 3, "places": 3, "width": 24, "masked": True},
    {"batch": 1, "frames": 3, "places": 1, "width": 264, "masked": True, "static": True},
    {"batch": 1, "frames": 1, "places": 3, "width": 1304},
]


def call(name: str, device: str, args: tuple[Any, ...], kwargs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in args]
    result = OPS[name].function(*moved, **{k: v.to(device) for k, v in kwargs.items()}, backend="cuda")
    return tuple(value.cpu() for value in result)


@each_op
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(str(v) for v in s.values()))
def test_every_value_is_the_nearest(name: str, shape: dict[str, Any], dtype: torch.dtype, cuda_device: str) -> None:
    args, kwargs = CASES[name](name="test", dtype=dtype, **shape).inputs(seed=1)
    *r, q, scale = call(name, cuda_device, args, kwargs)
    y = exact_y(name, args, kwargs)
    assert q.dtype == torch.float8_e4m3fn and q.shape == y.shape and scale.dtype == torch.float32
    if args[-1] is not None:
        assert torch.equal(scale, args[-1])
        scales = scale.double()
    else:
        torch.testing.assert_close(scale.double(), y.abs().amax(-1) / 448, rtol=1e-5, atol=0)
        assert (q.double().abs().amax(-1) == 448).all()  # the largest value of each row takes the whole range
        scales = scale.double()[..., None]
    wanted = (y / scales).clamp(-448, 448)
    slack = 1e-4 * wanted.abs() + 1e-5  # what float32 arithmetic adds to half a step
    assert ((q.double() - wanted).abs() <= ulp(wanted) / 2 + slack).all()
    if r:
        expected = OPS[name].function(*args, **kwargs, backend="reference")[0]
        torch.testing.assert_close(r[0], expected)


def test_saturation_zero_and_nan(cuda_device: str) -> None:
    x = torch.tensor([1.0, 3.0] * 4 + [0.0] * 8 + [1.0, 1.0, float("nan")] + [1.0] * 5).view(1, 3, 8)
    zero, one = torch.zeros(1, 8), torch.ones(1, 8)
    name = "ada_layer_norm_fp8"
    # xhat is (-1, 1, -1, 1, ...): beyond 448 * 0.001 it saturates; infinities do, too.
    for shift in (zero, torch.full((1, 8), float("inf"))):
        q, scale = call(name, cuda_device, (x, shift, zero, torch.tensor(0.001)), {})
        signs = torch.tensor([-448.0, 448.0] * 4) if shift is zero else torch.full((8,), 448.0)
        assert torch.equal(q[0, 0].float(), signs)
        assert q[0, 2].float().isnan().all()
    # One scale a row: of a row of zeros it is 1, and a NaN shows in the whole row and in its scale.
    q, scale = call(name, cuda_device, (x, zero, zero, None), {})
    assert scale[0, 1] == 1 and not q[0, 1].float().any()
    assert q[0, 2].float().isnan().all() and scale[0, 2].isnan()
    q, scale = call(name, cuda_device, (x, one * float("nan"), zero, None), {})
    assert scale.isnan().all()
    partly = zero.clone()
    partly[0, 3] = float("nan")
    q, scale = call(name, cuda_device, (x, partly, zero, None), {})
    assert scale.isnan().all() and q.float().isnan().all()


@each_op
def test_nothing_to_do(name: str, cuda_device: str) -> None:
    args, kwargs = CASES[name](name="test", batch=0, frames=2, places=3, width=16, masked=True).inputs()
    *_, q, scale = call(name, cuda_device, args, kwargs)
    assert q.shape == (0, 6, 16) and scale.shape == (0, 6)
