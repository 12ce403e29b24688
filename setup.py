"""Builds the compiled parts of javis with ninja; everything else about the package is in pyproject.toml.

Three binaries, all optional:

``javis/lib/libjavis_cpu.so``
    the native ops, written against PyTorch's stable ABI: no Python in it, one build for every torch >= 2.11.
``javis/lib/libjavis_cuda.so``
    the CUDA ops, likewise. Only if ``JAVIS_CUDA_ARCHS`` names architectures, such as ``80;90a``: then nvcc is needed,
    but neither a GPU nor a CUDA build of torch, and whatever is missing is an error.
``javis/_host.*.so``
    a small pybind11 module that reports what the former was built with.

They are built when a C++ compiler, ninja and an installed torch (its headers; it is never imported here) are found. If
not, the package installs without them, says why on standard output and in ``javis/_build.json``, and ``javis doctor``
repeats it. ``JAVIS_NATIVE`` changes that: ``0`` builds nothing, ``1`` makes whatever is missing an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
# Encoded as the headers want it: major in the top byte, minor in the next.
TORCH_TARGET = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}{0:012x}"

# csrc/cpu/<op>_rows.cpp are inner loops: compiled once per instruction set and chosen at run time.
CPU_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
ROW_SOURCES = [source for source in CPU_SOURCES if source.endswith("_rows.cpp")]
# csrc/cpu/<op>_avx512bf16.cpp are inner loops for processors that multiply bfloat16.
BF16_SOURCES = [source for source in CPU_SOURCES if source.endswith("_avx512bf16.cpp")]
LIBRARY_SOURCES = ["csrc/registration.cpp"]
LIBRARY_SOURCES += [source for source in CPU_SOURCES if source not in (*ROW_SOURCES, *BF16_SOURCES)]
HOST_SOURCES = ["csrc/host.cpp"]
# Kernels are compiled by nvcc and know nothing of torch; their bindings and the schemas by the C++ compiler.
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
CUDA_BINDINGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for pattern in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(pattern))

CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fopenmp-simd", "-fno-math-errno"]  # lets sums be vectorised; brings no OpenMP library
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
BF16_FLAGS = [*INSTRUCTION_SETS.get("avx512", []), *(["-mavx512bf16"] if "avx512" in INSTRUCTION_SETS else [])]


NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Xptxas", "-v"]


class Unavailable(Exception):
    """A reason why the compiled parts cannot be built here."""


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"no C++ compiler: looked for {wanted or 'c++, g++ and clang++'} (set CXX to choose one)")


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise Unavailable("ninja is not installed (pip install ninja)") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def find_torch() -> tuple[Path, str]:
    """The folder and version of an installed torch, found without importing it.

    Looks into the interpreter's site-packages as well, which an isolated build hides from ``import``.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    for folder in candidates:
        version_file = folder / "version.py"
        if not version_file.is_file():
            continue
        match = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", version_file.read_text(encoding="utf-8"))
        if match is None:
            raise Unavailable(f"{version_file} states no version")
        if (int(match[2]), int(match[3])) < OLDEST_TORCH:
            raise Unavailable(f"torch {match[1]} is too old: the native ops need torch >= 2.11")
        if not (folder / "include/torch/csrc/stable/library.h").is_file():
            raise Unavailable(f"torch {match[1]} in {folder} has no C++ headers")
        return folder, match[1]
    raise Unavailable("torch is not installed yet: install it first, then javis with --no-build-isolation")


def find_nvcc() -> str:
    """nvcc: ``NVCC``, or the one in CUDA_HOME or on the path."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wanted = os.environ.get("NVCC")
    for name in [wanted] if wanted else [*(str(Path(home) / "bin/nvcc") for home in homes), "nvcc"]:
        found = shutil.which(name)
        if found:
            return found
    where = wanted or ", ".join([*(f"{home}/bin" for home in homes), "the path"])
    raise Unavailable(f"no nvcc: looked for it in {where} (set NVCC or CUDA_HOME)")


def cuda_architectures() -> list[str]:
    """``JAVIS_CUDA_ARCHS``: compute capabilities without the dot, such as 80;90a. Empty: no CUDA ops."""
    names = [name for name in re.split(r"[;, ]+", os.environ.get("JAVIS_CUDA_ARCHS", "")) if name]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
            raise SystemExit(f"JAVIS_CUDA_ARCHS={name!r}: expected 80 or later without a dot, such as 80;90a")
    return sorted(set(names), key=lambda name: (int(name.rstrip("af")), name))


def architecture_flags(names: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the first that any later chip can take."""
    flags = []
    portable = next((name for name in names if name.isdigit()), None)
    for name in names:
        code = f"[sm_{name},compute_{name}]" if name == portable else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code={code}"]
    return flags


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed (pip install pybind11)") from None
    return pybind11.get_include()


