"""The CUDA norms through their public functions: in the emulator everywhere, and on a GPU where there is one.

The emulator runs the same sources with the same C++ bindings (csrc/cuda/registration.cpp) on CPU tensors, see
docs/cuda.md. What the norms share with their other backends (the reference, bad input) is tested with those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import OPS, native
from javis.kernels.cases import OpCase
from javis.kernels.ops.ada_layer_norm import contract as norm_contract
from javis.kernels.ops.ada_layer_norm.cases import AdaLayerNormCase
from javis.kernels.ops.gated_residual_ada_layer_norm import contract as gated_contract
from javis.kernels.ops.gated_residual_ada_layer_norm.cases import GatedResidualAdaLayerNormCase
from javis.kernels.testing import assert_within_budget
from tests.kernels.calls import layouts

NORM, GATED = "ada_layer_norm", "gated_residual_ada_layer_norm"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULATION = ("gate", "shift", "scale", "gate0", "shift0", "scale0")
# One value, odd numbers of rows; 40: some lanes idle; 264: several chunks a lane; 1304: four warps a row.
SHAPES: list[dict[str, Any]] = [
    {"frames": 1, "places": 1, "width": 8},
    {"batch": 2, "frames": 3, "places": 5, "width": 40, "masked": True},
    {"batch": 1, "frames": 2, "places": 9, "width": 264},
    {"batch": 1, "frames": 3, "places": 1, "width": 1304, "masked": True},
]
CALLS: list[tuple[str, dict[str, Any]]] = [
    *((NORM, shape) for shape in SHAPES),
    *((GATED, shape) for shape in SHAPES),
    (GATED, {**SHAPES[1], "gated": False}),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_call = pytest.mark.parametrize(
    ("name", "shape"), CALLS, ids=[f"{name}-{'x'.join(str(v) for v in shape.values())}" for name, shape in CALLS]
)
both_norms = pytest.mark.parametrize("name", [NORM, GATED])


def case(name: str, dtype: torch.dtype = torch.float32, **shape: Any) -> OpCase:
    kind = AdaLayerNormCase if name == NORM else GatedResidualAdaLayerNormCase
    return kind(name="test", dtype=dtype, **shape)


def named(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("x", "shift", "scale") if name == NORM else ("x", "h", "gate", "shift", "scale")
    return dict(zip(names, args, strict=True)) | kwargs


def outputs(result: Any) -> dict[str, Tensor]:
    return {"y": result} if isinstance(result, Tensor) else dict(zip(("r", "y"), result))


def with_gradients(
    function: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients of every floating-point input, for fixed gradients of the outputs; all on the CPU."""
    leaves = {
        key: value.detach().to(dtype or value.dtype).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }
    found = outputs(function(**leaves, **options))
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(y.shape, generator=generator).to(inputs["x"].dtype).to(y) for y in found.values()]
    wanted = [key for key, value in leaves.items() if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(list(found.values()), [leaves[key] for key in wanted], given)
    found |= {f"d{key}": gradient for key, gradient in zip(wanted, gradients)}
    return {key: value.detach().cpu() for key, value in found.items()}


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def compare(name: str, inputs: dict[str, Any], device: str) -> dict[str, Tensor]:
    function = OPS[name].function
    actual = with_gradients(function, on(device, inputs), backend="cuda")
    exact = with_gradients(function, inputs, torch.float64, backend="reference")
    same_dtype = with_gradients(function, inputs, backend="reference")
    assert actual.keys() == exact.keys()
    for key, value in actual.items():
        assert_within_budget(key, value, exact[key], same_dtype[key])
    return actual


# 1. Budget --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@each_dtype
@each_call
def test_forward_and_gradients_are_within_budget(
    name: str, shape: dict[str, Any], dtype: torch.dtype, cuda_device: str
) -> None:
    args, kwargs = case(name, dtype, **shape).inputs(seed=1)
    compare(name, named(name, args, kwargs), cuda_device)


@both_norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_modulation(name: str, dtype: torch.dtype, cuda_device: str) -> None:
    args, kwargs = case(name, dtype, **SHAPES[1]).inputs(seed=2)
    inputs = named(name, args, kwargs)
    inputs |= {key: inputs[key].float() for key in MODULATION if key in inputs}
    actual = compare(name, inputs, cuda_device)
    assert actual["dscale"].dtype == torch.float32
    # Of two dtypes: computed in float32, gradients in the dtype of each.
    inputs["shift"] = inputs["shift"].to(dtype)
    actual = compare(name, inputs, cuda_device)
    assert (actual["dshift"].dtype, actual["dscale"].dtype) == (dtype, torch.float32)


@both_norms
def test_gradients_of_the_two_timesteps_frame_by_frame(name: str, cuda_device: str) -> None:
    """A frame with a gradient of its own moves the sums of its own timestep and sample only."""
    args, kwargs = case(name, batch=2, frames=3, places=5, width=16, masked=True).inputs(seed=3)
    inputs = on(cuda_device, named(name, args, kwargs))
    inputs["frame_mask"] = torch.tensor([[True, False, True], [False, False, True]], device=cuda_device)
    for b in range(2):
        for t in range(3):
            leaves = inputs | {key: inputs[key].clone().requires_grad_() for key in ("shift", "shift0")}
            y = outputs(OPS[name].function(**leaves, backend="cuda"))["y"]
            dy = torch.zeros_like(y)
            dy[b, 5 * t : 5 * (t + 1)] = 1
            d, d0 = torch.autograd.grad(y, [leaves["shift"], leaves["shift0"]], dy)
            expected = torch.zeros(2, 16, device=cuda_device)
            expected[b] = 5
            here, other = (d, d0) if inputs["frame_mask"][b, t] else (d0, d)
            assert torch.equal(here, expected) and not other.any()


def test_y_belongs_to_the_r_that_is_returned(cuda_device: str) -> None:
    """The norm sees r as it was rounded; that of the sum before rounding differs in many values."""
    args, _ = case(GATED, torch.bfloat16, places=8, width=264).inputs(seed=6)
    x, h, gate, shift, scale = on_all(cuda_device, args)
    r, y = OPS[GATED].function(x, h, gate, shift, scale, backend="cuda")
    differs = y != OPS[NORM].function(r, shift, scale, backend="cuda")
    assert differs.float().mean() < 0.001


def test_more_partial_sums_than_are_read_at_once(cuda_device: str) -> None:
    """131 frames of one row are 131 partial sums; the second kernel reads 16 times 8 of them."""
    args, kwargs = case(NORM, frames=131, places=1, width=8, masked=True).inputs(seed=5)
    compare(NORM, named(NORM, args, kwargs), cuda_device)


def test_large_mean_does_not_cancel(cuda_device: str) -> None:
    x = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0)) + 3000
    zero = torch.zeros(1, 256)
    compare(NORM, {"x": x, "shift": zero, "scale": zero}, cuda_device)


