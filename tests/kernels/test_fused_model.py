"""The whole model on the kernels equals the whole model on its default ops."""

from __future__ import annotations

import pytest
import torch

from javis.kernels import fused_ops, native
from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT
from javis.model.ops import ModelOps


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
@pytest.mark.parametrize("masked", [False, True])
def test_fused_model_equals_default_model(masked: bool) -> None:
    config = JavisDiTConfig(
        hidden_size=48, num_heads=2, depth=2, caption_channels=8, caption_length=4,
        spatial_prior_len=2, temporal_prior_len=2, prior_channels=8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    default, fused = JavisDiT(config), JavisDiT(config, ModelOps(**fused_ops()))
    for parameter in default.parameters():  # some start at zero and would hide what lies before them
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    fused.load_state_dict(default.state_dict())

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    video, audio, time = random(2, 4, 3, 4, 4), random(2, 8, 8, 4), torch.tensor([300.0, 800.0])
    size = torch.tensor([32.0, 32.0])
    condition = {
        "text": random(2, 4, 8), "fps": torch.tensor([8.0, 8.0]), "height": size, "width": size,
        "spatial_prior": random(2, 2, 8), "temporal_prior": random(2, 2, 8),
        "video_sizes": (3, 4, 4), "audio_sizes": (8, 4),
    }  # fmt: skip
    masks = {}
    if masked:
        masks = {
            "video_mask": torch.tensor([[True, False, True], [False, True, True]]),
            "audio_mask": torch.arange(8).lt(4).expand(2, 8),
        }
    results = []
    for model in (default, fused):
        model.zero_grad()
        velocity = model.denoise(video, audio, time, model.condition(**condition), **masks)
        (velocity.video.square().mean() + velocity.audio.square().mean()).backward()
        results.append((velocity, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, expected_gradients), (actual, gradients) = results
    assert expected.video.abs().max() > 0.01
    torch.testing.assert_close(actual.video, expected.video, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.audio, expected.audio, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
