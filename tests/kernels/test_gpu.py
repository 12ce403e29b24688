"""What only a GPU can show of every op: each backend there within its budget, in a CUDA graph, and in the whole model.

`make gpu SECTION=tests` runs this file. Without a GPU the same functions run on the CPU for some ops, so that a mistake
in them does not wait for one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from javis import bench
from javis.kernels import OPS
from javis.kernels.testing import assert_within_budget
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps

if not (Path(__file__).resolve().parents[2] / "benchmarks/gpu/calls.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks.gpu.calls import small_cases, variants

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cache
def cases(name: str) -> list[Any]:
    """Every kind of call of an op, large enough for several programs."""
    return small_cases(name, flops=2e9, moved=2e7)


def parameters() -> list[Any]:
    return [pytest.param(name, case, id=f"{name}-{case.name}") for name in OPS for case in cases(name)]


def within_budget(name: str, case: Any, device: str) -> list[str]:
    """Forward and every gradient of all backends of the device; which there were."""
    calls = variants(name, case, device, None)
    bench.check(name, case, calls, device)
    return list(calls)


def replayed(name: str, case: Any, device: str, backend: str) -> None:
    """A CUDA graph of the op gives for other inputs what the op gives for them. On a CPU the call is made again."""
    call = variants(name, case, device, [backend])[backend]
    args, kwargs = case.inputs(seed=0, device=device)
    others, _ = case.inputs(seed=1, device=device)
    run: Callable[[], Any] = lambda: call(*args, **kwargs)  # noqa: E731
    with torch.no_grad():
        expected = [y.clone() for y in bench._tensors(call(*others, **kwargs))]
        replay = run
        if device == "cuda":
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                captured = run()

            def replay() -> Any:
                graph.replay()
                return captured

        for mine, other in zip(args, others, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
        for actual, wanted in zip(bench._tensors(replay()), expected, strict=True):
            assert torch.equal(actual, wanted), f"{name} {case.name} {backend}: a replay differs from the call"


def model_within_budget(device: str, dtype: torch.dtype) -> None:
    """The whole model on fused ops, against float64 on the CPU and against plain ops in the same dtype there."""
    config = JavisDiTConfig(
        hidden_size=96, num_heads=4, depth=2, caption_channels=32, caption_length=16, spatial_prior_len=8,
        temporal_prior_len=8, prior_channels=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.02)
        for name, value in JavisDiT(config).state_dict().items()
    }
    inputs = {
        "text": torch.randn(2, 16, 32, generator=generator),
        "spatial_prior": torch.randn(2, 8, 16, generator=generator),
        "temporal_prior": torch.randn(2, 8, 16, generator=generator),
        **{name: torch.full((2,), 64.0) for name in ("fps", "height", "width")},
    }
    video, audio = torch.randn(2, 4, 5, 8, 8, generator=generator), torch.randn(2, 8, 12, 4, generator=generator)

    def velocity(ops: ModelOps, kind: torch.dtype, where: str) -> list[Tensor]:
        model = JavisDiT(config, ops).eval().requires_grad_(False)
        model.load_state_dict(weights)
        model = model.to(where, kind)
        given = {name: value.to(dtype).to(where, kind) for name, value in inputs.items()}
        out = model(video.to(where, kind), audio.to(where, kind), torch.full((2,), 500.0, device=where), **given)
        return [part.cpu() for part in out]

    rounded = {name: value.to(dtype).float() for name, value in weights.items()}
    weights.update(rounded)
    video, audio = video.to(dtype).float(), audio.to(dtype).float()
    with torch.no_grad():
        exact, same = velocity(ModelOps(), torch.float64, "cpu"), velocity(ModelOps(), dtype, "cpu")
        actual = velocity(ModelOps.fused(), dtype, device)
    for part, a, e, s in zip(("video", "audio"), actual, exact, same, strict=True):
        assert_within_budget(f"{part} of the model on {device}", a, e, s)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "case"), parameters())
def test_every_backend_is_within_its_budget(name: str, case: Any) -> None:
    if not within_budget(name, case, "cuda"):
        args, kwargs = case.inputs(device="cuda")
        reasons = [f"{b.value}: {check(*args, *kwargs.values())}" for b, check in OPS[name].checks.items()]
        pytest.skip(f"only the reference runs this call; {'; '.join(reasons)}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_cuda_graph_of_every_backend(name: str) -> None:
    for case in cases(name)[:2]:
        for backend in variants(name, case, "cuda", None):
            replayed(name, case, "cuda", backend)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_on_a_gpu(dtype: torch.dtype) -> None:
    model_within_budget("cuda", dtype)


@pytest.mark.parametrize("name", ["flow_update", "ada_layer_norm"])
def test_the_checks_without_a_gpu(name: str) -> None:
    """Backends of the CPU stand for those of the GPU; the interpreter for Triton where there is nothing else."""
    case = small_cases(name, flops=1e5, moved=1e4)[0]
    if not variants(name, case, "cpu", None):
        assert list(variants(name, case, "cpu", ["triton"])) in (["triton"], [])
    else:
        assert within_budget(name, case, "cpu")
        for backend in variants(name, case, "cpu", None):
            replayed(name, case, "cpu", backend)
    assert len(parameters()) > 2 * len(OPS)


def test_the_model_without_a_gpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model_within_budget("cpu", dtype)