@both_norms
def test_nan_and_infinity_come_through(name: str, cuda_device: str) -> None:
    args, kwargs = case(name, torch.bfloat16, places=6, width=64).inputs()
    args[0][0, 1, 5], args[0][0, 4, 5] = float("nan"), float("inf")
    y = outputs(OPS[name].function(*on_all(cuda_device, args), **kwargs, backend="cuda"))["y"].cpu()
    assert y[0, 1].isnan().all() and not y[0, 4].isfinite().any()
    assert y[0, [0, 2, 3, 5]].isfinite().all()


def on_all(device: str, args: tuple[Any, ...]) -> list[Any]:
    return [value.to(device) if isinstance(value, Tensor) else value for value in args]


@both_norms
def test_the_same_input_gives_the_same_bits(name: str, cuda_device: str) -> None:
    args, kwargs = case(name, torch.bfloat16, batch=2, frames=2, places=70, width=48, masked=True).inputs()
    inputs = on(cuda_device, named(name, args, kwargs))
    first, second = (with_gradients(OPS[name].function, inputs, backend="cuda") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# 2. to 4. Layouts, empty batches, what the ops promise ----------------------------------------------------------------


@both_norms
@pytest.mark.parametrize("layout", ["columns of a wider tensor", "tokens first", "channels first", "unaligned"])
def test_layouts(name: str, layout: str, cuda_device: str) -> None:
    args, kwargs = case(name, torch.bfloat16, batch=2, frames=3, places=4, width=24, masked=True).inputs(seed=4)
    inputs = on(cuda_device, named(name, args, kwargs))
    expected = with_gradients(OPS[name].function, inputs, backend="cuda")

    def arranged(tensor: Tensor) -> Tensor:
        if layout != "unaligned":
            return layouts(tensor)[layout]
        wide = torch.full((*tensor.shape[:2], 29), float("nan"), dtype=tensor.dtype, device=tensor.device)
        wide[..., 3:27] = tensor
        return wide[..., 3:27]

    moved = {key: arranged(inputs[key]) for key in ("x", "h") if key in inputs}
    stacked = torch.cat([inputs[key] for key in MODULATION if key in inputs], dim=1)
    names = [key for key in MODULATION if key in inputs]
    views = dict(zip(names, stacked.chunk(len(names), dim=1)))  # as the model cuts them out of one product
    result = OPS[name].function(**(inputs | moved | views), backend="cuda")
    for key, value in outputs(result).items():
        assert torch.equal(value.cpu(), expected[key]), key
        assert value.is_contiguous()
    # Gradients that arrive in such a layout.
    leaves = inputs | {key: (moved | views)[key].detach().requires_grad_() for key in moved | views}
    results = list(outputs(OPS[name].function(**leaves, backend="cuda")).values())
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(y.shape, generator=generator).to(y) for y in results]
    wanted = [key for key in leaves if key != "frame_mask"]
    gradients = torch.autograd.grad(results, [leaves[key] for key in wanted], [arranged(dy) for dy in given])
    for key, gradient in zip(wanted, gradients):
        assert torch.equal(gradient.cpu(), expected[f"d{key}"]), key


