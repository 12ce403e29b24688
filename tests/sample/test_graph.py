"""CUDA graphs of the denoising step, with a stand-in that records and replays as a graph does: into the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from javis.errors import FailedError, UsageError
from javis.flow import timesteps
from javis.model.dit import Conditioning, JavisDiT, Velocity
from javis.sample import Guidance, GuidancePlan, sample, sample_in_order
from javis.sample.graph import CudaGraphs, GraphedDenoiser
from tests.model.small import frame_masks, make_inputs, small_config, small_model


class Recorder:
    """Captures by calling, replays by calling again and writing into the outputs of the capture."""

    def __init__(self, error: Exception | None = None) -> None:
        self.captures = self.replays = 0
        self.error = error

    def why_not(self, device: torch.device) -> str | None:
        return None

    def capture(self, function: Callable[[], Velocity]) -> tuple[Velocity, Callable[[], None]]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        out = function()
        for tensor in out:
            tensor.fill_(float("nan"))  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            for old, new in zip(out, function(), strict=True):
                old.copy_(new)

        return out, replay


def graphed(model: JavisDiT, **options: Any) -> tuple[GraphedDenoiser, Recorder]:
    recorder = Recorder()
    return GraphedDenoiser(model, backend=recorder, **options), recorder


@torch.no_grad()
def conditions(
    model: JavisDiT, batch: int = 2, seed: int = 0, **changes: Any
) -> tuple[dict[str, Tensor], Conditioning]:
    noisy, told = make_inputs(model.config, batch, seed=seed)
    return noisy, model.condition(**(told | changes))


@pytest.mark.parametrize("guided", [False, True])
def test_sampling_gives_the_same_bits(guided: bool) -> None:
    model = small_model(clock=True, clock_attention=True)
    graphs, recorder = graphed(model)
    for seed in (0, 1):  # the second clip reuses the graph of the first, with another conditioning
        noisy, condition = conditions(model, batch=2, seed=seed)
        take = 1 if guided else 2
        start = (noisy["video"][:take], noisy["audio"][:take], condition, timesteps(3, 2.0))
        scale = Guidance(5.0, 3.0) if guided else Guidance(1.0, 1.0)
        expected = sample(model, *start, guidance=scale)
        for _ in range(2):
            actual = sample(graphs, *start, guidance=scale)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
            assert actual[0].isfinite().all()
    assert (recorder.captures, recorder.replays) == (1, 12)


def test_guidance_in_an_interval_has_a_graph_for_each_half() -> None:
    """Timesteps 1000, 800, ... 200: both halves, the conditional one, both, the conditional one, and it again."""
    model = small_model()
    graphs, recorder = graphed(model)
    for seed in (0, 1):
        noisy, condition = conditions(model, batch=4, seed=seed)
        start = (noisy["video"][:2], noisy["audio"][:2], condition, timesteps(5))
        options: dict[str, Any] = {
            "guidance": Guidance(5.0, 3.0), "plan": GuidancePlan(interval=(300, 1000), every=2), "solver": "ab2",
        }  # fmt: skip
        expected = sample(model, *start, **options)
        actual = sample(graphs, *start, **options)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert (recorder.captures, recorder.replays) == (2, 10)


def test_the_end_of_a_step_reaches_the_graph() -> None:
    model = small_model(step_input=True)
    graphs, recorder = graphed(model)
    noisy, condition = conditions(model)
    start = (noisy["video"], noisy["audio"], condition, timesteps(4))
    expected = sample(model, *start)
    assert all(torch.equal(a, e) for a, e in zip(sample(graphs, *start), expected, strict=True))
    assert (recorder.captures, recorder.replays) == (1, 4)


def test_masks_and_the_sound_first() -> None:
    model = small_model()
    graphs, recorder = graphed(model)
    noisy, condition = conditions(model)
    start = (noisy["video"], noisy["audio"], condition)
    expected = sample_in_order(model, *start, 4, order="sound_first")
    actual = sample_in_order(graphs, *start, 4, order="sound_first")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert recorder.captures == 2  # without masks and with them
    with torch.no_grad():
        for seed in (1, 2):
            other, _ = make_inputs(model.config, seed=seed)
            masks = frame_masks(2) if seed == 1 else {k: ~v for k, v in frame_masks(2).items()}
            a = graphs.denoise(**other, condition=condition, **masks)
            e = model.denoise(**other, condition=condition, **masks)
            assert torch.equal(a.video, e.video) and torch.equal(a.audio, e.audio)
    assert recorder.captures == 2


def test_results_stay_and_arguments_are_not_written() -> None:
    model = small_model()
    graphs, _ = graphed(model)
    noisy, condition = conditions(model)
    before = [x.clone() for layer in condition.layers for kv in layer.text for x in kv]
    with torch.no_grad():
        first = graphs.denoise(**noisy, condition=condition)
        kept = first.video.clone()
        graphs.denoise(**(noisy | {"timestep": noisy["timestep"] / 2}), condition=condition)
        other, another = conditions(model, seed=5)
        second = graphs.denoise(**other, condition=another)
        again = graphs.denoise(**noisy, condition=condition)
    assert torch.equal(first.video, kept) and torch.equal(again.video, kept) and not torch.equal(second.video, kept)
    after = [x for layer in condition.layers for kv in layer.text for x in kv]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_the_memory_of_keys_and_values_is_copied_once_as_it_lies() -> None:
    """k and v are views of one projection: same strides, same libraries' choices, no second copy."""
    from javis.sample.graph import _layout, _Static

    model = small_model()
    _, condition = conditions(model)
    k, v = condition.layers[0].text[0]
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    static = _Static(condition)
    sk, sv = static.value.layers[0].text[0]
    assert sk.untyped_storage().data_ptr() == sv.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
    assert sk.stride() == k.stride() and torch.equal(sk, k) and torch.equal(sv, v)
    assert type(static.value) is Conditioning and _layout(static.value) == _layout(condition)


