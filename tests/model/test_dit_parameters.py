"""JavisDiT: gradients, the clock shared by both streams, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.model.config import JavisDiTConfig
from javis.model.embed import clock_positions

from .small import MODES, distance, frame_masks, make_inputs, run, small_config, small_model

# -- gradients ---------------------------------------------------------------------------------------------------------


def inert(name: str) -> slice | None:
    """Rows of a parameter that cannot matter, by algebra.

    A bias of the keys adds the same number to all scores of a query, which the softmax removes (no q/k norm there).
    """
    if name.endswith(("text.kv.bias", "spatial.attn.kv.bias", "temporal.attn.kv.bias")):
        return slice(0, 32)
    return None


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_every_parameter(mode: str) -> None:
    model = small_model(prior_mode=mode, temporal_prior_len=3).double()
    with torch.no_grad():  # small enough that no GELU unit sleeps in its flat tail
        for parameter in model.parameters():
            parameter.mul_(0.5)
    noisy, told = make_inputs(model.config)
    wide = [{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in d.items()}
            for d in (noisy, told)]  # fmt: skip
    null_spatial, null_temporal = model.null_prior
    told = wide[1]
    told["text"] = torch.stack((told["text"][0], model.null_text))
    told["spatial_prior"] = torch.stack((told["spatial_prior"][0], null_spatial))
    told["temporal_prior"] = torch.stack((told["temporal_prior"][0], null_temporal))
    told["text_mask"] = None
    out = model.denoise(**wide[0], condition=model.condition(**told), **frame_masks(2))
    (out.video.square().sum() + out.audio.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name == "embed.audio_text.null":  # tied to the video's; only kept for the official state dict
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        gradient = parameter.grad.clone()
        scale = gradient.abs().max()
        rows = inert(name)
        if rows is not None:
            assert gradient[rows].abs().max() < 1e-13 * scale, name
            gradient = gradient[rows.stop :]
        # "addition" adds the priors without looking at the stream, whose shift and scale are then idle.
        if mode == "addition" and ("_prior.modulation" in name or "prior_time_block" in name):
            gradient = gradient.unflatten(0, (9, -1))  # (shift, scale, gate) of both steps and of the MLP
            idle = torch.tensor([True, True, False, True, True, False, False, False, False])
            assert (gradient[idle] == 0).all(), name
            gradient = gradient[~idle]
        assert (gradient.reshape(len(gradient), -1).abs().amax(1) > 1e-11 * scale).all(), name


# -- the clock ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 12), factor=st.sampled_from([1, 3, 5]), size=st.sampled_from([8, 32]))
def test_equal_moments_have_equal_clocks(frames: int, factor: int, size: int) -> None:
    """With an odd number of audio tokens per video token, the middle one's moment is that of the video token."""
    video, audio = clock_positions(frames, frames, size), clock_positions(factor * frames, frames, size)
    torch.testing.assert_close(audio[factor // 2 :: factor], video, rtol=1e-5, atol=1e-5)
    if frames * factor > 1:
        assert (audio[1:] - audio[:-1]).abs().amax(dim=(1, 2)).min() > 1e-3  # and different ones do not


def test_clock_is_added_to_the_positions_and_off_by_default() -> None:
    plain, clocked = small_model(), small_model(clock=True)
    noisy, told = make_inputs(plain.config)
    with torch.no_grad():
        off, on = plain.condition(**told), clocked.condition(**told)
    assert off.video_positions.shape[1] == off.audio_positions.shape[1] == 1
    video, audio = on.video_positions - off.video_positions, on.audio_positions - off.audio_positions
    torch.testing.assert_close(video, clock_positions(3, 3, 32)[None].expand_as(video), atol=1e-5, rtol=0)
    torch.testing.assert_close(audio, clock_positions(3, 3, 32)[None].expand_as(audio), atol=1e-5, rtol=0)
    assert distance(run(plain, noisy, told), run(clocked, noisy, told)) > 1e-3


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": torch.zeros(2, 6, 9)}, r"text must be \[B, L, 8\]"),
        ({"text": torch.zeros(6, 8)}, r"text must be \[B, L, 8\]"),
        ({"text_mask": torch.ones(2, 5)}, "text_mask .* does not fit"),
        ({"text_mask": torch.tensor([[1] * 6, [0] * 6])}, "no valid token"),
        ({"spatial_prior": None}, "needs spatial_prior and temporal_prior"),
        ({"temporal_prior": None}, "needs spatial_prior and temporal_prior"),
        ({"spatial_prior": torch.zeros(2, 5, 7)}, r"spatial_prior must be \[2, 3, 7\]"),
        ({"temporal_prior": torch.zeros(1, 5, 7)}, r"temporal_prior must be \[2, 5, 7\]"),
        ({"prior_scope": "clip"}, "prior_scope 'clip'"),
    ],
)
def test_condition_errors(changes: dict[str, Any], message: str) -> None:
    model = small_model()
    _, told = make_inputs(model.config)
    with pytest.raises(ValueError, match=message):
        model.condition(**(told | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": torch.zeros(2, 4, 3, 4, 5)}, "do not fit the conditioning"),
        ({"audio": torch.zeros(2, 8, 9, 3)}, "do not fit the conditioning"),
        ({"video_mask": torch.ones(2, 4).bool()}, r"must be \[2, 3\], got \[2, 4\]"),
        ({"audio_mask": torch.ones(2, 3).bool()}, r"must be \[2, 10\], got \[2, 3\]"),
    ],
)
def test_denoise_errors(changes: dict[str, Tensor], message: str) -> None:
    model = small_model()
    noisy, told = make_inputs(model.config)
    with pytest.raises(ValueError, match=message):
        model.denoise(**(noisy | changes), condition=model.condition(**told))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "divisible by num_heads"),
        ({"hidden_size": 12, "num_heads": 4}, "must be even"),
        ({"hidden_size": 30, "num_heads": 3}, "divisible by 4"),
        ({"prior_mode": "add"}, "prior_mode 'add'"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
    with pytest.raises(ValueError, match="unknown model configuration fields"):
        JavisDiTConfig.from_dict(small_config().to_dict() | {"colour": 1})
    assert JavisDiTConfig.from_dict(small_config(clock=True).to_dict()) == small_config(clock=True)
