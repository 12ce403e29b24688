"""Picture and sound on two streams: the order of events with a stand-in for CUDA, and real streams on a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from javis.acceleration import accelerate
from javis.errors import UsageError
from javis.sample.overlap import SideBySide, overlap_streams
from tests.model.small import check_equal, frame_masks, make_inputs, run, small_model


class Recorded:
    """Streams that write down what happens on which of them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.now = "main"

    def Stream(self, device: Any) -> Any:
        return self._named("side")

    def current_stream(self, device: Any) -> Any:
        return self._named(self.now)

    def _named(self, name: str) -> Any:
        owner = self

        class Named:
            def wait_stream(self, other: Any) -> None:
                owner.events.append(f"{name} waits for {other.name}")

        Named.name = name  # type: ignore[attr-defined]
        return Named()

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.now = self.now, stream.name
        yield
        self.now = before


def test_the_sound_is_beside_and_both_ends_are_joined() -> None:
    cuda = Recorded()

    def work(name: str, fails: bool = False) -> torch.Tensor:
        cuda.events.append(f"{name} on {cuda.now}")
        if fails:
            raise RuntimeError("broken")
        return torch.zeros(1)

    beside = SideBySide(torch.device("cuda"), cuda)
    beside(partial(work, "video"), partial(work, "audio"))
    expected = ["side waits for main", "audio on side", "video on main", "main waits for side"]
    assert cuda.events == expected
    cuda.events.clear()
    with pytest.raises(RuntimeError, match="broken"):  # what the side stream reads is freed only after it has finished
        beside(partial(work, "video", fails=True), partial(work, "audio"))
    assert cuda.events == expected


@pytest.mark.parametrize("masked", [False, True])
def test_results_are_the_same(masked: bool) -> None:
    model, cuda = small_model(), Recorded()
    noisy, told = make_inputs(model.config)
    masks = frame_masks(2) if masked else {}
    expected = run(model, noisy, told, **masks)
    model.run_streams = SideBySide(torch.device("cuda"), cuda)
    check_equal(run(model, noisy, told, **masks), expected, tolerance=0)
    assert cuda.events == ["side waits for main", "main waits for side"] * model.config.depth


def test_refused_on_a_cpu() -> None:
    model = small_model()
    with pytest.raises(UsageError, match="needs a CUDA device, the model is on cpu"):
        overlap_streams(model)
    from types import SimpleNamespace

    pipe: Any = SimpleNamespace(
        model=model, folder=None, residency=SimpleNamespace(policy="all"), denoiser=None, student=None
    )
    with pytest.raises(UsageError, match="needs a CUDA device"):
        accelerate(pipe, overlap=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphed", [False, True])
def test_on_a_gpu(graphed: bool) -> None:
    from javis.sample.graph import GraphedDenoiser

    model = small_model().cuda()
    noisy, told = (
        {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in d.items()} for d in make_inputs(model.config)
    )
    expected = run(model, noisy, told)
    overlap_streams(model)
    with torch.no_grad():
        denoiser: Any = GraphedDenoiser(model) if graphed else model
        condition = model.condition(**told)
        for _ in range(20):  # memory is used again and again
            check_equal(denoiser.denoise(**noisy, condition=condition), expected, tolerance=1e-5)
