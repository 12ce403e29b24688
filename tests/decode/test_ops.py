"""The exact algebra of the decoder's operations, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from javis.decode.ops import (
    attention,
    fused_upsample,
    fused_upsample_rows,
    kernel_norm_silu,
    library_norm_silu,
    norm_silu_for,
    plain_upsample,
    plain_upsample_rows,
    upsample_kernel,
)
from javis.errors import UsageError


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5), (8, 2)])
def test_upsampling_and_convolution_are_one_transposed_convolution(size: tuple[int, int]) -> None:
    x, weight, bias = random(2, 3, *size), random(5, 3, 3, 3, seed=1), random(5, seed=2)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    torch.testing.assert_close(fused_upsample(x, upsample_kernel(weight), bias), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain_upsample(x, weight, bias), expected, rtol=0, atol=0)


def test_kernel_of_a_single_tap() -> None:
    """By hand: a kernel that takes the pixel above sends each low-resolution pixel to rows 2 i + 1 and 2 i + 2."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 1] = 1
    x = torch.tensor([[1.0, 2.0]]).T[None, None]
    y = fused_upsample(x, upsample_kernel(weight), None)[0, 0]
    assert y.tolist() == [[0, 0], [1, 1], [1, 1], [2, 2]]


def test_it_takes_four_ninths_of_the_products() -> None:
    x, weight = random(1, 3, 16, 16), random(5, 3, 3, 3)
    counts = []
    for run, kernel in ((fused_upsample, upsample_kernel(weight)), (plain_upsample, weight)):
        with FlopCounterMode(display=False) as counter:
            run(x, kernel, None)
        counts.append(counter.get_total_flops())
    assert counts[0] * 9 == counts[1] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_summed_kernel_is_rounded_once(dtype: torch.dtype) -> None:
    weight = random(4, 4, 3, 3, dtype=dtype)
    exact = upsample_kernel(weight.double())
    assert torch.equal(upsample_kernel(weight), exact.to(dtype))


def test_rows_are_the_inner_rows_of_the_whole() -> None:
    x, weight, bias = random(1, 3, 6, 5), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    whole = plain_upsample(x, weight, bias)[:, :, 4:10]  # of rows 2, 3, 4
    part = x[:, :, 1:6]
    torch.testing.assert_close(fused_upsample_rows(part, upsample_kernel(weight), bias), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain_upsample_rows(part, weight, bias), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [None, 4, 100])
def test_attention_is_softmax_of_scaled_scores(block: int | None) -> None:
    channels = 6
    x = random(2, channels, 3, 5).to(memory_format=torch.channels_last)
    qkv = random(3 * channels, channels, seed=1), random(3 * channels, seed=2)
    out = random(channels, channels, seed=3), random(channels, seed=4)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = (tokens @ w.T + b for w, b in zip(qkv[0].chunk(3), qkv[1].chunk(3)))
    expected = torch.softmax(q @ k.transpose(1, 2) / channels**0.5, -1) @ v @ out[0].T + out[1]
    actual = attention(x, qkv, out, block=block)
    torch.testing.assert_close(actual, expected.transpose(1, 2).view(x.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (1, 8, 2, 4, 3)])
def test_both_norms_agree_and_keep_the_layout(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = random(*shape).contiguous(memory_format=last)
    arguments = (4, random(8, seed=1), random(8, seed=2), 1e-6)
    ours, theirs = kernel_norm_silu(x, *arguments), library_norm_silu(x, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert ours.is_contiguous(memory_format=last) and theirs.is_contiguous(memory_format=last)


def test_choice_of_the_norm() -> None:
    assert norm_silu_for("auto", torch.device("cpu")) is library_norm_silu
    assert norm_silu_for("kernel", torch.device("cpu")) is kernel_norm_silu
    assert norm_silu_for("library", torch.device("cuda")) is library_norm_silu
    with pytest.raises(UsageError, match="auto, kernel or library"):
        norm_silu_for("fast", torch.device("cpu"))  # type: ignore[arg-type]