def test_a_new_shape_is_captured_and_the_oldest_is_dropped() -> None:
    model = small_model()
    graphs, recorder = graphed(model, limit=2)
    clips = {n: conditions(model, batch=n) for n in (1, 2, 3)}
    with torch.no_grad():
        for n, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (3, 5)):
            noisy, condition = clips[n]
            out = graphs.denoise(**noisy, condition=condition)
            assert torch.equal(out.video, model.denoise(**noisy, condition=condition).video)
            assert recorder.captures == captures, n
            assert len(graphs) == min(2, captures)
    graphs.clear()
    assert len(graphs) == 0
    noisy, condition = clips[2]
    shorter = conditions(model, text_mask=torch.arange(6) < torch.tensor([[3], [2]]))[1]
    without = conditions(model, with_bidirectional=False)[1]
    with torch.no_grad():
        for told in (condition, shorter, without):
            out = graphs.denoise(**noisy, condition=told)
            assert torch.equal(out.video, model.denoise(**noisy, condition=told).video)
    assert recorder.captures == 8


def test_changed_weights_are_noticed() -> None:
    model = small_model()
    graphs, recorder = graphed(model)
    noisy, condition = conditions(model)
    with torch.no_grad():
        graphs.denoise(**noisy, condition=condition)
        model.load_state_dict(small_model(seed=3).state_dict(), assign=True)
        _, again = conditions(model)
        out = graphs.denoise(**noisy, condition=again)
        assert torch.equal(out.video, model.denoise(**noisy, condition=again).video)
    assert recorder.captures == 2 and len(graphs) == 1


def test_what_cannot_be_captured_is_refused() -> None:
    model = small_model()
    with pytest.raises(UsageError, match="needs a CUDA device, the model is on cpu; run without"):
        GraphedDenoiser(model, backend=CudaGraphs())
    with pytest.raises(UsageError, match="at least 1, got 0"):
        graphed(model, limit=0)
    with pytest.raises(UsageError, match="training mode"):
        graphed(small_model().train())
    hooked = small_model()
    hooked.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match=r"layers\.1 has forward hooks"):
        graphed(hooked)
    offloaded = small_model()
    offloaded.layers[0] = offloaded.layers[0].to("meta")
    with pytest.raises(UsageError, match="some parameters are on meta"):
        graphed(offloaded)
    graphs, recorder = graphed(model)
    noisy, condition = conditions(model)
    with pytest.raises(UsageError, match="no gradients"):
        graphs.denoise(**noisy, condition=condition)
    model.layers[0].register_forward_pre_hook(lambda *_: None)
    with torch.no_grad(), pytest.raises(UsageError, match="forward hooks"):
        graphs.denoise(**noisy, condition=condition)
    assert recorder.captures == 0 and isinstance(model.layers[0], nn.Module)


def test_a_failed_capture_says_why() -> None:
    model = small_model()
    noisy, condition = conditions(model)
    why = RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
    graphs = GraphedDenoiser(model, backend=Recorder(why))
    with torch.no_grad(), pytest.raises(FailedError, match=r"operation not permitted when stream is capturing\); run"):
        graphs.denoise(**noisy, condition=condition)
    assert len(graphs) == 0
    graphs = GraphedDenoiser(model, backend=Recorder(torch.OutOfMemoryError("CUDA out of memory")))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        graphs.denoise(**noisy, condition=condition)


def test_the_end_of_the_step_is_copied_in() -> None:
    """Of a student that takes it as input: a graph that kept the first end would make every later step wrong."""
    model = small_model(step_input=True)
    noisy, condition = conditions(model)
    graphs, recorder = graphed(model)
    with torch.no_grad():
        found = []
        for share in (0.9, 0.1):
            told = noisy | {"end": share * noisy["timestep"]}
            actual, expected = graphs.denoise(**told, condition=condition), model.denoise(**told, condition=condition)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
            found.append(actual.video)
    assert not torch.equal(*found) and recorder.captures == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    model = small_model(**{"hidden_size": 64}).cuda().bfloat16()
    graphs = GraphedDenoiser(model)
    for seed in (0, 1):
        noisy, told = make_inputs(small_config(hidden_size=64), seed=seed)
        noisy = {k: v.cuda() for k, v in noisy.items()}
        with torch.no_grad():
            condition = model.condition(**{k: v.cuda() if isinstance(v, Tensor) else v for k, v in told.items()})
            for share in (1.0, 0.5):
                at = noisy | {"timestep": noisy["timestep"] * share}
                actual = graphs.denoise(**at, condition=condition)
                expected = model.denoise(**at, condition=condition)
                for a, e in zip(actual, expected, strict=True):
                    torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)
    assert len(graphs) == 1
