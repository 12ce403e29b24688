"""Windows in one batch against `TemporalVAE.decode` of each (which replays the official outputs in tests/golden)."""

from __future__ import annotations

import pytest
import torch

from javis.decode.ops import kernel_norm_silu, library_norm_silu
from javis.decode.temporal import decode_windows, double_time, prepare_temporal
from javis.kernels.testing import assert_within_budget
from javis.model.vae_temporal import channels_to_time

from .codec import latents, make_temporal


@pytest.mark.parametrize("norm", [library_norm_silu, kernel_norm_silu])
@pytest.mark.parametrize("frames", [1, 6, 17])
def test_equals_the_plain_decode_of_each_window(frames: int, norm: object) -> None:
    vae, z = make_temporal(), latents(frames, 3, 4, batch=3).double()
    y = decode_windows(prepare_temporal(vae, torch.float64), z, frames, norm)  # type: ignore[arg-type]
    expected = torch.cat([vae.decode(window, frames) for window in z.split(1)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_budget(dtype: torch.dtype) -> None:
    vae, z = make_temporal(torch.bfloat16), latents(17, 4, 4, batch=2).bfloat16().to(dtype)
    plain = vae.to(dtype).decode(z, 17)
    y = decode_windows(prepare_temporal(vae, dtype), z, 17, library_norm_silu)
    assert_within_budget("features", y, vae.double().decode(z.double(), 17), plain)


def test_frames_from_channels() -> None:
    x = torch.arange(2 * 6 * 3 * 2 * 2.0).view(2, 6, 3, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    y = double_time(x)
    assert torch.equal(y, channels_to_time(x))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_latents_are_not_written_to() -> None:
    vae, z = make_temporal(), latents(17, 3, 3).double().contiguous(memory_format=torch.channels_last_3d)
    before = z.clone()
    decode_windows(prepare_temporal(vae, torch.float64), z, 17, library_norm_silu)
    assert torch.equal(z, before)
