"""What this machine has: printed for people, or as one JSON object (``--json``) for the driver."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

# What the sections use; what is missing leaves out the part named here.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "the Triton kernels",
    "rich": "the command line of javis (the sections do without)",
    "tyro": "the command line of javis (the sections do without)",
    "einops": "training and checkpoints (the sections do without)",
    "safetensors": "checkpoints (the sections do without)",
    "ninja": "building the native ops",
    "pybind11": "building javis._host, which reports what the native ops were built with",
    "setuptools": "building the native ops",
    "pytest": "the section `tests`",
    "pytest-xdist": "tests side by side",
    "diffusers": "the full-size pipeline (end to end)",
    "transformers": "the full-size pipeline (end to end)",
    "huggingface-hub": "the full-size pipeline (end to end)",
    "av": "writing clips (end to end, feeding)",
    "soundfile": "writing sound (feeding)",
    "nvidia-dali-cuda130": "its feeder (feeding)",
    "matplotlib": "pictures in the section `report`",
    "flash-attn": "its backend in the ops",
    "transformer-engine": "the rung fp8_te of the ladder",
}
PROGRAMS = {
    "nvcc": "building the CUDA ops",
    "c++": "building the native ops",
    "ninja": "building the native ops",
    "nvidia-smi": "driver, clocks and power in the rows",
    "compute-sanitizer": "the section `sanitizer`",
    "git": "the commit in the rows",
}
# Where toolkits put programs that are not on the path.
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")


def program(name: str) -> str | None:
    """Path of a program, also where the CUDA toolkit keeps its own."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(PLACES))


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def smi() -> str | None:
    """State of the GPU as the driver tells it."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def collect() -> dict[str, Any]:
    """Facts as JSON values. ``torch`` is imported for those of the GPU; if it is missing, there is no GPU."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "programs": {name: program(name) for name in PROGRAMS},
        "smi": smi(),
        "gpu": None,
        "capability": None,
        "memory_gib": None,
        "cuda": None,
        "problem": None,
    }
    try:
        import torch
    except ImportError as error:
        return facts | {"problem": f"torch cannot be imported: {error}"}
    facts["cuda"] = torch.version.cuda
    if not torch.cuda.is_available():
        built = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return facts | {"problem": f"torch {torch.__version__} ({built}) finds no CUDA device"}
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines."""
    lines = [f"Python {facts['python']}, {facts['machine']}, {facts['cores']} cores"]
    if facts["gpu"] is not None:
        major, minor = facts["capability"]
        lines.append(f"{facts['gpu']}, sm_{major}{minor}, {facts['memory_gib']} GiB, CUDA {facts['cuda']} in torch")
    lines.append(f"nvidia-smi: {facts['smi'] or 'says nothing'}")
    for kind, known in (("packages", PACKAGES), ("programs", PROGRAMS)):
        for name, purpose in known.items():
            lines.append(f"  {name:20} {facts[kind][name] or f'missing: {purpose}'}")
    if facts["problem"] is not None:
        lines.append(facts["problem"])
    return "\n".join(lines)


if __name__ == "__main__":
    found = collect()
    print(json.dumps(found) if "--json" in sys.argv[1:] else describe(found))
