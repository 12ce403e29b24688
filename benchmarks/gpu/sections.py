"""What each section of ``make gpu`` runs. A dry run makes the same calls at toy size on the CPU.

Sections of less than eight minutes, steps that another call can take up: see docs/gpu.md for what each one shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("env", "build", "tests", "sanitizer", "kernels", "model", "feeding", "train", "report")
# In the order of what is wanted first, should the time run out.
CLIPS = (("512x512", "with"), ("720p", "with"), ("240p", "with"))
CLIPS += tuple((clip, "without") for clip, _ in CLIPS)
FEEDING = ("av", "soundfile")  # DALI is measured where it is
FULL = ("diffusers", "transformers", "safetensors", "huggingface-hub", "av", "rich")  # what the pipeline imports


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of a section."""

    name: str
    command: tuple[str, ...] = ()
    seconds: float = 460.0  # its limit
    environment: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # variables that it must not see
    skip: str | None = None  # why it cannot run here
    show: int = 3  # last lines of its log to print when it is done
    always: bool = False  # run again even if it was done before


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the steps depend on."""

    python: str
    dry: bool
    facts: dict[str, Any]
    out: Path

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def results(self) -> Path:
        """Where rows go: a dry run's say nothing and are kept apart."""
        return self.out / "results" if self.dry else ROOT / "benchmarks" / "results"

    def module(self, name: str, *arguments: object) -> tuple[str, ...]:
        return (self.python, "-m", name, *map(str, arguments))

    def has(self, package: str) -> bool:
        return self.facts["packages"].get(package) is not None

    def architectures(self) -> str:
        """For the CUDA build: this GPU alone, with its own instructions where it has some."""
        major, minor = self.facts["capability"]
        return f"{major}{minor}" + ("a" if major >= 9 else "")


def env(c: Context) -> list[Step]:
    return [Step(name="javis", command=c.module("benchmarks.gpu.probe"), seconds=120, show=0, always=True)]


def build(c: Context) -> list[Step]:
    """The native ops in place: nothing is installed."""
    if c.dry:  # the same command; compilers have their own tests, and what is in place must stay
        made = ("--build-lib", str(c.out / "build" / "lib"), "--build-temp", str(c.out / "build" / "temp"))
        command = (c.python, "setup.py", "build_ext", *made)
        return [
            Step(name="native ops", command=command, environment={"JAVIS_NATIVE": "0"}, seconds=120, show=1),
            Step(name="what loads", command=c.module("benchmarks.gpu.loads"), seconds=120, show=8),
        ]
    environment = {"MAX_JOBS": str(c.facts["cores"]), "JAVIS_NATIVE": "1"}
    reason = None
    missing = [name for name in ("ninja", "pybind11", "setuptools") if not c.has(name)]
    missing = [name for name in missing if name != "ninja" or c.facts["programs"]["ninja"] is None]
    if missing or c.facts["programs"]["c++"] is None:
        missing += [] if c.facts["programs"]["c++"] else ["a C++ compiler"]
        reason = f"{', '.join(missing)} missing: no native ops; Triton and the reference run without"
    nvcc = c.facts["programs"]["nvcc"]
    if nvcc is not None:
        environment |= {"JAVIS_CUDA_ARCHS": c.architectures()}
    return [
        Step(
            name="native ops",
            command=(c.python, "setup.py", "build_ext", "--inplace"),
            environment=environment,
            skip=reason,
            show=6,
        ),
        Step(name="what loads", command=c.module("benchmarks.gpu.loads"), seconds=120, show=60, always=True),
    ]


def tests(c: Context) -> list[Step]:
    reason = None if c.has("pytest") else "pytest is not installed; the section `kernels` has a gate of its own"
    workers = ("-n", str(min(8, c.facts["cores"]))) if c.has("pytest-xdist") and not c.dry else ()
    common = ("-q", "-ra", "-p", "no:cacheprovider")
    if c.dry:
        one = c.module("pytest", *common, "tests/kernels/test_gpu.py", "-k", "flow_update or without_a_gpu")
        listed = c.module("pytest", "-q", "--collect-only", "-m", "gpu", "tests/kernels/test_gpu.py")
        return [
            Step(name="on the GPU", command=listed, seconds=120, skip=reason),
            Step(name="ops", command=one, seconds=120, skip=reason),
        ]
    here = ("tests/kernels/test_gpu.py",)
    return [
        Step(name="ops", command=c.module("pytest", *common, *workers, *here), skip=reason),
        # Offsets beyond 2^31 take most of the memory: one at a time.
        Step(
            name="other tests marked gpu",
            command=c.module("pytest", *common, "-m", "gpu", "tests", "--ignore", here[0]),
            skip=reason,
        ),
        Step(
            name="kernel tests that choose the GPU",
            command=c.module("pytest", *common, *workers, "-m", "not gpu", *device_tests()),
            skip=reason,
        ),
    ]