def quote(argument: str) -> str:
    """One argument inside a shell command inside a ninja variable."""
    escaped = argument.replace("'", "'\\''")
    return ("'" + escaped + "'" if re.search(r"[^\w@%+=:,./-]", argument) else argument).replace("$", "$$")


class NinjaFile:
    """Collects compile and link edges; ``run`` builds them all."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.folder = folder
        self.lines = [
            f"cxx = {quote(compiler)}",
            "rule compile\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            "  description = compile $in",
            "rule link\n  command = $cxx -shared $in -o $out $flags\n  description = link $out",
        ]

    def use_nvcc(self, nvcc: str) -> None:
        """Adds the rules for CUDA. What ptxas says of registers and spills is kept beside each object."""
        self.lines += [
            f"nvcc = {quote(nvcc)}",
            "rule cuda\n  command = $nvcc -ccbin $cxx -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1"
            " || (cat $out.log; exit 1)\n  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            "rule link_cuda\n  command = $nvcc -ccbin $cxx -shared -cudart static $in -o $out $flags\n"
            "  description = link $out",
        ]

    @staticmethod
    def path(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def compile(self, source: str, flags: list[str], tag: str = "") -> str:
        target = self.folder / (source.replace("/", "_") + tag + ".o")
        self.edge("cuda" if source.endswith(".cu") else "compile", target, [ROOT / source], flags)
        return str(target)

    def edge(self, rule: str, target: Path, inputs: list[Path], flags: list[str]) -> None:
        names = " ".join(self.path(name) for name in inputs)
        self.lines.append(f"build {self.path(target)}: {rule} {names}\n  flags = {' '.join(map(quote, flags))}")

    def run(self, ninja: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        done = subprocess.run([ninja, "-j", jobs], cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout + done.stderr)
            raise Unavailable("the compiler failed; its messages are in the build log (pip install -v shows it)")


class NinjaBuildExt(build_ext):
    """Replaces the whole of build_ext: setuptools' own compiler set-up is not used."""

    def build_extensions(self) -> None:
        mode = os.environ.get("JAVIS_NATIVE", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"JAVIS_NATIVE={mode!r}: expected auto, 0 or 1")
        record: dict[str, object] = {"native": False, "host": False, "reason": None, "torch": None, "compiler": None}
        record.update(cuda=[], nvcc=None)
        try:
            if mode == "0":
                raise Unavailable("switched off by JAVIS_NATIVE=0")
            self.build_with_ninja(record)
        except Unavailable as error:
            record["reason"] = str(error)
            for output in (self.library_path(), self.host_path(), self.cuda_path()):
                output.unlink(missing_ok=True)
            if mode == "1":
                raise SystemExit(f"javis: JAVIS_NATIVE=1, but the native ops cannot be built: {error}") from error
            if mode == "auto" and cuda_architectures():
                raise SystemExit(
                    f"javis: JAVIS_CUDA_ARCHS is set, but the CUDA ops cannot be built: {error}"
                ) from error
            print(f"javis: installing without native ops: {error}", flush=True)
        self.record_path().parent.mkdir(parents=True, exist_ok=True)
        self.record_path().write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def build_with_ninja(self, record: dict[str, object]) -> None:
        if platform.system() != "Linux":
            raise Unavailable(f"the native ops are built on Linux only, this is {platform.system()}")
        compiler, ninja, (torch_dir, torch_version) = find_compiler(), find_ninja(), find_torch()
        build = NinjaFile(Path(self.build_temp).resolve() / "javis_native", compiler)
        for output in (self.library_path(), self.host_path()):
            output.parent.mkdir(parents=True, exist_ok=True)

        torch_flags = ["-isystem", str(torch_dir / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        objects = [build.compile(source, CXX_FLAGS + torch_flags) for source in LIBRARY_SOURCES]
        for isa, isa_flags in INSTRUCTION_SETS.items():
            flags = [*CXX_FLAGS, *isa_flags, f"-DJAVIS_ISA={isa}"]
            objects += [build.compile(source, flags, f".{isa}") for source in ROW_SOURCES]
        objects += [build.compile(source, CXX_FLAGS + BF16_FLAGS) for source in BF16_SOURCES]
        # libtorch_cpu is in memory by the time the library is loaded, so it is found by name and needs no rpath.
        link = ["-L" + str(torch_dir / "lib"), "-ltorch_cpu", "-Wl,--as-needed"]
        build.edge("link", self.library_path(), [Path(name) for name in objects], link)

        host_flags = [*CXX_FLAGS, "-isystem", find_pybind11(), "-isystem", sysconfig.get_path("include")]
        host_flags += [
            f'-DJAVIS_TORCH_HEADERS="{torch_version}"',
            f'-DJAVIS_TORCH_TARGET="{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"',
            f'-DJAVIS_INSTRUCTION_SETS="{" ".join(INSTRUCTION_SETS)}"',
        ]
        host = [build.compile(source, host_flags) for source in HOST_SOURCES]
        build.edge("link", self.host_path(), [Path(name) for name in host], ["-ldl"])

        architectures = cuda_architectures()
        if architectures:
            self.add_cuda(build, architectures, torch_dir, torch_flags, record)
        else:
            self.cuda_path().unlink(missing_ok=True)
        build.run(ninja)
        record.update(native=True, host=True, torch=torch_version, compiler=compiler, cuda=architectures)

    def add_cuda(
        self,
        build: NinjaFile,
        architectures: list[str],
        torch_dir: Path,
        torch_flags: list[str],
        record: dict[str, object],
    ) -> None:
        nvcc = find_nvcc()
        build.use_nvcc(nvcc)
        flags = [*NVCC_FLAGS, *architecture_flags(architectures)]
        for log in build.folder.glob("*.cu.o.log"):  # of a source that is gone: `make native-cuda` would still count it
            if log.name.removesuffix(".o.log") not in {source.replace("/", "_") for source in CUDA_SOURCES}:
                log.unlink()
        objects = [build.compile(source, flags) for source in CUDA_SOURCES]
        facts = [f'-DJAVIS_CUDA_ARCHS="{";".join(architectures)}"']
        objects += [build.compile(source, [*CXX_FLAGS, *torch_flags, *facts]) for source in CUDA_BINDINGS]
        # The CUDA runtime is linked in and its symbols hidden: torch's own copy, of any version, stays apart from it.
        # Nothing of libcuda or libtorch_cuda is linked, so that the library loads where there is neither.
        link = ["-L" + str(torch_dir / "lib"), "-ltorch_cpu", "-Xlinker", "--as-needed,--exclude-libs,ALL"]
        build.edge("link_cuda", self.cuda_path(), [Path(name) for name in objects], link)
        record["nvcc"] = nvcc

    # Where things go: under build_lib, and from there into the source tree for an editable install.

    def library_path(self) -> Path:
        return Path(self.build_lib).resolve() / "javis" / "lib" / "libjavis_cpu.so"

    def cuda_path(self) -> Path:
        return self.library_path().with_name("libjavis_cuda.so")

    def host_path(self) -> Path:
        return Path(self.build_lib).resolve() / "javis" / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"

    def record_path(self) -> Path:
        return Path(self.build_lib).resolve() / "javis" / "_build.json"

    def existing_outputs(self) -> list[Path]:
        outputs = (self.library_path(), self.cuda_path(), self.host_path(), self.record_path())
        return [path for path in outputs if path.exists()]

    def inside_package(self, output: Path) -> Path:
        return output.relative_to(Path(self.build_lib).resolve())

    def source_twin(self, output: Path) -> Path:
        return ROOT / self.inside_package(output)

    def copy_extensions_to_source(self) -> None:
        for stale in (self.library_path(), self.cuda_path(), self.host_path()):
            self.source_twin(stale).unlink(missing_ok=True)
        for output in self.existing_outputs():
            twin = self.source_twin(output)
            twin.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(output, twin)

    def get_outputs(self) -> list[str]:
        if self.inplace:
            return []
        return [str(Path(self.build_lib) / self.inside_package(path)) for path in self.existing_outputs()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {str(path): str(self.source_twin(path)) for path in self.existing_outputs()}

    def get_source_files(self) -> list[str]:
        return LIBRARY_SOURCES + ROW_SOURCES + BF16_SOURCES + HOST_SOURCES + CUDA_SOURCES + CUDA_BINDINGS + HEADERS


setup(
    ext_modules=[Extension("javis._host", sources=HOST_SOURCES)],
    cmdclass={"build_ext": NinjaBuildExt},
)
