"""A layer called as one module, as training calls it."""

from __future__ import annotations

import pytest
import torch

from javis.model.config import JavisDiTConfig
from javis.model.dit import JavisDiT

from ..tiny import randomize


@pytest.mark.parametrize("clock", [False, True])
@pytest.mark.parametrize("mode", ["cross_attn", "addition"])
def test_a_layer_in_one_call_is_condition_stream_and_meet(mode: str, clock: bool) -> None:
    """Values and gradients, in float64, where the two ways differ by rounding at most."""
    config = JavisDiTConfig(
        hidden_size=24, num_heads=2, depth=2, mlp_ratio=2.0, caption_channels=10, caption_length=6, prior_mode=mode,
        spatial_prior_len=3, temporal_prior_len=2, prior_channels=8, clock=clock, clock_attention=clock,
    )  # fmt: skip
    model = randomize(JavisDiT(config), 0).double()
    assert isinstance(model, JavisDiT)
    g = torch.Generator().manual_seed(1)
    video, audio = torch.randn(2, 4, 3, 4, 6, generator=g).double(), torch.randn(2, 8, 8, 4, generator=g).double()
    told = {
        "text": torch.randn(2, 6, 10, generator=g).double(), "text_mask": torch.arange(6).expand(2, -1) < 4,
        "fps": torch.full((2,), 24.0), "height": torch.full((2,), 32.0), "width": torch.full((2,), 48.0),
        "video_sizes": (3, 4, 6), "audio_sizes": (8, 4),
        "spatial_prior": torch.randn(2, 3, 8, generator=g).double(),
        "temporal_prior": torch.randn(2, 2, 8, generator=g).double(),
    }  # fmt: skip
    masks = {"video_mask": torch.arange(3).expand(2, -1) > 0, "audio_mask": torch.ones(2, 8, dtype=torch.bool)}
    t = torch.tensor([300.0, 700.0])

    def gradients(out: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor | None]:
        loss = out[0].square().sum() + out[1].square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    expected = model.denoise(video, audio, t, model.condition(**told), **masks)
    tokens, clip = model.prepare(**told)
    start = model.begin(video, audio, t, clip, **masks)
    v, a = start.video, start.audio
    for layer in model.layers:
        v, a = layer(v, a, start, tokens, clip)
    found = model.finish(v, a, start, video, audio, t, clip)
    for x, y in zip([*found, *gradients(found)], [*expected, *gradients(expected)], strict=True):
        assert (x is None) is (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
