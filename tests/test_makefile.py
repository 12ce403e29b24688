"""The commands of the Makefile: they parse, and make their environment first where one is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").is_file(), reason="needs make and a source tree"
)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_gpu_command_takes_sections_and_needs_no_environment(tmp_path: Path) -> None:
    done = make("--dry-run", "gpu", "SECTION=env kernels", "DRY=1", f"VENV={tmp_path / 'venv'}", "PYTHON=some-python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "some-python -m benchmarks.gpu --section env kernels --dry"
    assert make("--dry-run", "gpu", "DRY=0").stdout.split() == ["python3", "-m", "benchmarks.gpu"]


@pytest.mark.parametrize("target", ["demo", "test", "check", "aot", "bench", "docs", "clean"])
def test_commands_expand(target: str, tmp_path: Path) -> None:
    """A dry run: every recipe parses, and the environment comes first where one is needed."""
    done = make("--dry-run", target, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 0, done.stderr
    if target != "clean":
        assert "-m venv" in done.stdout
        assert "--no-build-isolation" in done.stdout


def test_continuous_integration_can_be_run() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
