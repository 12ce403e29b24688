"""JavisDiT: gradients, prediction of samples, the clock shared by both streams, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.flow import add_noise
from javis.model.config import JavisDiTConfig
from javis.model.embed import clock_positions
from javis.model.final import velocity_of_sample

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


# -- prediction of samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pred_sigma", [False, True])
def test_predicted_samples_become_velocities(pred_sigma: bool) -> None:
    """x_t = x + s (noise - x) gives x - noise = (x - x_t) / s with s = t/1000, which is kept above 0.05."""
    direct, sample = (small_model(pred_sigma=pred_sigma, prediction=p) for p in ("velocity", "sample"))
    noisy, told = make_inputs(direct.config, batch=3)
    noisy["timestep"] = torch.tensor([1000.0, 300.0, 2.0])
    predicted, velocity = run(direct, noisy, told), run(sample, noisy, told)
    for name in ("video", "audio"):
        x, out, latents = getattr(predicted, name), getattr(velocity, name), noisy[name]
        count = latents.shape[1]
        for i, share in enumerate((1.0, 0.3, 0.05)):
            expected = (x[i, :count] - latents[i]) / share
            torch.testing.assert_close(out[i, :count], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[:, count:], x[:, count:], rtol=1e-5, atol=1e-5)
        assert out.shape == x.shape


@settings(max_examples=30, deadline=None)
@given(t=st.floats(50, 1000), seed=st.integers(0, 100))
def test_a_true_sample_gives_the_true_velocity(t: float, seed: int) -> None:
    x, noise = torch.randn(2, 1, 3, 4, 2, generator=torch.Generator().manual_seed(seed))
    time = torch.tensor([t])
    velocity = velocity_of_sample(x, add_noise(x, noise, time), time)
    torch.testing.assert_close(velocity, x - noise, rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(t=st.floats(50, 1000), sigma=st.floats(0.05, 2.0), seed=st.integers(0, 100))
def test_the_skip_weighs_prediction_against_input_by_least_squares(t: float, sigma: float, seed: int) -> None:
    """x minimises (x - out)^2 / sigma^2 + (x_t - (1 - s) x)^2 / s^2: two measurements of one value."""
    out, x_t = torch.randn(2, 1, 3, 4, 2, generator=torch.Generator().manual_seed(seed))
    s = t / 1000
    rows = torch.tensor([[1 / sigma], [(1 - s) / s]], dtype=torch.float64)
    seen = torch.stack((out.flatten() / sigma, x_t.flatten() / s)).double()
    expected = torch.linalg.lstsq(rows, seen).solution.view_as(out)
    velocity = velocity_of_sample(out, x_t, torch.tensor([t]), sigma)
    torch.testing.assert_close((x_t + s * velocity).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"sigma_data": -1.0, "prediction": "sample"}, {"sigma_data": 0.3}])
def test_a_skip_needs_a_predicted_sample(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        JavisDiTConfig(**change)


def test_bfloat16_does_not_coarsen_predicted_samples() -> None:
    """At little noise the error of the prediction is multiplied by up to 20; the last projection stays in float32."""
    model = small_model(prediction="sample")
    layer = model.video_final
    x, time = torch.randn(2, 6, 32), torch.randn(2, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = layer(x, time, None, None)
    assert out.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(out, layer(x, time, None, None), rtol=1e-5, atol=1e-5)


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
        ({"prediction": "noise"}, "prediction 'noise'"),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
    with pytest.raises(ValueError, match="unknown model configuration fields"):
        JavisDiTConfig.from_dict(small_config().to_dict() | {"colour": 1})
    assert JavisDiTConfig.from_dict(small_config(clock=True).to_dict()) == small_config(clock=True)