@both_norms
@pytest.mark.parametrize(("batch", "places"), [(0, 2), (2, 0)])
def test_nothing_to_do(name: str, batch: int, places: int, cuda_device: str) -> None:
    args, kwargs = case(name, batch=batch, frames=3, places=places, width=16, masked=True).inputs()
    found = with_gradients(OPS[name].function, on(cuda_device, named(name, args, kwargs)), backend="cuda")
    assert found["y"].shape == found["dx"].shape == (batch, 3 * places, 16)
    assert torch.equal(found["dshift"], torch.zeros(batch, 16)) and torch.equal(
        found["dscale0"], torch.zeros(batch, 16)
    )


SHAPES_OF = {
    NORM: norm_contract._forward_shapes,
    f"{NORM}_backward": norm_contract._backward_shapes,
    GATED: gated_contract._forward_shapes,
    f"{GATED}_backward": gated_contract._backward_shapes,
}


def with_fakes(device: str) -> Any:
    """The ops that run on this device, with shape functions."""
    if device == "cpu":
        for op, shapes in SHAPES_OF.items():
            if not hasattr(with_fakes, op):
                torch.library.register_fake(f"javis_emulated::{op}")(shapes)
                setattr(with_fakes, op, True)
    return torch.ops.javis_cuda


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(masked: bool, permuted: bool, cuda_device: str) -> None:
    ops, tests = with_fakes(cuda_device), ("test_schema", "test_faketensor")
    args, kwargs = case(GATED, batch=2, frames=3, places=5, width=24, masked=masked).inputs()
    inputs = on(cuda_device, named(GATED, args, kwargs))
    x, h, dr, dy = inputs["x"], inputs["h"], torch.randn_like(inputs["x"]), torch.randn_like(inputs["x"])
    if permuted:
        x, h, dr, dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, h, dr, dy))
    gate, shift, scale, gate0, shift0, scale0 = (inputs.get(key) for key in MODULATION)
    mask = inputs.get("frame_mask")
    check = torch.library.opcheck
    check(ops.ada_layer_norm.default, (x, shift, scale, shift0, scale0, mask, 1e-6), test_utils=tests)
    _, mean, rstd = ops.ada_layer_norm(x, shift, scale, shift0, scale0, mask, 1e-6)
    check(ops.ada_layer_norm_backward.default, (dy, x, mean, rstd, scale, scale0, mask), test_utils=tests)
    given = (x, h, gate, shift, scale, gate0, shift0, scale0, mask, 1e-6)
    check(ops.gated_residual_ada_layer_norm.default, given, test_utils=tests)
    r, _, mean, rstd = ops.gated_residual_ada_layer_norm(*given)
    backward = ops.gated_residual_ada_layer_norm_backward.default
    check(backward, (dr, dy, r, h, mean, rstd, gate, scale, gate0, scale0, mask), test_utils=tests)
    check(backward, (dr, dy, r, None, mean, rstd, None, scale, None, scale0, mask), test_utils=tests)


