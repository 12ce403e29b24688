"""The video codec of the full-size pipeline against its two halves, called one frame and one window at a time."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor

from javis.data.sizes import image_size
from javis.errors import UsageError
from javis.model.video_vae import AutoencoderConfig, OpenSoraVideoCodec, OpenSoraVideoCodecConfig

SHIFT = torch.tensor([-0.10, 0.34, 0.27, 0.98]).view(1, 4, 1, 1, 1)  # of Open-Sora's VAE 1.2
SCALE = torch.tensor([3.85, 2.32, 2.33, 3.06]).view(1, 4, 1, 1, 1)
FACTOR = 0.18215


@pytest.fixture(scope="module")
def codec() -> OpenSoraVideoCodec:
    torch.manual_seed(0)
    return OpenSoraVideoCodec(OpenSoraVideoCodecConfig.toy()).eval().requires_grad_(False)


def windows(frames: int) -> list[tuple[slice, slice]]:
    """(frames, latent frames) of every window: 17 frames are 5 latents, what remains is rounded up to fours."""
    found, start, latent = [], 0, 0
    while start < frames:
        n = min(17, frames - start)
        found.append((slice(start, start + n), slice(latent, latent + -(-n // 4))))
        start, latent = start + n, latent + -(-n // 4)
    return found


@pytest.mark.parametrize("frames", [1, 17, 18, 40])
def test_decoding_is_the_two_decoders_one_after_the_other(codec: OpenSoraVideoCodec, frames: int) -> None:
    spans = windows(frames)
    latents = torch.randn(2, 4, spans[-1][1].stop, 3, 2)
    video = codec.decode(latents, frames)
    assert video.shape == (2, 3, frames, 24, 16) and video.dtype == torch.float32
    z = latents * SCALE + SHIFT
    for of_frames, of_latents in spans:
        features = codec.temporal.decode(z[:, :, of_latents], of_frames.stop - of_frames.start)
        for i in range(features.shape[2]):
            image = codec.image.decode(features[:, :, i] / FACTOR).sample
            torch.testing.assert_close(video[:, :, of_frames.start + i], image.clamp(-1, 1), atol=2e-5, rtol=0)


def test_encoding_takes_the_means(codec: OpenSoraVideoCodec) -> None:
    video = torch.rand(2, 3, 20, 16, 24) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (2, 4, 6, 2, 3)
    for of_frames, of_latents in windows(20):
        images = [codec.image.encode(image).latent_dist.mean * FACTOR for image in video[:, :, of_frames].unbind(2)]
        mean = codec.temporal.encode(torch.stack(images, dim=2)).mean
        torch.testing.assert_close(latents[:, :, of_latents], (mean - SHIFT) / SCALE, atol=2e-5, rtol=0)


def test_encoding_with_a_generator_samples_both_posteriors(codec: OpenSoraVideoCodec) -> None:
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1

    def sample(seed: int) -> Tensor:
        return codec.encode(video, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1)) and not torch.allclose(sample(1), sample(2))
    generator = torch.Generator().manual_seed(3)
    features = torch.cat([
        codec.image.encode(batch).latent_dist.sample(generator) for batch in video[0].transpose(0, 1).split(4)
    ]) * FACTOR  # fmt: skip
    mean, logvar = codec.temporal.encode(features.transpose(0, 1)[None])
    noise = torch.randn(mean.shape, generator=generator)
    expected = (mean + (logvar / 2).exp() * noise - SHIFT) / SCALE
    torch.testing.assert_close(sample(3), expected, atol=2e-5, rtol=0)


def test_the_number_of_frames_at_once_changes_nothing(codec: OpenSoraVideoCodec) -> None:
    latents, video = torch.randn(2, 4, 3, 2, 2), torch.rand(2, 3, 9, 16, 16)
    for size in (1, 5, 100):
        config = OpenSoraVideoCodecConfig.from_dict({**codec.config.to_dict(), "micro_batch_size": size})
        other = OpenSoraVideoCodec(config)
        other.load_state_dict(codec.state_dict(), strict=True)
        torch.testing.assert_close(other.decode(latents, 9), codec.decode(latents, 9), atol=2e-5, rtol=0)
        torch.testing.assert_close(other.encode(video), codec.encode(video), atol=2e-5, rtol=0)


@pytest.mark.parametrize("frames", [2, 16, 19, 34, 51])
def test_decoding_gives_the_frames_that_were_asked_for(codec: OpenSoraVideoCodec, frames: int) -> None:
    sizes = codec.latent_sizes(frames, 8, 8)
    assert sizes == (windows(frames)[-1][1].stop, 1, 1)
    video = codec.decode(30 * torch.randn(1, 4, *sizes), frames)
    assert video.shape == (1, 3, frames, 8, 8) and video.abs().max() <= 1
    assert codec.encode(video).shape == (1, 4, *sizes)


def test_latent_sizes_of_official_clips(codec: OpenSoraVideoCodec) -> None:
    assert codec.latent_sizes(51, *image_size("240p", "9:16")) == (15, 30, 53)
    assert codec.latent_sizes(102, *image_size("360p", "9:16")) == (30, 45, 80)
    assert codec.latent_sizes(51, *image_size("720p", "9:16")) == (15, 90, 160)
    assert codec.latent_sizes(51, *image_size("512", "1:1")) == (15, 64, 64)
    assert codec.latent_sizes(40, 270, 480) == (12, 33, 60)


def test_latents_of_another_length_are_refused(codec: OpenSoraVideoCodec) -> None:
    with pytest.raises(ValueError, match="18 frames have 6 latent frames, got 5"):
        codec.decode(torch.randn(1, 4, 5, 1, 1), 18)


def test_bfloat16(codec: OpenSoraVideoCodec) -> None:
    rounded = OpenSoraVideoCodec(codec.config)
    rounded.load_state_dict(codec.state_dict())
    rounded.to(torch.bfloat16)
    latents = torch.randn(1, 4, 3, 2, 2)
    exact, video = codec.decode(latents, 9), rounded.decode(latents, 9)
    assert video.dtype == torch.bfloat16 and rounded.encode(exact).dtype == torch.bfloat16
    assert 0 < (video.float() - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_full_size_without_memory() -> None:
    with torch.device("meta"):
        full = OpenSoraVideoCodec()
    assert all(p.is_meta for p in full.parameters())
    assert sum(p.numel() for p in full.image.parameters()) == 83_653_863  # Stable Diffusion's VAE
    assert {name.split(".")[0] for name in full.state_dict()} == {"image", "temporal"}
    assert not list(full.buffers()), "a buffer that is no part of the state dict would stay on the meta device"
    # Temporal VAE: residual blocks (27 c c' + norms, + c c' on a shortcut), per level of the encoder and the decoder.
    widths = (128, 256, 256, 512)

    def blocks(first: int, width: int) -> int:
        shortcut = first * width if first != width else 0
        return 27 * first * width + 7 * 27 * width * width + shortcut + 2 * first + 2 * 7 * width

    level = sum(blocks(a, b) for a, b in zip((128, *widths[:-1]), widths, strict=True)) + blocks(512, 512)
    encoder = 27 * 4 * 128 + level + 2 * (27 * 256 * 256 + 256) + 2 * 512 + 512 * 8 + 8
    level = sum(blocks(a, b) for a, b in zip((*widths[1:], 512), widths, strict=True)) + blocks(512, 512)
    ups = 27 * 256 * 512 + 512 + 27 * 512 * 1024 + 1024
    decoder = 27 * 4 * 512 + 512 + level + ups + 2 * 128 + 27 * 128 * 4 + 4
    assert sum(p.numel() for p in full.temporal.parameters()) == encoder + decoder + (64 + 8) + (16 + 4)


def test_from_the_meta_device(codec: OpenSoraVideoCodec) -> None:
    latents = torch.randn(1, 4, 2, 2, 2)
    for load in (
        lambda e: e.to_empty(device="cpu").load_state_dict(codec.state_dict(), strict=True),
        lambda e: e.load_state_dict(codec.state_dict(), strict=True, assign=True),
    ):
        with torch.device("meta"):
            empty = OpenSoraVideoCodec(codec.config)
        assert empty.latent_sizes(17, 16, 16) == (5, 2, 2)  # also makes what must not stay there
        load(empty)
        assert torch.equal(empty.eval().decode(latents, 8), codec.decode(latents, 8))
    with pytest.raises(RuntimeError, match="Missing key"):
        codec.load_state_dict({n: v for n, v in codec.state_dict().items() if "decoder.conv1" not in n}, strict=True)


def test_configurations() -> None:
    full = OpenSoraVideoCodecConfig()
    for config in (full, OpenSoraVideoCodecConfig.toy()):
        assert OpenSoraVideoCodecConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    theirs = {  # config.json of the image VAE's weights
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3, "latent_channels": 4,
        "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.13025,
        "latents_mean": None, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    assert AutoencoderConfig.from_library(theirs, scaling_factor=FACTOR) == full.image
    with pytest.raises(ValueError, match="shift needs 4 values"):
        OpenSoraVideoCodecConfig(shift=(1.0,))
    with pytest.raises(ValueError, match="unknown AutoencoderConfig fields"):
        OpenSoraVideoCodecConfig.from_dict({"image": {"depth": 3}})


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"pip install 'javis\[full\]'"):
        OpenSoraVideoCodec(OpenSoraVideoCodecConfig.toy())
