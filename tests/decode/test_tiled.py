"""Bands of rows give what whole frames give: no seams, unlike tiles that are decoded as pictures of their own."""

from __future__ import annotations

import pytest
import torch

from javis.decode.image import Norm, decode_whole, prepare
from javis.decode.ops import library_norm_silu
from javis.decode.tiled import BandedDecoder, Statistics
from javis.kernels.testing import assert_within_budget

from .allocations import Allocations
from .codec import make_autoencoder


def feature(height: int = 9, width: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A picture whose left and right halves differ, so that statistics of a part are not those of the whole."""
    z = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(5))
    return (z + torch.linspace(-3, 3, height)[:, None]).to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("upsampling", ["fused", "plain"])
@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
def test_equals_the_untiled_decode_in_float64(rows: int, upsampling: str) -> None:
    vae, z = make_autoencoder(), feature()
    steps = prepare(vae, torch.float64, upsampling=upsampling)  # type: ignore[arg-type]
    y = BandedDecoder(steps, rows=rows)(z)
    torch.testing.assert_close(y, vae.decode(z).sample, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_budget(dtype: torch.dtype) -> None:
    vae, z = make_autoencoder(torch.bfloat16), feature(dtype=dtype)
    plain = vae.to(dtype).decode(z).sample
    y = BandedDecoder(prepare(vae, dtype), rows=8)(z)
    assert_within_budget("frame", y, vae.double().decode(z.double()).sample, plain)


def test_no_seam_between_bands() -> None:
    """The difference to the untiled decode is rounding, and no larger beside a seam than elsewhere; blended tiles of
    the library differ by a part of the picture's range."""
    vae, z = make_autoencoder(torch.float32), feature(16, 16, torch.float32)
    whole = decode_whole(prepare(vae, torch.float32), z, library_norm_silu)
    rows = 16
    difference = (BandedDecoder(prepare(vae, torch.float32), rows=rows)(z) - whole).abs().amax(dim=(0, 1, 3))
    at_seams = torch.tensor([row % rows in (0, rows - 1) for row in range(len(difference))])
    scale = whole.abs().max()
    assert difference.max() <= 2e-5 * scale
    assert difference[at_seams].mean() <= 2 * difference[~at_seams].mean() + 1e-7 * scale
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    assert (vae.decode(z).sample - whole).abs().max() > 1e-2 * scale


def test_memory_follows_the_rows() -> None:
    vae, z = make_autoencoder(torch.float32), feature(16, 16, torch.float32)
    steps, peaks = prepare(vae, torch.float32), {}
    for rows in (8, 128):
        with Allocations() as watched:
            BandedDecoder(steps, rows=rows)(z)
        peaks[rows] = watched.peak
    with Allocations() as watched:
        decode_whole(steps, z, library_norm_silu)
    assert peaks[8] < 0.75 * watched.peak
    assert peaks[8] < 0.6 * peaks[128]


def test_statistics_of_bands_are_those_of_the_whole() -> None:
    x = torch.randn(1, 6, 10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3000
    x *= torch.arange(1, 7).view(1, 6, 1, 1)
    statistics = Statistics(3)
    for start, stop in ((0, 1), (1, 6), (6, 10)):
        statistics.add(x[:, :, start:stop])
    weight, bias = torch.linspace(0.5, 2, 6, dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)
    expected = torch.nn.functional.group_norm(x, 3, weight, bias, 1e-6)
    actual = statistics.affine(Norm(3, weight, bias, 1e-6), torch.float64)(x, silu=False)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_arguments() -> None:
    steps = prepare(make_autoencoder(), torch.float64)
    with pytest.raises(ValueError, match="at least one row"):
        BandedDecoder(steps, rows=0)
    with pytest.raises(ValueError, match="one frame, got 2"):
        BandedDecoder(steps, rows=4)(feature().expand(2, -1, -1, -1))
