"""Rows make a table, the table makes ``auto`` choose: deterministic, and refused where it is not what it should be."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from javis.errors import UsageError
from javis.kernels import OPS, choices, native
from javis.kernels.backend import Backend, Check, select, use_backend

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "benchmarks/choices.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks.choices import make, rank, written  # noqa: E402

HERE = choices.device_class("cpu")
OP = "ada_layer_norm"


def call(tokens: int = 6, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Any, ...]:
    x, vector = torch.randn(1, tokens, 40, dtype=dtype, requires_grad=grad), torch.randn(1, 40, dtype=dtype)
    return x, vector, vector


def key(*args: Any) -> str:
    return choices.bucket_of(OPS[OP].function, OPS[OP].checks, args, {})


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(measured: Any) -> None:
        table = choices.parse(json.dumps({"format": 1, "measured": measured}), "made up")
        monkeypatch.setattr(choices, "_measured", table)
        monkeypatch.setattr(choices, "_found", {})

    return install


def chosen(*args: Any) -> Backend:
    """What auto takes for this call, found out as the op does it."""
    seen = []

    def spy(*seen_args: Any) -> str | None:
        seen.append(seen_args)
        return None

    checks = dict(OPS[OP].checks)
    key(*args)  # the op accepts the call
    full = (*args, None, None, None)
    return select(OP, {**checks, Backend.REFERENCE: spy}, *full, backend="auto")


def row(case: str, backend: str, ms: float, **more: Any) -> dict[str, Any]:
    about = {"op": OP, "case": case, "mode": "forward", "bucket": key(*call()), "device_class": HERE, "commit": "a"}
    return about | {"device": "D", "date": "d", "load": 0.1, "threads": 1, "backend": backend, "p50_ms": ms} | more


def test_calls_of_about_one_size_share_a_bucket() -> None:
    assert key(*call(5)) == key(*call(8)) == "inference float32[1,8,40] float32[1,40] float32[1,40] - - -"
    assert key(*call(9)) != key(*call(8))
    assert key(*call(dtype=torch.bfloat16)) != key(*call())
    assert key(*call(grad=True)).startswith("training ")
    with torch.no_grad():
        assert key(*call(grad=True)) == key(*call())


def test_the_bucket_of_every_case_is_that_of_its_call() -> None:
    """The bucket is found without computing: the reference is in its place again afterwards."""
    for name, op in OPS.items():
        case = min(op.cases(), key=lambda case: case.bytes())
        args, kwargs = case.inputs()
        before = op.checks[Backend.REFERENCE]
        found = choices.bucket_of(op.function, op.checks, args, kwargs)
        assert op.checks[Backend.REFERENCE] is before, name
        assert found.startswith("inference ") and str(case.dtype).removeprefix("torch.") in found, name


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
def test_rows_to_table_to_choice(use: Any) -> None:
    assert chosen(*call()) is Backend.CPU  # the default order of the op
    rows = [row("c", "eager", 0.1), row("c", "cpu", 3.0), row("c", "reference", 2.0), row("c", "copy", 0.5)]
    table = make(rows)
    assert table == {"format": 1, "measured": {HERE: {OP: {key(*call()): ["reference", "cpu"]}}}}
    use(table["measured"])
    assert chosen(*call()) is Backend.REFERENCE
    assert chosen(*call(8)) is Backend.REFERENCE  # the same bucket
    assert chosen(*call(100)) is Backend.REFERENCE  # near enough
    assert chosen(*call(200)) is Backend.CPU  # nobody measured anything like that
    assert chosen(*call(dtype=torch.bfloat16)) is Backend.CPU
    assert chosen(*call(grad=True)) is Backend.CPU  # nor training
    with use_backend("cpu"):
        assert chosen(*call()) is Backend.CPU  # a name is a name


def test_the_nearest_measurement_counts(use: Any) -> None:
    """Octaves by hand; a width, a dtype, an argument that is not given are other calls."""
    one = "inference bfloat16[1,2,1024,3,16,72] spatial float32[72] - +"
    assert choices.distance(one, one) == 0
    assert choices.distance(one, one.replace("[1,2,1024", "[2,16,1024")) == 1 + 3
    assert choices.distance(one, one.replace("[1,2,1024", "[1,1,4096")) == 1 + 2
    for other in ("training", "spatial", "bfloat16", "72", "-"):
        changed = {"training": ("inference", "training"), "spatial": ("spatial", "temporal")}.get(other)
        text = one.replace(
            *(changed or (other, {"bfloat16": "float32", "72": "64", "-": "float32[72]"}.get(other, "")))
        )
        assert text != one and choices.distance(one, text) == math.inf, text
    assert choices.distance("inference float32[0,40]", "inference float32[1,40]") == math.inf
    assert choices.distance("inference float32[4,8,3] float32[4,3]", "inference float32[2,8,3] float32[2,3]") == 1
    use({HERE: {OP: {key(*call(1)): ["reference", "cpu"], key(*call(16)): ["cpu", "reference"]}}})
    assert [chosen(*call(tokens)) for tokens in (2, 8)] == [Backend.REFERENCE, Backend.CPU]


def test_a_measured_backend_that_cannot_run_is_passed_by(use: Any) -> None:
    measured = {"inference float32[1]": ["flash_attn", "reference"]}
    use({HERE: {"op": measured, "changed op": measured}})
    checks: dict[Backend, Check] = {
        Backend.FLASH_ATTN: lambda *_: "not installed",
        Backend.SDPA: lambda *_: None,
        Backend.REFERENCE: lambda *_: None,
    }
    assert select("op", checks, torch.zeros(1), backend="auto") is Backend.REFERENCE
    checks = {Backend.CPU: lambda *_: None, Backend.SDPA: lambda *_: None}  # neither is in the op's table any more
    assert select("changed op", checks, torch.zeros(1), backend="auto") is Backend.CPU


def test_looked_up_once_per_shape(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use({HERE: {OP: {key(*call()): ["reference", "cpu"]}}})
    counted = []
    monkeypatch.setattr(choices, "bucket", lambda args: counted.append(1) or "none such")
    for _ in range(3):
        chosen(*call())
    for _ in range(3):
        choices.order("another op", OPS[OP].checks, call())
    # chosen() asks for the bucket once itself, to check the call; the choice asks once in all.
    assert len(counted) == 3 + 1


def test_the_choice_holds_in_compiled_code(use: Any) -> None:
    checks: dict[Backend, Check] = {Backend.CPU: lambda *_: None, Backend.REFERENCE: lambda *_: None}
    use({HERE: {"op": {"inference float32[4,3]": ["reference", "cpu"]}}})

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if select("op", checks, x, backend="auto") is Backend.REFERENCE else x - 1

    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(compiled(torch.zeros(4, 3)), torch.ones(4, 3))
    assert torch.equal(compiled(torch.zeros(5, 3)), torch.ones(5, 3))
    assert torch.equal(compiled(torch.zeros(100, 3)), -torch.ones(100, 3))


def test_only_the_newest_run_counts_and_noise_does_not() -> None:
    old = [
        row("c", "cpu", 3.0, commit="old"),
        row("c", "triton", 1.0, commit="old"),
        row("c", "reference", 2.0, commit="old"),
    ]
    new = [row("c", "cpu", 3.0), row("c", "reference", 2.0)]
    bucket = key(*call())
    assert make([*old, *new])["measured"][HERE][OP][bucket] == ["reference", "cpu"]
    again = [row("c", "cpu", 1.0), row("c", "reference", 2.0)]  # a second run of the same commit on the same day
    assert make([*old, *new, *again])["measured"][HERE][OP][bucket] == ["cpu", "reference"]
    order = list(OPS[OP].checks)
    assert rank([{"cpu": 1.02, "reference": 1.0}], order) == ["cpu", "reference"]
    assert rank([{"cpu": 1.04, "reference": 1.0}], order) == ["reference", "cpu"]
    # Two cases in a bucket: twice as fast in one and a third slower in the other is faster. Who lacks a case is out.
    two = [{"cpu": 2.0, "reference": 1.0, "triton": 0.1}, {"cpu": 1.0, "reference": 1.33}]
    assert rank(two, order) == ["reference", "cpu"]
    assert make([row("c", "cpu", 1.0)])["measured"] == {}
    assert (
        make([row("c", "cpu", 1.0, mode="backward"), {"bench": "other"}, row("c", "x", 1.0, op="gone")])["measured"]
        == {}
    )


def test_the_file_is_readable_and_the_same_for_the_same_rows() -> None:
    rows = [
        row("c", "cpu", 3.0),
        row("c", "reference", 2.0),
        row("d", "cpu", 1.0, bucket="inference x"),
        row("d", "reference", 2.0, bucket="inference x"),
    ]
    text = written(make(rows))
    assert text == written(make(rows[2:] + rows[:2]))
    assert f'"{key(*call())}": ["reference", "cpu"]' in text
    assert choices.parse(text, "t") == choices.parse(json.dumps(make(rows)), "t")


def test_the_committed_table_is_what_the_committed_rows_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.choices", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + "run `python -m benchmarks.choices`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", 'expected an object with "format": 1'),
        ('{"format": 2, "measured": {}}', 'expected an object with "format": 1'),
        ('{"format": 1}', 'expected "format" and "measured"'),
        ('{"format": 1, "measured": {"sm_90": []}}', "'sm_90' must hold one object of buckets"),
        (
            '{"format": 1, "measured": {"sm_90": {"op": {"b": "cpu"}}}}',
            "must be a list of different backends, got 'cpu'",
        ),
        ('{"format": 1, "measured": {"sm_90": {"op": {"b": []}}}}', "must be a list of different backends"),
        ('{"format": 1, "measured": {"sm_90": {"op": {"b": ["cpu", "cpu"]}}}}', "must be a list of different backends"),
        (
            '{"format": 1, "measured": {"sm_90": {"op": {"b": ["fast"]}}}}',
            "sm_90, op, 'b' names the unknown backend 'fast'",
        ),
        ('{"format": 1, "measured": {"sm_90": {"op": {"b": ["auto"]}}}}', "unknown backend 'auto'"),
    ],
)
def test_a_bad_table_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choices.parse(text, "some.json")
    assert message in str(caught.value)
    assert "some.json is no table of measured choices" in str(caught.value)
    assert "python -m benchmarks.choices" in str(caught.value)


@pytest.mark.parametrize("content", ["nonsense", None, "none"])
def test_the_environment_names_another_table(content: str | None, tmp_path: Path) -> None:
    """The package imports with a bad table and named backends run; ``auto`` says what is wrong with it."""
    path = "none" if content == "none" else str(tmp_path / "table.json")
    if content == "nonsense":
        Path(path).write_text(content)
    code = (
        "import torch\n"
        "from javis.kernels import ada_layer_norm\n"
        "x, v = torch.zeros(1, 2, 8), torch.zeros(1, 8)\n"
        "ada_layer_norm(x, v, v, backend='reference')\n"
        "ada_layer_norm(x, v, v)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAVIS_CHOICES": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if content == "none":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert "UsageError" in done.stderr.splitlines()[-1] and path in done.stderr.splitlines()[-1]
