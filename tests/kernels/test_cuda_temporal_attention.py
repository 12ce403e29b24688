"""The CUDA kernel of factorized_attention: in the emulator everywhere, and on a GPU where there is one.

Tests with ``cuda_device`` call the public function; on a CPU the emulator then runs the same sources with the same C++
bindings (docs/cuda.md). What all backends share is tested with the others. Test numbers: CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from javis.errors import UsageError
from javis.kernels import native, triton_support
from javis.kernels.ops.factorized_attention import contract
from javis.kernels.ops.factorized_attention.api import factorized_attention
from javis.kernels.ops.factorized_attention.cases import FactorizedAttentionCase
from javis.kernels.testing import assert_within_budget
from tests.kernels.borders import guarded
from tests.kernels.calls import ops_that_ran
from tests.kernels.emulation import CUDA, emulate, needs_emulator

DTYPES = [torch.bfloat16, torch.float16]
# One frame; less than a tile, a frame less than one, a full one, one more; three tiles. Heads of 72 are compiled as
# such, 8, 32 and 64 run in what is compiled for 64, 80 and 128 in what is compiled for 128. Sequences that do not fill
# the last block of threads.
SHAPES: list[dict[str, Any]] = [
    {"frames": 1, "places": 1, "heads": 1, "size": 72, "rope": True},
    {"batch": 2, "frames": 5, "places": 3, "heads": 1, "size": 72, "rope": True},
    {"frames": 15, "places": 3, "heads": 2, "size": 72, "rope": True},
    {"frames": 16, "places": 1, "heads": 3, "size": 32, "rope": True},
    {"frames": 17, "places": 3, "heads": 1, "size": 72, "rope": True},
    {"batch": 2, "frames": 20, "places": 1, "heads": 3, "size": 8, "norm": False, "rope": True},
    {"frames": 40, "places": 1, "heads": 2, "size": 72, "rope": True},
    {"frames": 40, "places": 1, "heads": 1, "size": 128},
    {"frames": 15, "places": 5, "heads": 1, "size": 80, "norm": False},
]
LONG: list[dict[str, Any]] = [
    {"frames": 128, "places": 1, "heads": 1, "size": 72, "rope": True},
    {"frames": 81, "places": 1, "heads": 1, "size": 64, "rope": True},
    {"frames": 115, "places": 1, "heads": 1, "size": 128, "rope": True},
]
needs_triton = pytest.mark.skipif(not triton_support.HAS_TRITON, reason="triton is not installed")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
on_cuda = partial(factorized_attention, backend="cuda")


def inputs(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 1, **shape: Any) -> tuple[Any, ...]:
    """(qkv, kwargs)"""
    case = FactorizedAttentionCase(name="test", dtype=dtype, **shape)
    (qkv, _), kwargs = case.inputs(seed=seed, device=device)
    return qkv, kwargs


def check_budget(actual: Tensor, qkv: Tensor, kwargs: dict[str, Any]) -> None:
    """Against the reference, which rounds nothing on the way: stricter than plain PyTorch."""
    qkv = qkv.cpu()
    kwargs = {k: tuple(x.cpu() for x in v) if isinstance(v, tuple) else v.cpu() for k, v in kwargs.items()}
    exact = factorized_attention(qkv.double(), "temporal", **kwargs, backend="reference")
    same_dtype = factorized_attention(qkv, "temporal", **kwargs, backend="reference")
    assert_within_budget("out", actual.cpu(), exact, same_dtype)


# 1. Budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=lambda s: "-".join(map(str, s.values())))
def test_within_budget(shape: dict[str, Any], dtype: torch.dtype, cuda_device: str) -> None:
    qkv, kwargs = inputs(cuda_device, dtype, **shape)
    check_budget(on_cuda(qkv, "temporal", **kwargs), qkv, kwargs)


@needs_emulator
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6], SHAPES[7]], ids=lambda s: "-".join(map(str, s.values())))
def test_emulated_threads_in_any_order_give_the_same_bits(shape: dict[str, Any]) -> None:
    """Called past PyTorch, so that every access of 4 bytes and more is held to the tensors of the call."""
    qkv, kwargs = inputs(**shape)
    weights = contract.prepared.stack(kwargs.get("q_weight"), kwargs.get("k_weight"))
    cos, sin = kwargs.get("rope", (None, None))
    kernel, results = emulate(CUDA / "temporal_attention.cu"), []
    batch, frames, places, _, heads, size = qkv.shape
    for seed in (0, 1, 2):
        out = torch.full((batch, frames * places, heads * size), math.nan, dtype=qkv.dtype)
        kernel.order(seed)
        kernel(
            "javis_cuda_temporal_attention", qkv, out, weights, cos, sin, *qkv.stride()[:5],
            batch, frames, places, heads, size, 1, 1e-6,
        )  # fmt: skip
        results.append(out)
    kernel.order(0)
    check_budget(results[0], qkv, kwargs)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_large_scores_do_not_overflow(cuda_device: str) -> None:
    """Scores of some thousands without a norm: the softmax is one key."""
    qkv, _ = inputs(cuda_device, frames=20, places=2, heads=1, size=16)
    y = on_cuda(qkv * 200, "temporal")[0].unflatten(0, (20, 2))
    for place in range(2):
        q, k, v = (200 * qkv[0, :, place, part, 0].float() for part in range(3))
        torch.testing.assert_close(y[:, place].float(), v[(q @ k.T).argmax(1)], rtol=1e-2, atol=0)


@pytest.mark.parametrize("frames", [6, 20])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_its_sequence(part: int, frames: int, cuda_device: str) -> None:
    """A NaN of q is in its row; of k, in its sequence; of v, in its column of its sequence."""
    qkv, kwargs = inputs(cuda_device, frames=frames, places=3, heads=2, size=16, rope=True)
    qkv[0, 4, 1, part, 1, 5] = math.nan
    y = on_cuda(qkv, "temporal", **kwargs).view(frames, 3, 2, 16).isnan()
    expected = torch.zeros_like(y)
    if part == 0:
        expected[4, 1, 1] = True
    elif part == 1:
        expected[:, 1, 1] = True
    else:
        expected[:, 1, 1, 5] = True
    assert torch.equal(y, expected)


def test_minus_infinity_and_infinity(cuda_device: str) -> None:
    """A key whose score is -inf has no weight; one of +inf leaves NaN, as the softmax of PyTorch does."""
    qkv = torch.ones(1, 3, 1, 3, 1, 16, dtype=torch.bfloat16, device=cuda_device)
    qkv[0, :, 0, 2, 0] = torch.tensor([1.0, 2.0, 4.0], device=cuda_device)[:, None]
    qkv[0, 1, 0, 1] = -math.inf
    assert torch.equal(on_cuda(qkv, "temporal").cpu(), torch.full((1, 3, 16), 2.5, dtype=torch.bfloat16))
    qkv[0, 1, 0, 1] = math.inf
    assert on_cuda(qkv, "temporal").isnan().all()


def test_case_by_hand(cuda_device: str) -> None:
    """D = 16, so scores are divided by 4: weights of 1, 2 and 3; then two frames a quarter turn apart."""
    qkv = torch.zeros(1, 3, 1, 3, 1, 16, dtype=torch.float16, device=cuda_device)
    qkv[0, :, 0, 0, 0, 1] = 1
    qkv[0, :, 0, 1, 0, 1] = 4 * torch.tensor([1.0, 2.0, 3.0]).log()
    qkv[0, :, 0, 2, 0, 9] = torch.tensor([6.0, 12.0, 24.0])
    y = on_cuda(qkv, "temporal").cpu()
    assert torch.allclose(y[0, :, 9].float(), torch.tensor((6 + 2 * 12 + 3 * 24) / 6), rtol=2e-3)
    assert not y[0, :, [0, 1, 8, 10]].any()
    # With a quarter turn per frame, frame 1 sees what pointed along value 0 in value 1.
    angles = torch.arange(3.0, device=cuda_device)[:, None].expand(3, 8) * (math.pi / 2)
    qkv[:, :, :, :2] = 0
    qkv[0, 0, 0, 1, 0, 0] = 4 * math.log(2)  # the key of frame 0: (c, 0); the others are 0
    qkv[0, 1, 0, 0, 0, 1] = 1  # the query of frame 1: (0, 1), turned to (-1, 0): score -ln 2 with frame 0
    y = on_cuda(qkv, "temporal", rope=(angles.cos(), angles.sin())).cpu()
    assert torch.allclose(y[0, 1, 9].float(), torch.tensor((6 / 2 + 12 + 24) / 2.5), rtol=2e-3)


# 2. to 4. Layouts, empty batches, what the op promises ----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slice", "heads first", "values first", "unaligned", "one frame of many"])
def test_layouts(layout: str, cuda_device: str) -> None:
    """What lies around the values is NaN and stays so."""
    qkv, kwargs = inputs(cuda_device, batch=2, frames=5, places=3, heads=2, size=24, rope=True)
    expected = on_cuda(qkv, "temporal", **kwargs)
    around = torch.full((2, 11, 6, 4, 3, 40), math.nan, dtype=qkv.dtype, device=cuda_device)
    if layout == "slice":
        view = around[:, 1:6, 2:5, :3, 1:3, 8:32]
    elif layout == "unaligned":
        view = around[:, 1:6, 2:5, :3, 1:3, 3:27]
    elif layout == "one frame of many":
        view = around[:, 1::2, 2:5, :3, 1:3, 8:32]
    elif layout == "heads first":
        view = torch.empty(2, 2, 3, 5, 3, 24, dtype=qkv.dtype, device=cuda_device).permute(0, 3, 4, 2, 1, 5)
    else:
        view = torch.empty(24, 2, 5, 3, 3, 2, dtype=qkv.dtype, device=cuda_device).permute(1, 2, 3, 4, 5, 0)
    view.copy_(qkv)
    assert torch.equal(on_cuda(view, "temporal", **kwargs), expected)
    view.fill_(math.nan)
    assert around.isnan().all()


def test_unaligned_tables(cuda_device: str) -> None:
    """cos and sin may be a part of a longer table."""
    qkv, kwargs = inputs(cuda_device, frames=5, places=3, heads=1, size=24, rope=True)
    longer = [torch.cat([torch.full((3,), math.nan, device=cuda_device), t.flatten()])[3:] for t in kwargs["rope"]]
    rope = tuple(t.view(5, 12) for t in longer)
    assert torch.equal(on_cuda(qkv, "temporal", **kwargs), on_cuda(qkv, "temporal", **(kwargs | {"rope": rope})))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_to_do(shape: tuple[int, int, int], cuda_device: str) -> None:
    qkv = torch.zeros(*shape, 3, 2, 8, dtype=torch.bfloat16, device=cuda_device)
    assert on_cuda(qkv, "temporal").shape == (shape[0], shape[1] * shape[2], 16)


def register_fake() -> None:
    if not hasattr(register_fake, "done"):
        torch.library.register_fake("javis_emulated::temporal_attention")(contract._temporal_shapes)
        register_fake.done = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_opcheck(permuted: bool, bare: bool, cuda_device: str) -> None:
    if cuda_device == "cpu":
        register_fake()
    qkv, kwargs = inputs(cuda_device, frames=5, places=2, heads=2, size=16, rope=True)
    if permuted:
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    weights, tables = torch.stack((kwargs["q_weight"], kwargs["k_weight"])).float(), kwargs["rope"]
    arguments = (qkv, None, None, None, 1e-6) if bare else (qkv, weights, *tables, 1e-6)
    op = torch.ops.javis_cuda.temporal_attention.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_op_refuses_what_the_api_never_sends(cuda_device: str) -> None:
    op = torch.ops.javis_cuda.temporal_attention
    qkv = torch.zeros(1, 4, 2, 3, 2, 8, dtype=torch.bfloat16, device=cuda_device)
    table = torch.zeros(4, 4, device=cuda_device)
    for arguments, message in (
        ((qkv.float(), None, None, None), "must be bfloat16 or float16"),
        ((qkv[:, :, :, :2], None, None, None), "no 3"),
        ((qkv[..., :4], None, None, None), "not a multiple of 8"),
        ((qkv.expand(1, 4, 2, 3, 2, 8).repeat(1, 33, 1, 1, 1, 1), None, None, None), "132 frames, at most 128"),
        ((qkv, torch.zeros(2, 7, device=cuda_device), None, None), "weights has size 7"),
        ((qkv, None, table, None), "both of cos and sin"),
        ((qkv, None, table, table.half()), "sin has the wrong dtype"),
        ((qkv, None, table[:, :3], table), "cos has size 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 1e-6)


def test_nothing_is_written_outside(cuda_device: str) -> None:
    if cuda_device == "cuda":
        pytest.skip("watches allocations of a CPU; on a GPU compute-sanitizer does this")
    for shape in (*SHAPES[1:3], SHAPES[6]):
        qkv, kwargs = inputs(**shape)
        with guarded() as borders:
            y = on_cuda(qkv, "temporal", **kwargs)
        assert not borders.touched() and borders.holds(y) and y.isfinite().all()


# 5. to 7. torch.compile and the choice -------------------------------------------------------------------------------


def test_compiles_to_one_graph(cuda_device: str) -> None:
    if cuda_device == "cpu":
        register_fake()
    torch.compiler.reset()
    qkv, kwargs = inputs(cuda_device, frames=3, places=2, heads=1, size=16, rope=True)
    compiled = torch.compile(on_cuda, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv, "temporal", **kwargs), on_cuda(qkv, "temporal", **kwargs))


def test_the_named_backend_is_the_one_that_runs(cuda_device: str) -> None:
    qkv, kwargs = inputs(cuda_device, frames=3, places=2, heads=1, size=16)
    namespace = "javis_emulated" if cuda_device == "cpu" else "javis_cuda"
    for function in (on_cuda, factorized_attention):  # auto takes it too
        assert ops_that_ran(partial(function, qkv, "temporal", **kwargs)) == [f"{namespace}::temporal_attention"]


@pytest.mark.parametrize(
    ("dtype", "axis", "frames", "size", "why"),
    [
        (torch.float32, "temporal", 2, 8, "no float32 kernel, only bfloat16, float16"),
        (torch.bfloat16, "spatial", 2, 8, "only the temporal axis"),
        (torch.bfloat16, "temporal", 129, 8, "129 frames, at most 128"),
        (torch.bfloat16, "temporal", 2, 12, "heads of 12 values, not a multiple of 8 up to 128"),
        (torch.bfloat16, "temporal", 2, 136, "heads of 136 values, not a multiple of 8 up to 128"),
    ],
)
def test_a_call_that_cannot_run_says_why(
    dtype: torch.dtype, axis: str, frames: int, size: int, why: str, cuda_device: str
) -> None:
    qkv = torch.zeros(1, frames, 2, 3, 1, size, dtype=dtype, device=cuda_device)
    with pytest.raises(UsageError, match=why):
        on_cuda(qkv, axis)


@needs_triton
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=lambda s: "-".join(map(str, s.values())))
def test_gradients_are_triton_s(shape: dict[str, Any], cuda_device: str) -> None:
    qkv, kwargs = inputs(cuda_device, **shape)
    weights = {name: kwargs[name].clone().requires_grad_() for name in ("q_weight", "k_weight")}
    leaves = [qkv.requires_grad_(), *weights.values()]
    y = on_cuda(qkv, "temporal", **(kwargs | weights))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    by_triton = factorized_attention(qkv, "temporal", **(kwargs | weights), backend="triton")
    for found, expected in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(by_triton, leaves, dy), strict=True
    ):
        assert torch.equal(found, expected)


def test_without_triton_a_gradient_is_left_to_others(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "HAS_TRITON", False)
    qkv, kwargs = inputs(cuda_device, frames=3, places=2, heads=1, size=16)
    with pytest.raises(UsageError, match="requires a gradient, whose kernel is Triton's: triton is not installed"):
        on_cuda(qkv.requires_grad_(), "temporal")
    weights = {name: kwargs[name].clone().requires_grad_() for name in ("q_weight", "k_weight")}
    with pytest.raises(UsageError, match="requires a gradient"):
        on_cuda(qkv.detach(), "temporal", **weights)
    with torch.no_grad():
        assert on_cuda(qkv, "temporal", **weights).isfinite().all()
    assert factorized_attention(qkv, "temporal").requires_grad


# 10. Offsets ----------------------------------------------------------------------------------------------------------


def test_offsets_beyond_two_to_the_31(cuda_device: str) -> None:
    """Samples 2^31 values apart and frames 2^30: on a CPU memory that is never touched costs nothing."""
    if cuda_device == "cuda" and torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of GPU memory")
    qkv, kwargs = inputs(cuda_device, batch=2, frames=3, places=2, heads=1, size=8)
    far = torch.empty(2**32 + 2**31 + 2**12, dtype=qkv.dtype, device=cuda_device)
    view = far.as_strided((2, 3, 2, 3, 1, 8), (2**31, 2**30, 24, 8, 8, 1)).copy_(qkv)
    # Samples overlap frames: sample 1 at 2^31 is frame 2 of sample 0.
    expected = qkv.clone()
    expected[0, 2] = qkv[1, 0]
    assert torch.equal(view, expected)
    assert torch.equal(on_cuda(view, "temporal", **kwargs), on_cuda(expected, "temporal", **kwargs))


def test_cuda_on_a_cpu_tensor_says_why() -> None:
    qkv, _ = inputs(frames=2, places=2, heads=1, size=8)
    with pytest.raises(UsageError, match="'cuda' cannot run this call: needs CUDA tensors, got one on cpu"):
        on_cuda(qkv, "temporal")
    meta = qkv.to("meta")
    assert native.WHY_NOT_CUDA is None or contract.why_not_cuda(meta, "temporal") is not None
