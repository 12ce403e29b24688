"""Shared by the tests of the ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from javis.kernels.triton_support import HAS_TRITON


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
