"""The command line as a process: exit codes, single lines, signals; and the small commands."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import javis
from javis import doctor
from javis.cli import COMMANDS, LATER, main
from javis.console import one_line
from javis.kernels import OPS

from .conftest import files

ROOT = Path(javis.__file__).parents[1]


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "javis", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "bench kernels"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert f"usage: javis {name}" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "there is no command 'javis paint'; expected one of sample,"),
        (["world"], "expected 'javis world make'"),
        (["world", "destroy"], "there is no command 'javis world destroy'"),
        (["bench", "ladder"], f"is not in javis {javis.__version__}; it comes with"),
        (["world", "make"], "PATH"),
        (["world", "make", "w", "--count", "0"], "count 0"),
        (["world", "make", "w", "--count", "many"], "Error parsing --count"),
        (["world", "make", "w", "--fps", "nan"], "fps"),
        (["world", "make", "w", "--split", "none"], "invalid choice 'none' for argument '--split'"),
        (["world", "make", "/proc/w"], "cannot write"),
        (["eval", "sync", "nowhere"], "no such folder"),
        (["eval", "sync", "."], "holds no mp4"),
        (["eval", "sync", ".", "--json", "."], "is a folder"),
        (["eval", "world", "--batch-size", "0"], "batch size"),
        (["eval", "world", "--checkpoint", "nowhere"], "checkpoint 'nowhere'"),
        (["plan", "--resolution", "5000k"], "unknown resolution '5000k'"),
        (["plan", "--seconds", "nan"], "seconds"),
        (["plan", "--steps", "0"], "steps"),
        (["plan", "--model", "nowhere"], "model 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_arguments_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert files(tmp_path) == set()


def test_every_later_command_names_what_brings_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name in LATER:
        assert main(name.split()) == 2
        assert "it comes with" in capsys.readouterr().err


def test_as_a_process(tmp_path: Path) -> None:
    done = process("sample", "ball " * 2000, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "javis: prompt of 10000 characters; expected at most 1000\n"
    done = process("--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"javis {javis.__version__}\n")
    assert files(tmp_path) == set()


def test_errors_in_the_arguments_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import os, sys; from javis.cli import main\n"
        "for words in ('--help', 'paint', 'sample', 'sample x --steps 0', 'sample --help', 'plan --help'):\n"
        "    main(words.split())\n"
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "False PASSIVE"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_in_one_line_without_half_files(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Making a hundred thousand clips takes long enough to be interrupted in the middle."""
    running = subprocess.Popen(
        [sys.executable, "-m", "javis", "world", "make", "clips", "--count", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A suite started in the background of a script inherits an ignored SIGINT, and would hand it on.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("clips/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == code
    assert len(said.splitlines()) == 1, said
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m javis plan --model demo --json | head -1"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["javis"] == javis.__version__
    assert any(op["backend"] == "reference" and op["runs"] for op in facts["ops"])
    calls = {(op["op"], op["variant"], op["device"]) for op in facts["ops"]}
    assert {name for name, _, _ in calls} == set(OPS)
    for call in calls:  # each lists all backends of the op, and auto takes one that runs
        rows = [op for op in facts["ops"] if (op["op"], op["variant"], op["device"]) == call]
        assert [op["backend"] for op in rows] == [backend.value for backend in OPS[call[0]].checks]
        assert [op["runs"] for op in rows if op["auto"]] == [True], call
        assert all(op["runs"] == (op["reason"] is None) for op in rows)


def test_doctor_fits_a_hundred_columns() -> None:
    from rich.console import Console

    def row(op: str, backend: str, reason: str | None, variant: str | None = None) -> dict[str, object]:
        return {
            "op": op, "variant": variant, "device": "cpu", "dtype": "float32", "backend": backend,
            "runs": reason is None, "auto": reason is None, "reason": reason,
        }  # fmt: skip

    rows = [
        row("factorized_attention", "flash_attn", "needs " + "a CUDA device " * 12, "temporal"),
        row("factorized_attention", "reference", None, "temporal"),
        row("gated_residual_ada_layer_norm_fp8", "cpu", "no [red] kernel"),
    ]
    out = io.StringIO()
    doctor._render_ops(rows, Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    said = " ".join(out.getvalue().split())
    assert said.count("factorized_attention (temporal)") == 1
    assert "a CUDA device " * 11 in said.replace("no needs", "needs")
    assert "[red]" in said and "yes, auto" in said


def test_world_then_eval_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real clips of the world are in synchrony; with the sound half a second late they are not."""
    import soundfile

    monkeypatch.chdir(tmp_path)
    assert main(["world", "make", "w", "--count", "4", "--seed", "3", "--sources", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"directory": "w", "written": 4, "skipped": 0}
    assert main(["eval", "sync", "w", "--json", "sync.json"]) == 0
    report = json.loads(Path("sync.json").read_text())
    assert report["summary"]["clips"] == len(report["clips"]) == 4
    assert report["summary"]["mean_f1_62.5ms"] >= 0.95
    assert report["summary"]["mean_abs_offset_ms"] < 15
    for path in Path("w").glob("*.wav"):
        audio, rate = soundfile.read(path)
        soundfile.write(path, [0.0] * 1600 + list(audio[:-1600]), rate)  # 100 ms late: beyond one frame
    assert main(["eval", "sync", "w", "--json", "late.json"]) == 0
    assert json.loads(Path("late.json").read_text())["summary"]["mean_f1_62.5ms"] < 0.5


def test_one_line() -> None:
    assert one_line("a\n b\t\x1b[31mc\x00") == "a b ?[31mc?"
    assert len(one_line("x" * 5000)) == 2000
