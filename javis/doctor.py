"""``javis doctor``: what this machine has, and what javis would run on it.

``collect`` gives plain JSON values, ``render`` prints them as tables. A missing optional package is a fact, not an
error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import javis

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from javis.kernels.cases import OpCase

# distribution name -> module that shows that it is installed
CORE = {
    "numpy": "numpy",
    "safetensors": "safetensors",
    "einops": "einops",
    "tyro": "tyro",
    "rich": "rich",
    "av": "av",
    "soundfile": "soundfile",
    "matplotlib": "matplotlib",
    "huggingface-hub": "huggingface_hub",
}
OPTIONAL = {
    "triton": ("triton", "GPU kernels"),
    "diffusers": ("diffusers", "full-size codecs"),
    "transformers": ("transformers", "full-size text encoders"),
    "flash-attn": ("flash_attn", "attention backend on GPUs"),
    "transformer-engine": ("transformer_engine", "FP8 linears on GPUs"),
    "apex": ("apex.optimizers", "fused optimisers for training"),
    "nvidia-dali": ("nvidia.dali", "decoding of training data"),
}
# Packages whose distributions are named after what they are built for.
_BUILDS = {"nvidia-dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120")}
_MISSING_CORE = "missing: reinstall javis"


def _find(module: str) -> bool:
    """Whether ``module`` could be imported. Parents of a dotted name are imported, the module itself is not."""
    parent = module.rpartition(".")[0]
    if parent and not _find(parent):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent that is no package, or breaks while it loads
        return False


def _version(distribution: str) -> str | None:
    for name in _BUILDS.get(distribution, (distribution,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _package(distribution: str, module: str) -> dict[str, Any]:
    if _find(module):
        return {"installed": True, "version": _version(distribution), "note": None}
    if distribution == "apex" and _find("apex"):
        return {
            "installed": False,
            "version": _version("apex"),
            "note": "the installed apex is another project; NVIDIA's is built from its source",
        }
    return {"installed": False, "version": None, "note": None}


def _devices() -> dict[str, Any]:
    import torch

    cpu: dict[str, Any] = {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": facts.name,
                    "compute_capability": f"{facts.major}.{facts.minor}",
                    "memory_gib": round(facts.total_memory / 2**30, 1),
                }
            )
    return {"cpu": cpu, "cuda": gpus, "cuda_build": torch.version.cuda}


def cpu_name() -> str:
    """Model name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _native() -> dict[str, Any]:
    from javis.kernels import native

    return {
        "loaded": native.WHY_NOT is None,
        "why_not": native.WHY_NOT,
        "instruction_set": native.cpu_isa(),
        "cuda_loaded": native.WHY_NOT_CUDA is None,
        "cuda_why_not": native.WHY_NOT_CUDA,
        "cuda_architectures": native.cuda_architectures(),
        "build": native.build_info(),
    }


def _ops() -> list[dict[str, Any]]:
    """One row per op, device and backend: would it run there, and if not, why.

    Asked of the smallest call of each kind: float32 on CPUs, bfloat16 on GPUs, which is what javis runs there.
    """
    import torch

    from javis.kernels.backend import why_not, why_not_auto
    from javis.kernels.registry import OPS

    rows = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        for name, op in OPS.items():
            for variant, case in _kinds(op.cases(), dtype).items():
                args, kwargs = case.inputs(device=device)
                everything = (*args, *kwargs.values())
                chosen = False
                for backend in op.checks:
                    reason = why_not(op.checks, backend, *everything)
                    auto = not chosen and why_not_auto(op.checks, backend, *everything) is None
                    chosen = chosen or auto
                    rows.append(
                        {
                            "op": name,
                            "variant": variant,
                            "device": device,
                            "dtype": str(case.dtype).removeprefix("torch."),
                            "backend": backend.value,
                            "runs": reason is None,
                            "auto": auto,
                            "reason": reason,
                        }
                    )
    return rows


def _kinds(cases: Sequence[OpCase], dtype: torch.dtype) -> dict[str | None, OpCase]:
    """The smallest case of each kind of call: an op whose cases have an option in words, such as an axis, has several.

    A case without one of ``dtype`` stands in where there is none.
    """
    kinds: dict[str | None, OpCase] = {}
    for case in sorted(cases, key=lambda case: (case.dtype != dtype, case.bytes())):
        options = [getattr(case, f.name) for f in dataclasses.fields(case) if f.name not in ("name", "op")]
        kinds.setdefault(", ".join(o for o in options if isinstance(o, str)) or None, case)
    return kinds