def device_tests() -> list[str]:
    """Files of tests/kernels whose tensors are on the GPU where there is one."""
    found = []
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if 'DEVICE = "cuda" if torch.cuda.is_available()' in text and path.name != "test_gpu.py":
            found.append(str(path.relative_to(ROOT)))
    return found


def sanitizer(c: Context) -> list[Step]:
    """Small calls of every op under compute-sanitizer; first without it, so that compiled kernels are in the cache."""
    most = ("--most", 1) if c.dry else ()
    plain = c.module("benchmarks.gpu.calls", "--device", c.device, *most)
    tool = c.facts["programs"]["compute-sanitizer"]
    made = [Step(name="small calls", command=plain, environment={"TRITON_INTERPRET": "0"}, seconds=200, show=2)]
    reason = None if tool else "compute-sanitizer is not on this machine"
    if c.dry:
        command = (*plain, "--op", "flow_update", "--backends", "triton")
        reason = None if c.has("triton") else "triton is not installed"
        environment = {"TRITON_INTERPRET": "1"}
        return [*made, Step(name="interpreter", command=command, environment=environment, seconds=200, skip=reason)]
    for check, backends, seconds in (
        ("memcheck", ("cuda",), 120.0),
        ("racecheck", ("cuda",), 120.0),
        ("memcheck", ("triton",), 200.0),
        ("racecheck", ("triton",), 200.0),
    ):
        command = (str(tool), "--tool", check, "--error-exitcode", "77", *plain, "--backends", *backends)
        # Tensors of their own allocations, or an access beyond one would be inside of another.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        name = f"{check} {' '.join(backends)}"
        made.append(Step(name=name, command=command, seconds=seconds, environment=environment, skip=reason, show=4))
    return made


def kernels(c: Context) -> list[Step]:
    """The microbenchmarks, an op a step: first those that have CUDA kernels and those of most calls."""
    options: tuple[object, ...] = ("--device", c.device, "--results", c.results)
    if c.dry:
        ops = ("ada_layer_norm", "flow_update")
        options += ("--seconds", 0.001, "--smallest")
        c.results.mkdir(parents=True, exist_ok=True)
    else:
        options += ("--seconds", 0.2)
        ops = op_names()
    return [
        Step(name=op, command=c.module("benchmarks.gpu.measure", "--op", op, *options), seconds=180, show=4)
        for op in ops
    ]


def op_names() -> tuple[str, ...]:
    """Of the registry, read without importing it (which needs torch)."""
    text = (ROOT / "javis" / "kernels" / "registry.py").read_text(encoding="utf-8")
    listed = text.partition("NAMES = (")[2].partition(")")[0]
    names = [line.strip().strip('",') for line in listed.splitlines() if line.strip().startswith('"')]
    first = ["factorized_attention", "gated_residual_ada_layer_norm", "ada_layer_norm", "bidirectional_attention"]
    return (*first, *(name for name in names if name not in first))


def model(c: Context) -> list[Step]:
    """The latency ladder, the decode of the video latents, and the whole pipeline from the prompt to the file."""
    common: tuple[object, ...] = ("--device", c.device, "--results", c.results, "--profile", c.out / "profile")
    if c.dry:
        c.results.mkdir(parents=True, exist_ok=True)
        quick: tuple[object, ...] = (
            "--quick",
            "--repeats",
            1,
            "--sample-seconds",
            0.001,
            "--steps",
            2,
            "--guidance",
            "with",
        )
        rungs = ("--rungs", "upstream", "eager", "fused", "graph", "overlap", "fp8", "fp8_te", "interval", "cache")
        command = c.module("benchmarks.ladder", *common, *quick, *rungs, "--json", c.out / "ladder.json")
        decode = c.module("benchmarks.decode", "--quick", "--repeats", 1, "--results", c.results)
        return [
            Step(name="ladder", command=command, seconds=240, show=10),
            Step(name="decode", command=decode, seconds=120, show=10),
            *end_to_end(c),
        ]
    made = []
    for clip, guidance in CLIPS:
        out = c.out / f"ladder-{clip}-{guidance}.json"
        options = ("--clips", clip, "--guidance", guidance, "--limit", 240, "--json", out)
        command = c.module("benchmarks.ladder", *common, *options)
        made.append(Step(name=f"ladder {clip} {guidance} guidance", command=command, seconds=420, show=30))
    for clip, _ in CLIPS[:3]:
        options = ("--clips", clip, "--dtypes", "bfloat16", "--device", c.device, "--results", c.results)
        made.append(Step(name=f"decode {clip}", command=c.module("benchmarks.decode", *options), seconds=300, show=10))
    return [*made, *end_to_end(c)]


