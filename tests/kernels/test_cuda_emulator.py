"""The emulator itself: that its matrix fragments, shuffles and conversions are the PTX ISA's, and what it reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulation import NVCC, ROOT, Emulated, OnGpu, emulate, needs_emulator

SOURCE = Path(__file__).parent / "cuda/primitives.cu"
pytestmark = needs_emulator


@pytest.fixture
def primitives() -> Emulated:
    emulated = emulate(SOURCE)
    emulated.order(0)
    return emulated


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> OnGpu:
    return OnGpu(SOURCE, tmp_path_factory.mktemp("primitives"))


@pytest.fixture(
    params=[
        pytest.param("primitives", id="emulated"),
        pytest.param(
            "compiled",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
                pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
            ],
            id="gpu",
        ),
    ]
)
def both(request: pytest.FixtureRequest) -> Emulated:
    """The emulator, and on a GPU the instructions themselves: that the one does what the others do."""
    found: Emulated = request.getfixturevalue(request.param)
    return found


def pairs(low: Tensor, high: Tensor) -> Tensor:
    """Two 16-bit values in one register, the first in the low half."""
    return torch.stack([low, high], -1).contiguous().view(torch.int32)[..., 0]


# The layouts as the PTX ISA states them (section "Matrix Fragments for mma.m16n8k16 with floating point type"), value
# by value: for element i of lane l, groupID = l >> 2 and t = l % 4,
#   a_i: row groupID for i in {0, 1, 4, 5}, else groupID + 8; column t * 2 + (i & 1), plus 8 for i >= 4
#   b_i: row t * 2 + (i & 1), plus 8 for i >= 2; column groupID
#   c_i: row groupID for i < 2, else groupID + 8; column t * 2 + (i & 1)


def a_fragments(a: Tensor) -> Tensor:
    """[16, K] -> registers [32, K / 4]."""
    registers = []
    for lane in range(32):
        group, t = lane >> 2, lane % 4
        values = []
        for i in range(a.shape[1] // 2):
            row = group if i in (0, 1, 4, 5) else group + 8
            values.append(a[row, t * 2 + (i & 1) + (8 if i >= 4 else 0)])
        registers.append(pairs(torch.stack(values[::2]), torch.stack(values[1::2])))
    return torch.stack(registers)


def b_fragments(b: Tensor) -> Tensor:
    """[K, 8] -> registers [32, K / 8]."""
    registers = []
    for lane in range(32):
        group, t = lane >> 2, lane % 4
        values = [b[t * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(b.shape[0] // 4)]
        registers.append(pairs(torch.stack(values[::2]), torch.stack(values[1::2])))
    return torch.stack(registers)


def c_places() -> tuple[Tensor, Tensor]:
    """Row and column of each of [32, 4] accumulators."""
    lane, i = torch.arange(32)[:, None], torch.arange(4)[None]
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [16, 8])
def test_mma_is_a_matrix_product_in_the_layout_of_the_ptx_isa(both: Emulated, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    a = torch.randn(16, k, generator=generator).to(dtype)
    b = torch.randn(k, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    rows, columns = c_places()
    d = c[rows, columns].contiguous()
    both.plain("javis_test_mma", a_fragments(a), b_fragments(b), d, k, int(dtype == torch.bfloat16))
    expected = c.double() + a.double() @ b.double()
    torch.testing.assert_close(d.double(), expected[rows, columns], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(both: Emulated, count: int, transposed: bool) -> None:
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, count, dtype=torch.int32)
    both.plain("javis_test_ldmatrix", matrices, out, count, int(transposed))
    for matrix in range(count):
        expected = matrices[matrix].T if transposed else matrices[matrix]
        for lane in range(32):
            low, high = out[lane, matrix].item() & 0xFFFF, out[lane, matrix].item() >> 16
            assert [low, high] == expected[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffles_and_reductions(both: Emulated, seed: int) -> None:
    both.order(seed)
    x = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(8, 32)
    both.plain("javis_test_shuffles", x, out)
    lane = torch.arange(32)
    torch.testing.assert_close(out[0], x[lane ^ 5], rtol=0, atol=0)
    torch.testing.assert_close(out[1], x[(3 * lane) % 32], rtol=0, atol=0)
    torch.testing.assert_close(out[2], x[torch.where(lane + 4 < 32, lane + 4, lane)], rtol=0, atol=0)
    torch.testing.assert_close(out[3], x.sum().expand(32))
    torch.testing.assert_close(out[4], x.view(8, 4).sum(1).repeat_interleave(4))
    torch.testing.assert_close(out[5], x.view(4, 8).amax(1).repeat_interleave(8), rtol=0, atol=0)
    torch.testing.assert_close(out[6], x.amax().expand(32), rtol=0, atol=0)
    assert not out[7].any()
    x[11] = float("nan")
    both.plain("javis_test_shuffles", x, out)
    assert out[6].isnan().all() and out[3].isnan().all()


def test_conversions_are_those_of_torch(both: Emulated) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.randn(2000, generator=generator) * 10.0 ** torch.randint(-9, 6, (2000,), generator=generator),
            torch.arange(-500, 500) / 4,  # ties of e4m3
            torch.arange(-64, 64) * 2.0**-11,  # its subnormal numbers
            torch.arange(-2050, 2050) + 0.5,  # ties of bfloat16 and float16
            torch.tensor([0.0, -0.0, 448.0, 464.0, 1e30, -1e30, 65504.0, 65519.0, 65520.0, 2.0**-25, 3.0 * 2.0**-26]),
            torch.tensor([float("inf"), -float("inf")]),
        ]
    ).float()
    as_bf16, as_fp16 = torch.zeros_like(x, dtype=torch.bfloat16), torch.zeros_like(x, dtype=torch.float16)
    as_e4m3, from_fp16 = torch.zeros(x.numel(), dtype=torch.uint8), torch.zeros_like(x)
    both.plain("javis_test_conversions", x, as_bf16, as_fp16, as_e4m3, from_fp16, x.numel())
    torch.testing.assert_close(as_bf16, x.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(as_fp16, x.half(), rtol=0, atol=0)
    torch.testing.assert_close(from_fp16, x.half().float(), rtol=0, atol=0)
    # Saturates, which torch's conversion by itself does not do everywhere.
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(as_e4m3, expected)
    nan = torch.full((1,), float("nan"))
    both.plain("javis_test_conversions", nan, as_bf16, as_fp16, as_e4m3, from_fp16, 1)
    assert as_bf16[0].isnan() and as_fp16[0].isnan() and from_fp16[0].isnan()
    assert as_e4m3[:1].view(torch.float8_e4m3fn).float().isnan()


def test_a_forgotten_barrier_shows(primitives: Emulated) -> None:
    x, out = torch.randn(96), torch.zeros(96)
    for seed in range(3):
        primitives.order(seed)
        primitives.plain("javis_test_reverse", x, out, 96, 1)
        assert torch.equal(out, x.flip(0))
        primitives.plain("javis_test_reverse", x, out, 96, 0)
        assert out.isnan().any()  # shared memory starts as NaN


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "shuffle_.*: another lane of the warp is in shuffle_"),
        (1, "deadlock: waits in __syncthreads in thread .*1 of 32 have left"),
        (2, r"load16: address not divisible by 16 in thread \(0, 0, 0\) of block \(0, 0, 0\)"),
        (3, "load16: outside the buffers of this call"),
    ],
    ids=["divergence", "early exit", "unaligned", "outside"],
)
def test_mistakes_are_reported(primitives: Emulated, kind: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        primitives.plain("javis_test_mistakes", torch.randn(32), torch.zeros(32), kind)


def test_a_copy_that_nobody_waited_for_is_not_there(primitives: Emulated) -> None:
    out = torch.zeros(32)
    primitives.plain("javis_test_mistakes", torch.randn(32), out, 4)
    assert out.isnan().all()


def test_too_large_a_block_is_refused(primitives: Emulated) -> None:
    with pytest.raises(RuntimeError, match="1 to 1024 threads"):
        primitives.plain("javis_test_reverse", torch.zeros(1), torch.zeros(1), 1056, 1)


# All kernels in several shapes and layouts; what the ops promise PyTorch needs no second look.
SANITIZED = "(emulated and (budget or nearest or layouts)) or test_cuda_emulator"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("JAVIS_EMULATE_SANITIZE") == "1", reason="this is the run it starts")
def test_kernels_are_clean_under_the_sanitizers() -> None:
    """The tests of the emulated kernels once more, with every access checked by the address sanitizer."""
    preload = []  # the C++ library too: the sanitizer looks for its exceptions when Python starts
    for name in ("libasan.so", "libstdc++.so.6"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        preload.append(found.stdout.strip())
    if not all(Path(library).is_file() for library in preload):
        pytest.skip("g++ has no address sanitizer here")
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_cuda_*.py"))
    options = {"JAVIS_EMULATE_SANITIZE": "1", "LD_PRELOAD": " ".join(preload)}
    options["ASAN_OPTIONS"] = "detect_leaks=0:verify_asan_link_order=0"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SANITIZED, *files],
        cwd=ROOT,
        env=os.environ | options,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
