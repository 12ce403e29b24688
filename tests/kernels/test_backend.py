"""The choice of a backend, on made-up checks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from javis.errors import UsageError
from javis.kernels import OPS, backend
from javis.kernels.backend import Backend, Check, select, use_backend, why_not, why_not_auto


def table(**reasons: str | None) -> dict[Backend, Check]:
    return {Backend(name): (lambda *_, reason=reason: reason) for name, reason in reasons.items()}


def test_auto_takes_the_first_that_can() -> None:
    assert select("op", table(cuda="no GPU", triton=None, reference=None), backend="auto") is Backend.TRITON
    assert select("op", table(cuda="no GPU", triton="old", reference=None), backend="auto") is Backend.REFERENCE


def test_a_named_backend_never_falls_back() -> None:
    checks = table(cuda="no GPU here", cpu=None, reference=None)
    assert select("op", checks, backend="cpu") is Backend.CPU
    with pytest.raises(UsageError, match=r"op: backend 'cuda' cannot run this call: no GPU here; use .*cpu, reference"):
        select("op", checks, backend="cuda")
    with pytest.raises(UsageError, match="no such implementation"):
        select("op", checks, backend=Backend.SDPA)


def test_checks_see_the_call() -> None:
    checks: dict[Backend, Check] = {
        Backend.CPU: lambda size: None if size < 10 else f"size {size} is too large",
        Backend.REFERENCE: lambda size: None,
    }
    assert select("op", checks, 3, backend="auto") is Backend.CPU
    assert select("op", checks, 30, backend="auto") is Backend.REFERENCE
    assert why_not(checks, Backend.CPU, 30) == "size 30 is too large"


def test_auto_never_takes_an_interpreted_kernel(caplog: pytest.LogCaptureFixture) -> None:
    checks, x = table(cuda="no GPU", triton=None, cpu="not built", reference=None), torch.zeros(2)
    with caplog.at_level(logging.INFO, logger="javis.kernels.backend"):
        assert select("op on a CPU", checks, x, backend="auto") is Backend.REFERENCE
        assert select("op on a CPU", checks, None, x, backend="auto") is Backend.REFERENCE
    assert "triton (on a CPU only in Triton's interpreter" in caplog.text
    assert select("op on a CPU", checks, x, backend="triton") is Backend.TRITON
    with use_backend("triton"):
        assert select("op on a CPU", checks, x, backend="auto") is Backend.TRITON
    elsewhere = torch.zeros(2, device="meta")  # stands for any other device: the check alone decides there
    assert select("op on a CPU", checks, elsewhere, backend="auto") is Backend.TRITON


def test_use_backend_nests_and_ends_with_its_block() -> None:
    checks = table(cuda="no GPU", cpu=None, reference=None)
    with use_backend("reference"):
        assert select("op", checks, backend="auto") is Backend.REFERENCE
        with use_backend("auto"):
            assert select("op", checks, backend="auto") is Backend.CPU
        assert select("op", checks, backend="cpu") is Backend.CPU
        with pytest.raises(RuntimeError, match="inside"), use_backend("cuda"):
            raise RuntimeError("inside")
        assert select("op", checks, backend="auto") is Backend.REFERENCE
    assert select("op", checks, backend="auto") is Backend.CPU
    with use_backend("cuda"), pytest.raises(UsageError, match="no GPU"):
        select("op", checks, backend="auto")


def test_a_default_is_for_the_ops_that_have_it(caplog: pytest.LogCaptureFixture) -> None:
    checks = table(cuda="no GPU", triton=None, reference=None)
    with caplog.at_level(logging.INFO, logger="javis.kernels.backend"), use_backend("cpu"):
        for _ in range(2):
            assert select("op without a CPU kernel", checks, backend="auto") is Backend.TRITON
        with pytest.raises(UsageError, match="backend 'cpu' cannot run this call: this op has no such implementation"):
            select("op without a CPU kernel", checks, backend="cpu")  # named by the call: runs or raises
        with pytest.raises(UsageError, match="backend 'cpu' cannot run this call: not built"):
            select("op with one", table(cpu="not built", reference=None), backend="auto")
    assert [r.getMessage() for r in caplog.records if "no cpu" in r.getMessage()] == [
        "op without a CPU kernel: has no cpu implementation, so that default leaves it at auto"
    ]


def test_an_unknown_name_lists_the_valid_ones() -> None:
    for attempt in (lambda: select("op", table(reference=None), backend="gpu"), lambda: use_backend("gpu").__enter__()):
        with pytest.raises(UsageError, match=r"unknown backend 'gpu': expected one of auto, cuda, triton, cpu"):
            attempt()


def test_auto_explains_itself_once(caplog: pytest.LogCaptureFixture) -> None:
    checks = table(cuda="no GPU", cpu=None, reference=None)
    with caplog.at_level(logging.INFO, logger="javis.kernels.backend"):
        for _ in range(3):
            select("op that explains itself", checks, backend="auto")
    assert [record.getMessage() for record in caplog.records] == [
        "op that explains itself: auto runs cpu; not cuda (no GPU)"
    ]


def test_tensors_on_two_devices_are_refused_before_the_choice() -> None:
    x, elsewhere = torch.zeros(2), torch.zeros(3, device="meta")
    for named in ("auto", "cpu", "cuda"):
        with pytest.raises(ValueError, match=r"op: expected all tensors on cpu like the first, got \(3,\) on meta"):
            select("op", table(cuda="no GPU", cpu=None, reference=None), x, None, elsewhere, backend=named)
    scalar = torch.tensor(1.0)  # a CPU scalar goes with every device, as in PyTorch
    assert select("op", table(cpu=None, reference=None), scalar, elsewhere, scalar, backend="auto") is Backend.CPU


def test_a_broken_table_is_found() -> None:
    with pytest.raises(AssertionError, match="must accept every valid call"):
        select("op", table(reference="tired"), backend="auto")


def test_every_op_ends_with_its_reference() -> None:
    for name, op in OPS.items():
        assert list(op.checks)[-1] is Backend.REFERENCE, name
        args, kwargs = op.cases()[0].inputs()
        assert why_not(op.checks, Backend.REFERENCE, *args, *kwargs.values()) is None, name


@pytest.mark.parametrize(("value", "expected"), [("reference", 0), ("nonsense", 1), ("", 0)])
def test_environment_variable(value: str, expected: int) -> None:
    code = "from javis.kernels import backend; print(backend._default.value)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"JAVIS_BACKEND": value},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expected, done.stderr
    if expected == 0:
        assert done.stdout.strip() == (value or "auto")
    else:
        assert "unknown backend 'nonsense'" in done.stderr


@pytest.mark.parametrize("name", OPS)
def test_what_auto_does_not_ask_about_would_have_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors, of every op: the backends that are passed over refuse the call, so the choice is the same."""
    op = OPS[name]
    case = min(op.cases(), key=lambda case: case.bytes())
    args, kwargs = case.inputs()
    seen: list[tuple[object, ...]] = []
    checks = op.checks
    assert isinstance(checks, dict)
    monkeypatch.setitem(checks, Backend.REFERENCE, lambda *call: seen.append(call))
    op.function(*args, **kwargs, backend="reference")
    skipped = backend._ELSEWHERE["cpu"] & set(checks)
    for candidate in skipped:
        assert why_not_auto(checks, candidate, *seen[0]) is not None, candidate
    chosen = select(name, checks, *seen[0], backend="auto")
    monkeypatch.setattr(backend, "_ELSEWHERE", {})
    assert select(name, checks, *seen[0], backend="auto") is chosen