def end_to_end(c: Context) -> list[Step]:
    """Every stage of the pipeline with random weights of full size, a clip a step."""
    missing = [name for name in FULL if not c.has(name)]
    reason = f"{', '.join(missing)} missing: pip install 'javis[full]'" if missing else None
    common: tuple[object, ...] = ("--device", c.device, "--results", c.results)
    if c.dry:
        quick = ("--size", "toy", "--dry-run", "--steps", 2, "--repeats", 1, "--json", c.out / "end_to_end.json")
        command = c.module("benchmarks.end_to_end", *common, *quick)
        return [Step(name="end to end", command=command, seconds=240, show=10, skip=reason)]
    made = []
    for clip in ("512x512", "720p", "240p"):
        options = ("--clips", clip, "--limit", 240, "--json", c.out / f"end_to_end-{clip}.json")
        command = c.module("benchmarks.end_to_end", *common, *options)
        made.append(Step(name=f"end to end {clip}", command=command, seconds=440, show=20, skip=reason))
    return made


def feeding(c: Context) -> list[Step]:
    """Clips per second from files to batches: DALI on the GPU beside PyAV on the cores."""
    missing = [name for name in FEEDING if not c.has(name)]
    reason = f"{', '.join(missing)} missing: pip install 'javis[dali]'" if missing else None
    common: tuple[object, ...] = ("--device", c.device, "--results", c.results)
    if c.dry:
        command = c.module("benchmarks.feeding", *common, "--quick", "--workers", 1)
        return [Step(name="feeding", command=command, seconds=120, show=4, skip=reason)]
    workers = min(8, c.facts["cores"])
    made = []
    for clip in ("256", "512", "720"):
        options = ("--clips", clip, "--codecs", "h264", "vp9", "--workers", workers)
        command = c.module("benchmarks.feeding", *common, *options)
        made.append(Step(name=f"feeding {clip}", command=command, seconds=300, show=8, skip=reason))
    return made


def train(c: Context) -> list[Step]:
    """A training step of each stage, fused against eager, a stage a step."""
    common: tuple[object, ...] = ("--device", c.device, "--results", c.results)
    if c.dry:
        c.results.mkdir(parents=True, exist_ok=True)
        command = c.module("benchmarks.train_stages", *common, "--quick", "--repeats", 1)
        return [Step(name="training step", command=command, seconds=180, show=6)]
    made = []
    for stage in ("joint", "audio", "prior"):
        command = c.module("benchmarks.train_stages", *common, "--stages", stage, "--repeats", 7)
        made.append(Step(name=f"training step {stage}", command=command, seconds=300, show=3))
    everything = c.module("benchmarks.train_stages", *common, "--stages", "joint", "--train", "all", "--depth", 14)
    return [*made, Step(name="training step joint, all trained, 14 layers", command=everything, seconds=300, show=3)]


def report(c: Context) -> list[Step]:
    """One table of what was measured, the picture, and the choices that follow from the rows."""
    options: tuple[object, ...] = ("--results", c.results)
    # As the rows' file is named after the device (javis.bench).
    name = re.sub(r"[^a-z0-9]+", "-", str(c.facts["gpu"]).lower()).strip("-")
    one = () if c.dry else ("--device", name)
    roofline = None if c.has("matplotlib") else "matplotlib is not installed"
    return [
        Step(
            name="table",
            command=c.module("benchmarks.gpu.report", "--state", c.out, *options, *one),
            seconds=60,
            show=400,
            always=True,
        ),
        Step(
            name="choices",
            command=c.module("benchmarks.choices", *options, "--out", c.out / "choices.json"),
            seconds=60,
            always=True,
        ),
        Step(
            name="roofline",
            command=c.module("benchmarks.roofline", *options, "--out", c.out / "roofline.png"),
            seconds=60,
            skip=roofline,
            always=True,
        ),
    ]


def steps(name: str, context: Context) -> list[Step]:
    """The steps of a section."""
    made = {
        "env": env, "build": build, "tests": tests, "sanitizer": sanitizer, "kernels": kernels, "model": model,
        "feeding": feeding, "train": train, "report": report,
    }  # fmt: skip
    return made[name](context)
