"""The audio codec of the full-size pipeline: exact lengths, the official sizes, and the library's parts by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.data.sizes import audio_latent_shape, waveform_length
from javis.model.audio_vae import AUDIOLDM2_VAE, AudioLDM2Codec, AudioLDM2CodecConfig, VocoderConfig
from javis.model.mel import MelConfig, fixed_length_log_mel
from javis.model.video_vae import AutoencoderConfig

SCALING = 0.4110932946205139


@pytest.fixture(scope="module")
def codec() -> AudioLDM2Codec:
    torch.manual_seed(0)
    codec = AudioLDM2Codec(AudioLDM2CodecConfig.toy()).eval().requires_grad_(False)
    for parameter in codec.vocoder.parameters():  # the library's start is so small that its output is nearly zero
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return codec


def hifi_gan(state: dict[str, Tensor], mel: Tensor, config: VocoderConfig) -> Tensor:
    """HiFi-GAN's generator (Kong et al., 2020, section 2.2), [B, T, bins] -> [B, samples], in float64."""
    w = {name: value.double() for name, value in state.items()}

    def conv(x: Tensor, name: str, kernel: int, dilation: int = 1) -> Tensor:
        pad = dilation * (kernel - 1) // 2
        return F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=pad, dilation=dilation)

    x = conv(mel.double().transpose(1, 2), "conv_pre", 7)
    kernels = config.resblock_kernel_sizes
    for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)):
        name = f"upsampler.{i}"
        x = F.leaky_relu(x, config.leaky_relu_slope)
        pad = (kernel - rate) // 2
        x = F.conv_transpose1d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=rate, padding=pad)
        total = torch.zeros_like(x)
        for j, (size, dilations) in enumerate(zip(kernels, config.resblock_dilation_sizes, strict=True)):
            y, block = x, f"resblocks.{i * len(kernels) + j}"
            for k, dilation in enumerate(dilations):
                h = conv(F.leaky_relu(y, config.leaky_relu_slope), f"{block}.convs1.{k}", size, dilation)
                y = y + conv(F.leaky_relu(h, config.leaky_relu_slope), f"{block}.convs2.{k}", size)
            total = total + y
        x = total / len(kernels)
    return conv(F.leaky_relu(x, 0.01), "conv_post", 7).tanh()[:, 0]


def test_decoding_is_the_vae_and_the_vocoder(codec: AudioLDM2Codec) -> None:
    latents = torch.randn(2, 8, 8, 16)
    mel = codec.vae.decode(latents / SCALING).sample[:, 0]
    assert mel.shape == (2, 32, 64)
    expected = hifi_gan(codec.vocoder.state_dict(), mel, codec.config.vocoder)
    assert expected.shape[1] >= 5120 and expected[:, :5000].std() > 0.05
    wave = codec.decode(latents, 5000, seeds=[1, 2])
    assert wave.shape == (2, 5000) and wave.dtype == torch.float32
    torch.testing.assert_close(wave.double(), expected[:, :5000], atol=2e-5, rtol=0)


def test_a_sample_does_not_depend_on_the_batch_or_the_seed(codec: AudioLDM2Codec) -> None:
    latents = torch.randn(3, 8, 8, 16)
    together = codec.decode(latents, 5120)
    torch.testing.assert_close(codec.decode(latents[1:2], 5120, seeds=[7])[0], together[1], atol=1e-5, rtol=0)


def test_the_length_is_exact(codec: AudioLDM2Codec) -> None:
    latents = torch.randn(1, 8, 8, 16)  # 32 mel frames of 160 samples, and a few samples more from the vocoder
    long = codec.decode(latents, 5440)
    made = hifi_gan(codec.vocoder.state_dict(), codec.decode_mel(latents), codec.config.vocoder).shape[1]
    assert long.shape == (1, 5440) and 5120 <= made < 5440
    assert (long[:, made:] == 0).all() and long[:, made - 50 : made].abs().min() > 0
    for samples in (1, 4800, 5119, 5120):
        assert torch.equal(codec.decode(latents, samples), long[:, :samples])
    with pytest.raises(ValueError, match=r"8 latent frames are 5120 samples, 5441 were asked for"):
        codec.decode(latents, 5441)


def test_latent_sizes_are_the_official_ones(codec: AudioLDM2Codec) -> None:
    for fps in (8, 12, 16, 23.976, 24, 25, 29.97, 30, 60):
        for frames in range(1, 300):
            seconds = frames / fps
            samples = waveform_length(seconds)
            # From whole samples, since a waveform has no other length; at 16 per frame the rest is below a mel frame.
            assert codec.latent_sizes(samples) == audio_latent_shape(samples / 16000)[2:]
            made = codec.latent_sizes(samples)[0] * 4 * 160
            assert made + 2 * 160 >= samples, (fps, frames)
    assert codec.latent_sizes(32000) == (56, 16) and codec.latent_sizes(163840) == (256, 16)
    with pytest.raises(ValueError, match="at least one sample"):
        codec.latent_sizes(0)


