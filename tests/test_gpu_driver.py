"""The driver of ``make gpu``: what it remembers, what it survives, and that its commands exist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks/gpu/__main__.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks import decode, end_to_end, feeding, ladder  # noqa: E402
from benchmarks.gpu import __main__ as driver  # noqa: E402
from benchmarks.gpu import calls, measure, probe, report, sections  # noqa: E402
from benchmarks.gpu.sections import ORDER, Context, Step  # noqa: E402
from javis.kernels.registry import NAMES  # noqa: E402

H100: dict[str, Any] = {
    "gpu": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory_gib": 79.1, "cuda": "13.0", "python": "3.12.3",
    "machine": "x86_64", "cores": 16, "smi": "fine", "problem": None,
    "packages": {name: "1.0" for name in probe.PACKAGES}, "programs": {name: f"/bin/{name}" for name in probe.PROGRAMS},
}  # fmt: skip
Main = Callable[..., int]


def shell(name: str, code: str, **options: Any) -> Step:
    return Step(name=name, command=("sh", "-c", code), **options)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """The driver on made-up steps: ``main(env=[...], build=[...])``."""

    def run(*arguments: str, facts: dict[str, Any] = H100, **made: list[Step]) -> int:
        monkeypatch.setattr(driver, "probe", lambda python: facts)
        monkeypatch.setattr(driver, "steps", lambda name, context: made.get(name, []))
        monkeypatch.setattr(driver, "fingerprint", lambda facts, dry: "same")
        chosen = [] if "--section" in arguments else ["--section", *made]
        return driver.main([*arguments, *chosen, "--out", str(tmp_path)])

    return run


def notes(tmp_path: Path, section: str) -> dict[str, str]:
    kept = json.loads((tmp_path / f"{section}.json").read_text())["steps"]
    return {name: facts["status"] for name, facts in kept.items()}


def test_a_failure_does_not_stop_the_rest_and_only_it_runs_again(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "ran"
    first = [
        shell("a", f"echo a >> {log}"),
        shell("b", f"echo b >> {log}; echo broken; exit 3"),
        shell("c", f"echo c >> {log}"),
    ]
    second = [shell("d", f"echo d >> {log}"), shell("e", "exit 1", skip="no such tool")]
    assert main(tests=first, kernels=second) == 1
    assert log.read_text().split() == ["a", "b", "c", "d"]
    said = capsys.readouterr().out
    assert "tests: b: failed in" in said and "(exit 3)" in said and "    broken" in said
    assert "kernels: e: SKIPPED: no such tool" in said and "not done: tests" in said
    assert notes(tmp_path, "tests") == {"a": "ok", "b": "failed", "c": "ok"}
    assert notes(tmp_path, "kernels") == {"d": "ok", "e": "skipped"}
    assert main(tests=[first[0], shell("b", f"echo repaired >> {log}"), first[2]], kernels=second) == 0
    assert log.read_text().split() == ["a", "b", "c", "d", "repaired"]
    assert main("--fresh", kernels=second) == 0
    assert log.read_text().split()[-1] == "d" and log.read_text().split().count("d") == 2


def test_a_step_that_hangs_is_ended_with_all_it_started(main: Main, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    hanging = shell("hangs", f"(while true; do touch {alive}; sleep 0.1; done) & sleep 60", seconds=1.0)
    started = time.monotonic()
    assert main(model=[hanging, shell("next", "true")]) == 1
    assert time.monotonic() - started < 30
    assert notes(tmp_path, "model") == {"hangs": "timeout", "next": "ok"}
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_a_section_stops_at_its_limit_and_goes_on_later(main: Main, tmp_path: Path) -> None:
    steps = [shell("slow", "sleep 1.2", seconds=5.0), shell("late", "true", seconds=5.0)]
    assert main("--limit", "6", kernels=steps) == 1
    assert notes(tmp_path, "kernels") == {"slow": "ok", "late": "pending"}
    assert main("--limit", "6", kernels=steps) == 0
    assert notes(tmp_path, "kernels") == {"slow": "ok", "late": "ok"}


def test_what_was_done_counts_only_for_the_same_sources_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    driver.State(path, "one", {}).note("a", status="ok")
    assert driver.State.load(path, "one", fresh=False).steps == {"a": {"status": "ok"}}
    assert driver.State.load(path, "two", fresh=False).steps == {}
    assert driver.State.load(path, "one", fresh=True).steps == {}
    path.write_text("{")
    assert driver.State.load(path, "one", fresh=False).steps == {}
    mark = driver.fingerprint(H100, dry=False)
    assert mark == driver.fingerprint(dict(H100), dry=False) != driver.fingerprint(H100, dry=True)
    assert mark != driver.fingerprint({**H100, "gpu": "NVIDIA H200"}, dry=False)


def test_without_a_gpu_it_says_so(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    none = {**H100, "gpu": None, "capability": None, "problem": "torch 2.13 (a CPU build) finds no CUDA device"}
    assert main(facts=none, env=[]) == 2
    assert "finds no CUDA device; `make gpu DRY=1`" in capsys.readouterr().err
    without = {**none, "packages": {**H100["packages"], "torch": None}}
    assert main("--dry", facts=without, env=[]) == 2
    assert main("--dry", facts=none, env=[shell("a", "true")]) == 0


def context(tmp_path: Path, dry: bool = False, **facts: Any) -> Context:
    return Context(python="python3", dry=dry, facts={**H100, **facts}, out=tmp_path)


def test_commands_on_a_gpu_have_the_options_they_are_given(tmp_path: Path) -> None:
    """What a dry run cannot show: the arguments that only a GPU gets."""
    parsers = {
        "benchmarks.decode": decode.parser(),
        "benchmarks.ladder": ladder.parser(),
        "benchmarks.end_to_end": end_to_end.parser(),
        "benchmarks.feeding": feeding.parser(),
        "benchmarks.gpu.calls": calls.parser(),
        "benchmarks.gpu.measure": measure.parser(),
    }
    parsed = 0
    for name in ORDER:
        steps = sections.steps(name, context(tmp_path))
        assert steps and len({step.name for step in steps}) == len(steps)
        for step in steps:
            assert step.seconds <= 480
            command = step.command[step.command.index("python3") :]
            if command[1] == "-m" and command[2] in parsers:
                parsers[command[2]].parse_args(command[3:])
                parsed += 1
            for argument in command:
                if argument.startswith("tests/"):
                    assert (ROOT / argument).is_file()
    assert parsed > 20
    (native,) = (s for s in sections.build(context(tmp_path)) if s.name == "native ops")
    assert native.environment == {"MAX_JOBS": "16", "JAVIS_NATIVE": "1", "JAVIS_CUDA_ARCHS": "90a"}
    assert context(tmp_path, capability=[8, 0]).architectures() == "80"
    assert sorted(sections.op_names()) == sorted(NAMES)


def test_what_is_missing_leaves_out_what_needs_it(tmp_path: Path) -> None:
    packages = {**dict.fromkeys(probe.PACKAGES), "torch": "2.11", "triton": "3.6"}
    bare = context(tmp_path, packages=packages, programs=dict.fromkeys(probe.PROGRAMS))
    for name in ("tests", "sanitizer", "build", "report"):
        reasons = [step.skip for step in sections.steps(name, bare) if step.skip]
        assert reasons, name
    skipped = [step for name in ("kernels", "model") for step in sections.steps(name, bare) if step.skip]
    assert [step.name for step in skipped] == ["end to end 512x512", "end to end 720p", "end to end 240p"]
    assert all("diffusers" in str(step.skip) and "javis[full]" in str(step.skip) for step in skipped)
    assert "missing: the section `tests`" in probe.describe(bare.facts)


def test_sections_need_no_more_than_torch() -> None:
    """On a bare image: everything that the sections run imports without the packages of the command line."""
    blocked = ("rich", "tyro", "einops", "safetensors", "av", "soundfile", "matplotlib", "huggingface_hub", "pytest")
    code = (
        "import sys\n"
        f"class Blocked:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import benchmarks.ladder, benchmarks.decode, benchmarks.choices, benchmarks.roofline\n"
        "import benchmarks.train_stages\n"
        "from benchmarks.gpu import __main__, calls, loads, measure, probe, report\n"
        "arguments = ['--device', 'cpu', '--op', 'ada_layer_norm', '--most', '1', '--backends', 'cpu']\n"
        "assert calls.main(arguments) in (0, 1)\n"
        "print(probe.describe(probe.collect()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compute-sanitizer" in done.stdout


WHERE = {"device": "GPU", "torch": "2.11", "python": "3.12", "threads": 16}


def row(op: str, case: str, mode: str, backend: str, ms: float, **more: Any) -> dict[str, Any]:
    about = {"op": op, "case": case, "mode": mode, "backend": backend, "commit": "c", "date": "d", "load": 1, **WHERE}
    about |= {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "gb_per_s": 10.0, "tflop_per_s": 0.1, "bound": "bytes"}
    return {**about, "share_of_copy": 0.95, "share_of_matmul": 0.1, **more}


def test_the_report_judges_the_bars(tmp_path: Path) -> None:
    temporal, name = ("factorized_attention", "temporal-512x512-bfloat16"), "gated_residual_ada_layer_norm"
    rows = [
        row(*temporal, "forward", "cuda", 9.0, commit="old"),
        *(row(*temporal, "forward", b, ms) for b, ms in zip(("cuda", "triton", "sdpa", "eager"), (1.0, 2.0, 6.0, 7.0))),
        row(*temporal, "backward", "triton", 2.0), row(*temporal, "backward", "eager", 1.0),
        row(name, "video-512x512-bfloat16", "forward", "cuda", 1.0),
        row("bidirectional_attention", "512x512-2s-bfloat16", "forward", "triton", 1.0),
        row("bidirectional_attention", "512x512-2s-bfloat16", "forward", "sdpa", 1.5),
    ]  # fmt: skip
    judged = {line[0]: line[2:] for line in report.bars(rows)}
    assert judged == {
        "factorized_attention, temporal-512x512-bfloat16, forward, cuda": ["6.00 x", "yes"],
        "factorized_attention, temporal-512x512-bfloat16, backward, triton": ["0.50 x", "**no**"],
        f"{name}, video-512x512-bfloat16, forward, cuda": ["0.95 of the copy", "yes"],
        "bidirectional_attention, 512x512-2s-bfloat16, forward, triton": ["1.50 x", "**no**"],
    }
    one = {"bench": "ladder", "clip": "512x512", "steps": 30, "guidance": True, "commit": "c", "date": "d", **WHERE}
    one |= {"s_p20": 5.0, "s_p80": 5.2, "multiplied_by": 3.0, "measured_steps": 10, "tflop": 1.0}
    one |= {"share_of_matmul": 0.5, "roofline_s": 4.0, "peak_memory_gb": 9.0, "error_rms": 0.01, "cold_s": 60.0}
    rows += [{**one, "rung": "graph", "s_p50": 5.1}, {**one, "rung": "fp8", "s_p50": 4.6}]
    assert [line[2:] for line in report.bars(rows)[-2:]] == [["5.10 s", "yes"], ["4.60 s", "**no**"]]
    decoded = {
        "bench": "decode",
        "clip": "720p",
        "dtype": "bfloat16",
        "frames": 51,
        "height": 720,
        "width": 1280,
        **WHERE,
    }
    decoded |= {"p20_s": 1.0, "p50_s": 1.0, "p80_s": 1.0, "cpu_s": None, "times_eager_cpu": None, "tflop": 3.0}
    decoded |= {"peak_bytes": 2_500_000_000, "commit": "c", "date": "d"}
    rows += [{**decoded, "variant": name, "times_eager": gain} for name, gain in (("eager", 1.0), ("ours", 2.6))]
    assert report.bars(rows)[-1] == ["decode 720p, bfloat16", ">= 2.5 x eager", "2.60 x", "yes"]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert report.main(["--results", str(tmp_path), "--device", "gpu"]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "| 512x512 | with | 30 | graph | 5.0 | 5.1 | 5.2 | 10, x 3 |" in page and "torch 2.11" in page
    assert "| factorized_attention | temporal-512x512-bfloat16 | backward | triton | 2.0 |" in page
    assert "| 720p | 51 x 720 x 1280 | bfloat16 | ours | 1.0 | 1.0 | 1.0 | - | 3.0 | 2.6 | - | - | 2.50 |" in page
    assert report.main(["--results", str(tmp_path), "--device", "other"]) == 1


@pytest.mark.slow
def test_a_dry_run_from_make(tmp_path: Path) -> None:
    """Sections that other tests do not run whole; `.ci/run` has all of them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    arguments = [
        "make",
        "gpu",
        "DRY=1",
        f"PYTHON={sys.executable}",
        "SECTION=env build kernels report",
        f"GPU_ARGS=--out {tmp_path}",
    ]
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "report: done" in done.stdout and "done: env, build, kernels, report" in done.stdout
    (rows,) = (tmp_path / "results").glob("*.jsonl")
    assert {json.loads(line)["op"] for line in rows.read_text().splitlines()} == {"ada_layer_norm", "flow_update"}
    assert "## Ops" in rows.with_suffix(".md").read_text()
    assert json.loads((tmp_path / "choices.json").read_text())["format"] == 1
