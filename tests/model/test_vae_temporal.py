"""The temporal video VAE: lengths of every clip, seams between chunks, causality, and the operations it is made of."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.model.vae_temporal import CausalConv3d, Posterior, TemporalVAE, TemporalVAEConfig, VideoVAE, channels_to_time

SHIFT, SCALE = (0.3, -0.2, 0.1), (2.0, 0.5, 1.5)


def make_vae(embed_dim: int = 3, downsample: tuple[bool, ...] = (False, True, True)) -> TemporalVAE:
    torch.manual_seed(0)
    config = TemporalVAEConfig(
        in_out_channels=2,
        latent_embed_dim=5,
        embed_dim=embed_dim,
        filters=4,
        num_res_blocks=1,
        channel_multipliers=(1,) * len(downsample) + (2,),
        temporal_downsample=downsample,
        num_groups=2,
    )
    return TemporalVAE(config).eval().requires_grad_(False)


VAE = make_vae()


def pipeline(chunk: int | None) -> VideoVAE:
    return VideoVAE(VAE, shift=SHIFT, scale=SCALE, micro_frame_size=chunk)


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 60), chunk=st.sampled_from([17, 16, 5, None]))
def test_lengths_of_any_clip(frames: int, chunk: int | None) -> None:
    vae = pipeline(chunk)
    whole, rest = divmod(frames, chunk) if chunk else (0, frames)
    latent_frames = whole * -(-(chunk or 0) // 4) + -(-rest // 4)
    assert vae.latent_size((frames, 18, 33)) == (latent_frames, 18, 33)
    assert vae.latent_size((frames, 18, 33), space_factor=8) == (latent_frames, 2, 4)
    latents = vae.encode(torch.zeros(1, 2, frames, 2, 2))
    assert latents.shape == (1, 3, latent_frames, 2, 2)
    assert vae.decode(latents, num_frames=frames).shape == (1, 2, frames, 2, 2)


def test_every_chunk_is_coded_as_if_it_stood_alone() -> None:
    vae = pipeline(17)
    x, noise = torch.randn(2, 2, 40, 3, 4), torch.randn(2, 3, 12, 3, 4)
    latents = vae.encode(x, noise=noise)
    frames = vae.decode(latents, num_frames=40)
    for of_x, of_z in ((slice(0, 17), slice(0, 5)), (slice(17, 34), slice(5, 10)), (slice(34, 40), slice(10, 12))):
        alone = vae.encode(x[:, :, of_x], noise=noise[:, :, of_z])
        torch.testing.assert_close(alone, latents[:, :, of_z], atol=1e-5, rtol=0)
        n = of_x.stop - of_x.start
        torch.testing.assert_close(vae.decode(alone, num_frames=n), frames[:, :, of_x], atol=1e-4, rtol=0)
    assert not torch.allclose(pipeline(None).encode(x[:, :, :34])[:, :, :5], latents[:, :, :5], atol=1e-3)


def test_latents_are_sampled_and_normalised_per_channel() -> None:
    x, noise = torch.randn(1, 2, 9, 2, 2), torch.randn(1, 3, 3, 2, 2)
    mean, logvar = VAE.encode(x)
    latents = pipeline(None).encode(x, noise=noise)
    for c in range(3):
        z = mean[:, c].double() + (logvar[:, c].double() / 2).exp() * noise[:, c].double()
        torch.testing.assert_close(latents[:, c].double(), (z - SHIFT[c]) / SCALE[c], atol=1e-5, rtol=0)
        assert (z - SHIFT[c]).abs().max() > 1e-3
    undone = latents * torch.tensor(SCALE).view(-1, 1, 1, 1) + torch.tensor(SHIFT).view(-1, 1, 1, 1)
    torch.testing.assert_close(pipeline(None).decode(latents, 9), VAE.decode(undone, 9), atol=1e-5, rtol=0)
    one, two = (pipeline(17).encode(x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)


def test_short_clips_are_padded_with_zeros_in_front() -> None:
    x = torch.randn(1, 2, 6, 3, 3)
    padded = torch.cat((torch.zeros(1, 2, 2, 3, 3), x), dim=2)
    torch.testing.assert_close(VAE.encode(x).mean, VAE.encode(padded).mean)
    z = torch.randn(1, 3, 2, 3, 3)
    assert torch.equal(VAE.decode(z, num_frames=6), VAE.decode(z, num_frames=8)[:, :, 2:])


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_causal_convolution_against_a_plain_loop(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, kernel, stride=stride).double()
    x = torch.randn(1, 2, 6, 4, 5).double()
    got = conv(x)
    weight, bias = conv.conv.weight, conv.conv.bias
    assert bias is not None
    assert got.shape == (1, 3, 6 // stride, 4, 5)
    r = kernel // 2
    for t in range(got.shape[2]):
        for h, w in ((0, 0), (3, 4), (2, 1)):
            total = bias.clone()
            for i in range(kernel):
                frame = t * stride + stride - kernel + i  # the last tap is the newest frame of this step
                for j in range(kernel):
                    for k in range(kernel):
                        y, z = h + j - r, w + k - r
                        if frame >= 0 and 0 <= y < 4 and 0 <= z < 5:
                            total = total + weight[:, :, i, j, k] @ x[0, :, frame, y, z]
            torch.testing.assert_close(got[0, :, t, h, w], total)


def test_channels_become_time_with_the_factor_as_the_fast_axis() -> None:
    x = torch.randn(2, 6, 3, 2, 2)
    expected = rearrange(x, "b (c s) t h w -> b c (t s) h w", s=2)
    assert torch.equal(channels_to_time(x), expected)


@pytest.mark.parametrize("downsample", [(True, False, False), (True, True, True), (False,)])
def test_other_time_factors(downsample: tuple[bool, ...]) -> None:
    vae, factor = make_vae(downsample=downsample), 2 ** sum(downsample)
    z = vae.encode(torch.randn(1, 2, 13, 2, 2)).mean
    assert z.shape[2] == -(-13 // factor)
    assert vae.decode(z, num_frames=13).shape[2] == 13


def test_posterior_clamps_and_draws() -> None:
    vae = make_vae()
    vae.quant_conv.conv.bias.data[3:] = 1e3
    posterior = vae.encode(torch.randn(1, 2, 4, 2, 2))
    assert posterior.logvar.max() == 20
    certain = Posterior(torch.ones(1, 3, 1, 2, 2), torch.full((1, 3, 1, 2, 2), -30.0))
    torch.testing.assert_close(certain.sample(), certain.mean, atol=1e-5, rtol=0)


class HalfSize:
    """A stand-in for the image VAE: averages 2x2 pixels, keeps two channels."""

    space_factor = 2

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images[:, :2], 2)

    def decode(self, features: Tensor) -> Tensor:
        return features.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, [0, 1, 0]]


def test_the_image_vae_sees_every_frame() -> None:
    vae = VideoVAE(VAE, image_vae=HalfSize())
    x, noise = torch.randn(2, 3, 18, 4, 6), torch.randn(2, 3, 6, 2, 3)
    features = torch.stack([HalfSize().encode(x[:, :, t]) for t in range(18)], dim=2)
    latents = vae.encode(x, noise=noise)
    torch.testing.assert_close(latents, VideoVAE(VAE).encode(features, noise=noise))
    assert vae.latent_size((18, 4, 6)) == tuple(latents.shape[2:])
    frames = vae.decode(latents, num_frames=18)
    assert frames.shape == x.shape
    assert torch.equal(frames[:, 0], frames[:, 2])


def test_unusable_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="9 frames have 3 latent frames, got 2"):
        VAE.decode(torch.zeros(1, 3, 2, 2, 2), num_frames=9)
    with pytest.raises(ValueError, match="40 frames have 12 latent frames"):
        pipeline(17).decode(torch.zeros(1, 3, 10, 2, 2), num_frames=40)
    with pytest.raises(ValueError, match="at least one frame"):
        pipeline(17).latent_size((0, 8, 8))
    with pytest.raises(ValueError, match="micro_frame_size"):
        pipeline(0)
    with pytest.raises(ValueError, match="2 places to downsample"):
        TemporalVAEConfig(channel_multipliers=(1, 2, 4), temporal_downsample=(True,))
    with pytest.raises(ValueError, match="num_groups"):
        TemporalVAEConfig(filters=12, num_groups=8)