@pytest.mark.parametrize("samples", [5120, 6000, 9120, 32000])
def test_encoding_is_the_mean_of_the_vae_on_the_mel(codec: AudioLDM2Codec, samples: int) -> None:
    audio = torch.randn(2, samples) * torch.tensor([[0.3], [0.01]])
    latents = codec.encode(audio)
    frames = 4 * codec.latent_sizes(samples)[0]
    mel = torch.stack([fixed_length_log_mel(wave, frames * 0.01) for wave in audio])
    assert mel.shape == (2, 1, frames, 64)
    torch.testing.assert_close(codec.log_mel(audio), mel, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents, codec.vae.encode(mel).latent_dist.mean * SCALING, atol=1e-5, rtol=0)
    assert latents.shape == (2, 8, *codec.latent_sizes(samples))
    assert codec.decode(latents, samples).shape == (2, samples)


def test_encoding_with_a_generator_samples(codec: AudioLDM2Codec) -> None:
    audio = torch.randn(1, 6000)

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    posterior = codec.vae.encode(codec.log_mel(audio)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=draw())
    expected = (posterior.mean + posterior.std * noise) * SCALING
    torch.testing.assert_close(codec.encode(audio, generator=draw()), expected, atol=1e-5, rtol=0)


def test_bfloat16(codec: AudioLDM2Codec) -> None:
    rounded = AudioLDM2Codec(codec.config)
    rounded.load_state_dict(codec.state_dict())
    rounded.to(torch.bfloat16)
    latents = torch.randn(1, 8, 8, 16)
    exact, wave = codec.decode(latents, 5000), rounded.decode(latents, 5000)
    assert wave.dtype == torch.float32 and rounded.encode(exact).dtype == torch.bfloat16
    assert 0 < (wave - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


def test_full_size_without_memory() -> None:
    with torch.device("meta"):
        full = AudioLDM2Codec()
    assert all(p.is_meta for p in full.parameters())
    count = 64 * 1024 * 7 + 1024 + 32 * 7 + 1  # first and last convolution
    widths = [1024 // 2**i for i in range(6)]
    for (first, width), kernel in zip(pairwise(widths), (16, 16, 8, 4, 4), strict=True):
        count += first * width * kernel + width + sum(6 * (width * width * size + width) for size in (3, 7, 11))
    assert sum(p.numel() for p in full.vocoder.parameters()) == count == 55_264_897
    assert sum(p.numel() for p in full.vae.parameters()) == 55_376_873  # that of AudioLDM, 55.4 M
    assert set(dict(full.named_buffers())) <= set(full.state_dict())


def test_from_the_meta_device(codec: AudioLDM2Codec) -> None:
    latents = torch.randn(1, 8, 8, 16)
    for load in (
        lambda e: e.to_empty(device="cpu").load_state_dict(codec.state_dict(), strict=True),
        lambda e: e.load_state_dict(codec.state_dict(), strict=True, assign=True),
    ):
        with torch.device("meta"):
            empty = AudioLDM2Codec(codec.config)
        load(empty)
        assert torch.equal(empty.decode(latents, 5000), codec.decode(latents, 5000))
    with pytest.raises(RuntimeError, match="Missing key"):
        codec.load_state_dict({n: v for n, v in codec.state_dict().items() if "conv_pre" not in n}, strict=True)


def test_configurations() -> None:
    full = AudioLDM2CodecConfig()
    for config in (full, AudioLDM2CodecConfig.toy()):
        assert AudioLDM2CodecConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    vocoder = {  # config.json of AudioLDM2's vocoder
        "architectures": ["SpeechT5HifiGan"], "initializer_range": 0.01, "leaky_relu_slope": 0.1, "model_in_dim": 64,
        "model_type": "hifigan", "normalize_before": False, "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3, "sampling_rate": 16000, "upsample_initial_channel": 1024,
        "upsample_kernel_sizes": [16, 16, 8, 4, 4], "upsample_rates": [5, 4, 2, 2, 2],
    }  # fmt: skip
    assert VocoderConfig.from_library(vocoder) == full.vocoder
    vae = {  # config.json of AudioLDM2's VAE
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512], "in_channels": 1, "latent_channels": 8,
        "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": SCALING,
    }  # fmt: skip
    assert AutoencoderConfig.from_library(vae) == full.vae == AUDIOLDM2_VAE
    with pytest.raises(ValueError, match="the mel has 80 bins"):
        AudioLDM2CodecConfig(mel=MelConfig(n_mels=80))
    with pytest.raises(ValueError, match="one per 160"):
        AudioLDM2CodecConfig(mel=MelConfig(hop_length=200))
