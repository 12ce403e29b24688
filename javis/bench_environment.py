"""Where a measurement was made: what every row of benchmarks/results says beside its figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import javis
from javis.doctor import cpu_name
from javis.kernels import choices, native

CHECKOUT = Path(javis.__file__).resolve().parents[1]


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where a row was measured: device, versions, commit, date; on a GPU also driver, clock and power limit."""
    gpu = _gpu() if device == "cuda" else {"device": cpu_name()}
    return {
        **gpu,
        "device_class": choices.device_class(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # others at work on this machine make every figure worse
        "isa": native.cpu_isa(),
        "javis": javis.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": native.build_info().get("compiler"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        # Rows are appended to a file of the tree: results beside unchanged code do not make it another tree.
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _gpu() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        facts |= dict(zip(("driver", "clock", "max_clock", "power_limit"), said.strip().split(", ")))
    except (OSError, subprocess.SubprocessError):
        facts["driver"] = None
    return facts


def _git(*arguments: str) -> str | None:
    if not (CHECKOUT / ".git").exists():  # an installed package, perhaps inside someone else's repository
        return None
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