def collect() -> dict[str, Any]:
    """Everything ``javis doctor`` reports, as JSON values.

    Keys: ``javis``, ``python``, ``platform`` and ``torch`` (strings), ``devices``, ``packages`` (core and optional:
    installed, version, note), ``programs`` (path or None), ``environment`` (variables that change what javis does),
    ``native`` (loaded, why_not, instruction_set, the same for cuda, build), ``ops`` (op, variant, device, dtype,
    backend, runs, auto, reason).
    """
    import torch

    core = {name: _package(name, module) for name, module in CORE.items()}
    for facts in core.values():
        facts["note"] = None if facts["installed"] else _MISSING_CORE
    optional = {name: _package(name, module) | {"for": use} for name, (module, use) in OPTIONAL.items()}
    return {
        "javis": javis.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "devices": _devices(),
        "packages": {"core": core, "optional": optional},
        "programs": {name: shutil.which(name) for name in ("c++", "nvcc")},
        "environment": {name: os.environ[name] for name in ("JAVIS_BACKEND", "JAVIS_CPU_ISA") if name in os.environ},
        "native": _native(),
        "ops": _ops(),
    }


def render(facts: dict[str, Any], console: Console) -> None:
    """Print what ``collect`` returned."""
    from rich.table import Table

    cpu, gpus = facts["devices"]["cpu"], facts["devices"]["cuda"]
    console.print(
        f"[bold]javis {facts['javis']}[/]   python {facts['python']}   torch {facts['torch']}", highlight=False
    )
    console.print(f"CPU   {cpu['name']}, {cpu['cores']} cores, {cpu['capability']}", highlight=False)
    for gpu in gpus:
        text = f"GPU   {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        console.print(text, highlight=False)
    if not gpus:
        build = facts["devices"]["cuda_build"]
        why = f"torch is built for CUDA {build}, but finds no device" if build else "torch is a CPU build"
        console.print(f"GPU   none ({why})", highlight=False)
    native = facts["native"]
    if native["loaded"]:
        console.print(f"native ops   loaded, {native['instruction_set']} kernels", highlight=False)
    else:
        console.print(f"native ops   missing: {native['why_not']}", highlight=False, markup=False)
    if native["cuda_loaded"]:
        console.print(f"CUDA ops     loaded, for sm_{', sm_'.join(native['cuda_architectures'])}", highlight=False)
    else:
        console.print(f"CUDA ops     missing: {native['cuda_why_not']}", highlight=False, markup=False)
    for name, value in facts["environment"].items():
        console.print(f"{name}={value} is set", highlight=False, markup=False)

    packages = Table(title="packages", title_justify="left", box=None, pad_edge=False)
    for column in ("package", "version", "for", "note"):
        packages.add_column(column)
    for name, entry in facts["packages"]["core"].items():
        packages.add_row(name, entry["version"] or "-", "core", entry["note"] or "")
    for name, entry in facts["packages"]["optional"].items():
        version = (entry["version"] or "yes") if entry["installed"] else "-"
        packages.add_row(name, version, entry["for"], entry["note"] or "")
    console.print(packages)

    for device in dict.fromkeys(row["device"] for row in facts["ops"]):
        _render_ops([row for row in facts["ops"] if row["device"] == device], console)


def _render_ops(rows: list[dict[str, Any]], console: Console) -> None:
    """The backends of the ops on one device; an op is named once."""
    from rich.markup import escape
    from rich.table import Table

    title = f"ops on {rows[0]['device']}, {rows[0]['dtype']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("op", "backend", "would run", "why not"):
        table.add_column(column, overflow="fold", no_wrap=column in ("backend", "would run"))
    before = ""
    for row in rows:
        name = row["op"] + (f" ({row['variant']})" if row["variant"] else "")
        verdict = "yes, auto" if row["auto"] else "yes" if row["runs"] else "no"
        table.add_row(name if name != before else "", row["backend"], verdict, escape(row["reason"] or ""))
        before = name
    console.print(table)
