"""Shared by the tests of the ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from javis.kernels import backend, native
from javis.kernels.triton_support import HAS_TRITON
from tests.kernels.emulation import emulated_ops, needs_emulator


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill what ``torch.empty`` and ``new_empty`` return with NaN: a value the kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def several_rows_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Triton kernels of the norms do on large inputs, on small ones.

    4 rows per forward program, 2 per partial sum; the last program has fewer.
    """
    if HAS_TRITON:
        from javis.kernels.ops.ada_layer_norm import triton_impl

        monkeypatch.setattr(triton_impl, "forward_rows_per_program", lambda tokens: 4)
        monkeypatch.setattr(triton_impl, "backward_rows_per_program", lambda tokens, places: 2)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=needs_emulator, id="emulated"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
                pytest.mark.skipif(native.WHY_NOT_CUDA is not None, reason=str(native.WHY_NOT_CUDA)),
            ],
            id="gpu",
        ),
    ]
)
def cuda_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of tensors that backend="cuda" takes: a CPU, where the emulator runs the kernels, and a GPU."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.ops, "javis_cuda", emulated_ops(), raising=False)
        monkeypatch.setattr(native, "WHY_NOT_CUDA", None)
        monkeypatch.setattr(native, "CUDA_DEVICE", "cpu")
        monkeypatch.setattr(backend, "_ELSEWHERE", {})  # the emulator stands for a GPU, on CPU tensors
    device: str = request.param
    return device
