"""The image decoder against diffusers' own decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from javis.decode.image import Attention, ImageDecoderShape, ResBlock, Upsample, decode_whole, prepare
from javis.decode.ops import kernel_norm_silu, library_norm_silu
from javis.errors import UsageError
from javis.kernels.testing import assert_within_budget

from .codec import make_autoencoder


def features(dtype: torch.dtype = torch.float64, count: int = 2, size: tuple[int, int] = (5, 3)) -> torch.Tensor:
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("upsampling", ["fused", "plain"])
@pytest.mark.parametrize("norm", [library_norm_silu, kernel_norm_silu])
def test_equals_the_library_in_float64(upsampling: Any, norm: Any) -> None:
    vae, z = make_autoencoder(), features()
    y = decode_whole(prepare(vae, torch.float64, upsampling=upsampling), z, norm)
    torch.testing.assert_close(y, vae.decode(z).sample, rtol=1e-10, atol=1e-10)
    assert y.shape == (2, 3, 40, 24)


@pytest.mark.parametrize("norm", [library_norm_silu, kernel_norm_silu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_budget(dtype: torch.dtype, norm: Any) -> None:
    vae = make_autoencoder(torch.bfloat16)
    z = features(dtype, 4, (6, 8))
    plain = vae.to(dtype).decode(z).sample
    y = decode_whole(prepare(vae, dtype), z, norm)
    exact = vae.double().decode(z.double()).sample
    assert_within_budget("frames", y, exact, plain)


@pytest.mark.parametrize(
    "changes",
    [{"use_post_quant_conv": False}, {"mid_block_add_attention": False}, {"block_out_channels": (8, 16)}],
    ids=lambda c: next(iter(c)),
)
def test_other_architectures(changes: dict[str, Any]) -> None:
    vae, z = make_autoencoder(**changes), features()
    y = decode_whole(prepare(vae, torch.float64), z, library_norm_silu)
    torch.testing.assert_close(y, vae.decode(z).sample, rtol=1e-10, atol=1e-10)


def test_neither_features_nor_weights_are_written_to() -> None:
    vae, z = make_autoencoder(), features().contiguous(memory_format=torch.channels_last)
    before, weights = z.clone(), [p.clone() for p in vae.parameters()]
    first = decode_whole(prepare(vae, torch.float64), z, library_norm_silu)
    assert torch.equal(z, before)
    assert all(torch.equal(a, b) for a, b in zip(weights, vae.parameters(), strict=True))
    assert torch.equal(first, decode_whole(prepare(vae, torch.float64), z, library_norm_silu))


def test_steps_are_those_of_the_shape() -> None:
    """The full-size autoencoder, without values: two residual blocks and an attention, then three blocks a level."""
    import diffusers

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            up_block_types=["UpDecoderBlock2D"] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        )  # fmt: skip
    assert ImageDecoderShape.from_config(vae.config) == ImageDecoderShape()
    steps = prepare(vae, torch.bfloat16)
    blocks = [step for step in steps if isinstance(step, ResBlock)]
    assert [len(block.conv1.weight) for block in blocks] == [512] * 2 + [512] * 6 + [256] * 3 + [128] * 3
    assert [step.weight.shape for step in steps if isinstance(step, Upsample)] == [
        (512, 512, 4, 4), (512, 512, 4, 4), (256, 256, 4, 4)
    ]  # fmt: skip
    assert sum(isinstance(step, Attention) for step in steps) == 1


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match="UpDecoderBlock2D with silu"):
        prepare(make_autoencoder(act_fn="relu"), torch.float32)
