"""The whole model on the kernels equals the whole model on its default ops, forward and backward."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from javis.kernels import native
from javis.kernels.backend import Backend
from javis.kernels.triton_support import HAS_TRITON, interpreting
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT, Velocity
from javis.model.ops import ModelOps
from tests.kernels.preferring import expected, prefer

Result = tuple[Velocity, dict[str, Tensor]]
CONFIG = JavisDiTConfig(
    hidden_size=48, num_heads=2, depth=2, caption_channels=8, caption_length=4,
    spatial_prior_len=2, temporal_prior_len=2, prior_channels=8,
)  # fmt: skip


SAMPLING = {"folded_prior_injection"}  # the only op of the model that gradients keep away


def run(ops: ModelOps, masked: bool) -> Result:
    """One step of a model with random weights, and the gradients of all its parameters."""
    model = JavisDiT(CONFIG, ops)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for parameter in model.parameters():  # some start at zero and would hide what lies before them
        parameter.data = 0.1 * random(*parameter.shape)
    video, audio, time = random(2, 4, 3, 4, 4), random(2, 8, 8, 4), torch.tensor([300.0, 800.0])
    size = torch.tensor([32.0, 32.0])
    condition = {
        "text": random(2, 4, 8), "text_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
        "fps": torch.tensor([8.0, 8.0]), "height": size, "width": size,
        "spatial_prior": random(2, 2, 8), "temporal_prior": random(2, 2, 8),
        "video_sizes": (3, 4, 4), "audio_sizes": (8, 4),
    }  # fmt: skip
    masks = {}
    if masked:
        masks = {
            "video_mask": torch.tensor([[True, False, True], [False, True, True]]),
            "audio_mask": torch.arange(8).lt(4).expand(2, 8),
        }
    velocity = model.denoise(video, audio, time, model.condition(**condition), **masks)
    if not torch.is_grad_enabled():
        return velocity, {}
    (velocity.video.square().mean() + velocity.audio.square().mean()).backward()
    return velocity, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@cache
def on_default_ops(masked: bool) -> Result:
    return run(ModelOps(), masked)


def check(actual: Result, masked: bool) -> None:
    velocity, gradients = actual
    default, default_gradients = on_default_ops(masked)
    assert default.video.abs().max() > 0.01
    torch.testing.assert_close(velocity.video, default.video, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity.audio, default.audio, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == default_gradients.keys()
    for name, gradient in gradients.items():
        scale = default_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, default_gradients[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("masked", [False, True])
def test_on_the_kernels_that_auto_takes(masked: bool) -> None:
    check(run(ModelOps.fused(), masked), masked)


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
@pytest.mark.parametrize("masked", [False, True])
def test_on_every_cpu_kernel(masked: bool) -> None:
    ops, ran = prefer(Backend.CPU)
    check(run(ops, masked), masked)
    assert set(ran) == expected(Backend.CPU) - SAMPLING, dict(ran)


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
def test_sampling_on_every_cpu_kernel() -> None:
    """Without gradients the priors are folded and the captions cut; the velocity is that of training."""
    ops, ran = prefer(Backend.CPU)
    with torch.no_grad():
        velocity, _ = run(ops, False)
    assert set(ran) == expected(Backend.CPU), dict(ran)
    for actual, default in zip(velocity, on_default_ops(False)[0], strict=True):
        torch.testing.assert_close(actual, default.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or not interpreting(), reason="needs triton's interpreter")
@pytest.mark.parametrize("masked", [False, True])
def test_on_every_triton_kernel(masked: bool) -> None:
    ops, ran = prefer(Backend.TRITON)
    check(run(ops, masked), masked)
    assert set(ran) == expected(Backend.TRITON) - SAMPLING, dict(ran)