def test_the_op_refuses_what_the_api_never_sends(cuda_device: str) -> None:
    op = torch.ops.javis_cuda.ada_layer_norm
    x, vector = torch.zeros(2, 6, 8, device=cuda_device), torch.zeros(2, 8, device=cuda_device)
    with pytest.raises(RuntimeError, match="shift has size 7"):
        op(x, vector[:, :7], vector, None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="must be float32 or have the dtype of x"):
        op(x, vector, vector.half(), None, None, None, 1e-6)
    with pytest.raises(RuntimeError, match="does not divide"):
        op(x, vector, vector, vector, vector, torch.ones(2, 4, dtype=torch.bool, device=cuda_device), 1e-6)
    with pytest.raises(RuntimeError, match="needs the modulation of timestep 0"):
        op(x, vector, vector, None, None, torch.ones(2, 3, dtype=torch.bool, device=cuda_device), 1e-6)
    with pytest.raises(RuntimeError, match="width 12 is not a multiple of 8"):
        op(
            torch.zeros(1, 1, 12, device=cuda_device),
            *(torch.zeros(1, 12, device=cuda_device),) * 2,
            None,
            None,
            None,
            1e-6,
        )


# 5. torch.compile --------------------------------------------------------------------------------------------------


@both_norms
def test_compiles_to_one_graph(name: str, cuda_device: str) -> None:
    with_fakes(cuda_device)
    torch.compiler.reset()
    args, kwargs = case(name, batch=2, frames=3, places=5, width=24, masked=True).inputs()
    inputs = on(cuda_device, named(name, args, kwargs))
    compiled = torch.compile(OPS[name].function, fullgraph=True, backend="aot_eager")
    expected = with_gradients(OPS[name].function, inputs, backend="cuda")
    for key, value in with_gradients(compiled, inputs, backend="cuda").items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


# 6. and 7. The choice ----------------------------------------------------------------------------------------------


@both_norms
def test_the_named_backend_is_the_one_that_runs(name: str, cuda_device: str) -> None:
    args, kwargs = case(name, batch=1, frames=2, places=3, width=16, masked=True).inputs()
    inputs = on(cuda_device, named(name, args, kwargs))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with_gradients(OPS[name].function, inputs, backend="cuda")
    namespace = "javis_emulated" if cuda_device == "cpu" else "javis_cuda"
    ran = sorted(event.key for event in profile.key_averages() if event.key.startswith("javis"))
    assert ran == [f"{namespace}::{name}", f"{namespace}::{name}_backward"]


@pytest.mark.parametrize(
    ("dtype", "width", "why"),
    [
        (torch.float64, 8, "no float64 kernel, only float32, bfloat16, float16"),
        (torch.float32, 12, "width 12 is not a multiple of 8 up to 4096"),
        (torch.float32, 4104, "width 4104 is not a multiple of 8 up to 4096"),
    ],
    ids=["float64", "12", "4104"],
)
@both_norms
def test_a_call_that_cannot_run_says_why(name: str, dtype: torch.dtype, width: int, why: str, cuda_device: str) -> None:
    args, kwargs = case(name, dtype, width=width).inputs(device=cuda_device)
    with pytest.raises(UsageError, match=why):
        OPS[name].function(*args, **kwargs, backend="cuda")


@pytest.mark.parametrize("name", [NORM, GATED, f"{NORM}_fp8", f"{GATED}_fp8"])
def test_cuda_on_a_cpu_tensor_says_why(name: str) -> None:
    smallest = min(OPS[name].cases(), key=lambda case: case.bytes())
    args, kwargs = smallest.inputs()
    with pytest.raises(UsageError, match="'cuda' cannot run this call: needs CUDA tensors, got one on cpu"):
        OPS[name].function(*args, **kwargs, backend="cuda")


def test_h_of_another_dtype_is_not_rounded_silently(cuda_device: str) -> None:
    args, _ = case(GATED, torch.bfloat16, width=16).inputs(device=cuda_device)
    with pytest.raises(UsageError, match="would round to the dtype of x"):
        OPS[GATED].function(args[0], args[1].float(), *args[2:], backend="cuda")


# 10. Offsets -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(native.WHY_NOT_CUDA is not None, reason=str(native.WHY_NOT_CUDA))
def test_offsets_beyond_two_to_the_31() -> None:
    rows, width = 2**31 // 4096 + 9, 4096
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of GPU memory")
    x = torch.randn(1, rows, width, device="cuda", dtype=torch.bfloat16)
    zero = torch.zeros(1, width, device="cuda", dtype=torch.bfloat16)
    y = OPS[NORM].function(x, zero, zero, backend="cuda")
    expected = OPS[NORM].function(x[:, -9:], zero, zero, backend="cuda")
    assert torch.equal(y[:, -9:], expected)
