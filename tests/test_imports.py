"""The import rule, and what must work without what.

kernels <- model <- flow, sample <- pipeline, train, eval: a part imports only what stands to its left, and the model no
kernel. ``import javis`` is light. Optional packages load on first use.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "javis"

# What the files of a part may import from javis. Parts that are not listed stand on top and may import any of these.
ALLOWED = {
    "errors": set(),
    "kernels": {"errors", "kernels", "_host"},
    "model": {"errors", "model"},
    "flow": {"errors", "model", "kernels", "flow"},
    "sample": {"errors", "model", "kernels", "flow", "sample", "sampler_options", "cache_options"},
    "sampler_options": {"errors", "cache_options"},
    "cache_options": {"errors"},
    "world": {"errors", "world"},
}
# Nothing imports the command line.
TOP = {"cli"}
# Packages that no file may need for being imported: they load where they are used.
OPTIONAL = {
    "triton", "flash_attn", "transformer_engine", "apex", "diffusers", "transformers", "nvidia", "sentencepiece",
    "ftfy", "bs4",
}  # fmt: skip
# The world is numpy; what reads and writes media loads with the first file.
WORLD_EAGER = {"numpy"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def origin(node: ast.ImportFrom, path: Path, root: Path) -> str:
    """Full dotted name of what a file below ``root`` imports from."""
    base = path.relative_to(root).with_suffix("").parts[: -node.level] if node.level else ()
    return ".".join([*base, *filter(None, [node.module])])


def imports(tree: ast.AST, path: Path) -> set[str]:
    """Full dotted names of everything imported anywhere below ``tree``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = origin(node, path, ROOT)
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def eager(tree: ast.Module, path: Path) -> set[str]:
    """Top-level packages imported when the module itself is: outside functions and TYPE_CHECKING blocks."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= imports(ast.Module(body=[node], type_ignores=[]), path)
        pending += ast.iter_child_nodes(node)
    return {name.split(".")[0] for name in names}


def javis_parts(names: set[str]) -> set[str]:
    """Parts of javis among imported names; the package itself (its version) is none."""
    return {name.split(".")[1] for name in names if name.startswith("javis.")} - {"__version__", "__file__"}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_rule(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    part, wanted = part_of(path), javis_parts(imports(tree, path))
    if path == PACKAGE / "model" / "ops.py":
        wanted -= {"kernels"}  # ModelOps.fused(), on request; test_model_runs_without_kernels shows that it is lazy
    if part in ALLOWED:
        assert wanted <= ALLOWED[part], f"javis.{part} must not import {sorted(wanted - ALLOWED[part])}"
    if part not in TOP | {"__main__"}:
        assert not wanted & TOP, "nothing imports the command line"
    loaded = eager(tree, path)
    if path.name == "triton_impl.py":  # imported on the first launch (test_kernels_run_without_optional_packages)
        loaded -= {"triton"}
    assert not loaded & OPTIONAL, f"{sorted(loaded & OPTIONAL)} must load on first use"
    if part == "world":
        others = loaded - set(sys.stdlib_module_names) - WORLD_EAGER - {"javis", "__future__"}
        assert not others, f"javis.world must load {sorted(others)} on first use"


def test_the_scan_sees_a_breach() -> None:
    path = PACKAGE / "model" / "made_up.py"
    for code in (
        "def f():\n    from javis.kernels import OPS",
        "import javis.kernels.backend",
        "from ..kernels import OPS",
    ):
        assert "kernels" in javis_parts(imports(ast.parse(code), path)), code
    assert eager(ast.parse("try:\n    import triton\nexcept ImportError:\n    pass"), path) == {"triton"}
    assert eager(ast.parse("def f():\n    import triton"), path) == set()


# -- circles -----------------------------------------------------------------------------------------------------------


def dotted(path: Path, root: Path) -> str:
    """The name a file is imported by."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(root: Path) -> dict[str, set[str]]:
    """For each module of the package ``root``/javis what it imports of it, anywhere: in functions as well, which an
    import on first use is. Names for type checkers alone do not count."""
    files = {dotted(path, root): path for path in sorted((root / "javis").rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                pending += node.orelse
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = origin(node, path, root)
                told = [f"{module}.{alias.name}" for alias in node.names]
                found |= {full if full in files else module for full in told}  # a module, or a name in one
            else:
                pending += ast.iter_child_nodes(node)
        graph[name] = (found & files.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in number:
            visit(name)
    return found


def test_no_circles() -> None:
    """Not even by imports on first use: whoever reads a module can read what it stands on first."""
    assert circles(imported_modules(ROOT)) == []


def test_circles_are_seen(tmp_path: Path) -> None:
    for name, code in {
        "__init__": "",
        "a": "import javis.b",
        "b": "def f():\n    from javis.sub import c",
        "sub/__init__": "",
        "sub/c": "from ..a import name",
        "d": "from javis.a import name\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from javis import e",
        "e": "from javis.d import name",
    }.items():
        path = tmp_path / "javis" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    assert circles(imported_modules(tmp_path)) == [["javis.a", "javis.b", "javis.sub.c"]]


def run(code: str, **environment: str) -> str:
    """Standard output of ``code`` in a fresh process; fails with its traceback."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BLOCK = """
import sys
class Blocked:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in self.names):
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_import_javis_is_light() -> None:
    loaded = run("import sys, javis; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    assert "javis" in loaded
    heavy = {"torch", "numpy", "av", "soundfile", "matplotlib", "rich", "tyro", "safetensors", "einops"} & set(loaded)
    assert not heavy, f"import javis loads {sorted(heavy)}"


def test_kernels_run_without_optional_packages() -> None:
    code = BLOCK.format(names=sorted(OPTIONAL)) + (
        "import torch\n"
        "from javis.kernels import OPS, use_backend\n"
        "for op in OPS.values():\n"
        "    args, kwargs = min((case for case in op.cases()), key=lambda c: c.bytes()).inputs()\n"
        "    op.function(*args, **kwargs, backend='reference')\n"
        "    op.function(*args, **kwargs)\n"
        "print(len(OPS))\n"
    )
    assert int(run(code)) >= 1


def test_model_runs_without_kernels() -> None:
    code = BLOCK.format(names=[*sorted(OPTIONAL), "javis.kernels"]) + (
        "import torch\n"
        "from javis.model.config import JavisDiTConfig\n"
        "from javis.model.dit import JavisDiT\n"
        "config = JavisDiTConfig(hidden_size=32, num_heads=2, depth=1, caption_channels=8, caption_length=4,\n"
        "                        spatial_prior_len=2, temporal_prior_len=2, prior_channels=8)\n"
        "model = JavisDiT(config).eval()\n"
        "video, audio = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 8, 8, 4)\n"
        "size = torch.tensor([32.0])\n"
        "v = model(video, audio, torch.tensor([500.0]), text=torch.randn(1, 4, 8), fps=torch.tensor([8.0]),\n"
        "          height=size, width=size, spatial_prior=torch.randn(1, 2, 8), temporal_prior=torch.randn(1, 2, 8))\n"
        "assert all(torch.isfinite(part).all() for part in v)\n"
        "assert not any(name.startswith('javis.kernels') for name in sys.modules)\n"
        "print('ran')\n"
    )
    assert run(code).strip() == "ran"


def test_fused_ops_fit_the_record_of_the_model() -> None:
    from javis.kernels import fused_ops
    from javis.model.ops import ModelOps

    ops = ModelOps(**fused_ops())
    for name, function in fused_ops().items():
        assert getattr(ops, name) is function
