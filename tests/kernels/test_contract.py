"""What every op promises, whoever wrote it: names, docstrings, the table of backends, and what it refuses."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import javis.kernels
from javis.errors import UsageError
from javis.kernels import OPS, Backend, use_backend
from javis.kernels.backend import why_not
from javis.kernels.cases import OpCase
from javis.kernels.registry import MODEL_OPS, NAMES
from javis.model.ops import ModelOps

ROOT = Path(__file__).resolve().parents[2]
every_op = pytest.mark.parametrize("name", NAMES)
Call = tuple[tuple[Any, ...], dict[str, Any]]


def smallest(name: str) -> OpCase:
    return min(OPS[name].cases(), key=lambda case: case.bytes())


def backends_of(name: str) -> list[str]:
    """All names a call may give, those that cannot run here included: bad input is refused before the choice."""
    return ["auto", *(backend.value for backend in OPS[name].checks)]


# -- names and tables -------------------------------------------------------------------------------------------------


@every_op
def test_the_op_is_importable_under_its_name(name: str) -> None:
    assert getattr(javis.kernels, name) is OPS[name].function
    assert name in javis.kernels.__all__
    assert OPS[name].function.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="its ops are ada_layer_norm"):
        _ = javis.kernels.no_such_op


def test_kernels_import_without_triton() -> None:
    code = "import sys, javis.kernels; from javis.kernels import *; print('triton' in sys.modules, ada_layer_norm)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("False <function ada_layer_norm")


@every_op
def test_the_table_ends_with_the_reference(name: str) -> None:
    assert list(OPS[name].checks)[-1] is Backend.REFERENCE
    assert Backend.AUTO not in OPS[name].checks
    args, kwargs = smallest(name).inputs()
    assert why_not(OPS[name].checks, Backend.REFERENCE, *args, *kwargs.values()) is None


@every_op
def test_cases_have_names_of_their_own(name: str) -> None:
    cases = OPS[name].cases()
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.op == name for case in cases)  # type: ignore[attr-defined]
    assert all(case.bytes() > 0 and case.flops() > 0 for case in cases)


@every_op
def test_the_docstring_is_the_contract(name: str) -> None:
    function = OPS[name].function
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{name}: no {section}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", text.partition("Args:")[2]), f"{name}: {parameter} is not described"
    assert re.search(r"\[\w+(, \w+)+", text), f"{name}: no shape"
    assert "ValueError" in text and "UsageError" in text, f"{name}: what raises"


@every_op
def test_the_signature_is_that_of_the_model(name: str) -> None:
    """... plus ``backend``, so that the model's blocks can call either."""
    assert OPS[name].function.__kwdefaults__["backend"] is Backend.AUTO
    if name not in MODEL_OPS:
        pytest.skip(f"{name} is no op of the model: no signature to compare with")

    def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    ours = [p for p in parameters(OPS[name].function) if p[0] != "backend"]
    assert ours == parameters(getattr(ModelOps(), name))


# -- the choice -------------------------------------------------------------------------------------------------------


@every_op
def test_a_name_that_is_no_backend_raises(name: str) -> None:
    args, kwargs = smallest(name).inputs()
    for wrong in ("", "gpu", "Auto", "CPU"):
        with pytest.raises(UsageError, match=rf"unknown backend '{wrong}': expected one of auto, "):
            OPS[name].function(*args, **kwargs, backend=wrong)


@every_op
def test_a_named_backend_that_cannot_run_raises_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    args, kwargs = smallest(name).inputs()
    refused = 0
    for backend in Backend:
        reason = why_not(OPS[name].checks, backend, *args, *kwargs.values())
        if backend is Backend.AUTO or reason is None:
            continue
        refused += 1
        with pytest.raises(UsageError, match=re.escape(f"{name}: backend {backend.value!r} cannot run this call: ")):
            OPS[name].function(*args, **kwargs, backend=backend.value)
        with use_backend(backend):
            if backend in OPS[name].checks:
                with pytest.raises(UsageError, match="cannot run this call"):
                    OPS[name].function(*args, **kwargs)
            else:  # a default is for the ops that have it
                OPS[name].function(*args, **kwargs)
        assert reason.strip() and "\n" not in reason
    assert refused > 0 or torch.cuda.is_available()


# -- bad input --------------------------------------------------------------------------------------------------------


def bad_calls(case: OpCase) -> Iterator[tuple[str, Call]]:
    """The call with one tensor spoilt in one way; what is wrong with it must not depend on the values."""
    args, kwargs = case.inputs()
    places: list[Any] = [*range(len(args)), *kwargs]
    for place in places:
        value = args[place] if isinstance(place, int) else kwargs[place]
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        wrong = {
            "one dimension more": value[None],
            "one dimension less": value[0],
            "one more in the last dimension": torch.cat((value, value[..., :1]), dim=-1),
        }
        if place in getattr(case, "free_last_axis", ()):  # any size of this axis is valid
            del wrong["one more in the last dimension"]
        if value.is_floating_point():
            wrong |= {"whole numbers": value.long(), "complex": torch.complex(value.float(), value.float())}
        else:
            wrong |= {"not a mask": value.to(torch.complex64)}
        if len(places) > 1:
            wrong |= {"another device": value.to("meta")}
        for what, spoilt in wrong.items():
            if isinstance(place, int):
                yield f"{case.name}, argument {place}: {what}", ((*args[:place], spoilt, *args[place + 1 :]), kwargs)
            else:
                yield f"{case.name}, {place}: {what}", (args, kwargs | {place: spoilt})


@every_op
def test_bad_input_is_a_value_error_from_every_backend(name: str) -> None:
    messages: dict[str, set[str]] = {}
    # The smallest case of each set of options; large ones would take long to make.
    ordered = sorted(OPS[name].cases(), key=lambda case: -case.bytes())
    cases = {tuple(c.inputs()[1]): c for c in ordered if c.bytes() < 40e6 or c is ordered[-1]}
    for what, (args, kwargs) in (bad for case in cases.values() for bad in bad_calls(case)):
        for backend in backends_of(name):
            try:
                OPS[name].function(*args, **kwargs, backend=backend)
            except ValueError as error:
                messages.setdefault(what, set()).add(str(error))
            else:
                pytest.fail(f"{name}, {backend}: {what} went through")
    assert messages
    for what, said in messages.items():
        assert len(said) == 1, f"{what}: backends answer differently: {said}"
