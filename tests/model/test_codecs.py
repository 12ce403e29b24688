"""The linear codecs and the log-mel front end: exact inverses, principal components against numpy, onsets in time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from javis.model.codecs import (
    PatchAudioCodec,
    PatchTransform,
    PatchTransformConfig,
    PatchVideoCodec,
    RefinementConfig,
    build_codecs,
    codec_config,
)
from javis.model.vocoder import LogMel, LogMelConfig

RATE = 16000


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transform(channels: int, patch: tuple[int, ...], coefficients: int | None = None) -> PatchTransform:
    values = channels * math.prod(patch)
    return PatchTransform(PatchTransformConfig(channels=channels, patch=patch, coefficients=coefficients or values))


# -- patch transform ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 3),
    axes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_split_and_join(channels: int, axes: list[tuple[int, int]]) -> None:
    """Patches hold (channel, place) in row-major order; joining them gives the input back."""
    grid, patch = tuple(g for g, _ in axes), tuple(p for _, p in axes)
    sizes = tuple(g * p for g, p in axes)
    codec = transform(channels, patch)
    x = draw(2, channels, *sizes)
    patches = codec.split(x)
    assert patches.shape == (2, *grid, channels * math.prod(patch))
    for place in np.ndindex(*grid):
        window = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True))
        for b in range(2):
            assert torch.equal(patches[(b, *place)], x[(b, slice(None), *window)].flatten())
    assert torch.equal(codec.join(patches), x)


def test_partial_patches_and_impossible_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"\[4, 5\] must be multiples of the patch \(2, 2\)"):
        transform(1, (2, 2)).encode(draw(1, 1, 4, 5))
    for coefficients in (0, 5):
        with pytest.raises(ValueError, match=r"must be in 1\.\.4"):
            PatchTransformConfig(channels=1, patch=(2, 2), coefficients=coefficients)


def correlated(seed: int = 0) -> Tensor:
    """Smooth noise, so that few components hold most of the variance."""
    x = draw(6, 2, 8, 12, seed=seed)
    for _ in range(2):
        x = x + x.roll(1, -1) + x.roll(1, -2)
    return x + 0.7


@pytest.mark.parametrize("coefficients", [1, 5, 16])
def test_fit_finds_the_principal_components(coefficients: int) -> None:
    x = correlated()
    codec = transform(2, (2, 4), coefficients)
    shares = codec.fit(x)
    patches = x.reshape(6, 2, 4, 2, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16).double().numpy()
    centred = patches - patches.mean(0)
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    np.testing.assert_allclose(shares, variances[:coefficients] / variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(codec.mean, patches.mean(0), atol=1e-5)
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(coefficients), rtol=0, atol=1e-5)
    lost = (codec.decode(codec.encode(x)) - x).double().square().sum()
    assert float(lost) / variances.sum() == pytest.approx(1 - float(shares.sum()), abs=1e-5)


def test_latents_have_unit_variance_and_are_half_whitened() -> None:
    x = correlated()
    codec = transform(2, (2, 4), 6)
    shares = codec.fit(x)
    z = codec.encode(x).movedim(1, -1).flatten(0, -2).double()
    variance = z.var(0, correction=0)
    assert float(variance.mean()) == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    # Half whitening: the latents' standard deviation goes with the square root of that of the components.
    np.testing.assert_allclose(variance / variance[0], (shares / shares[0]).sqrt(), rtol=1e-3)
    correlation = (z.T @ z / len(z)) - torch.diag(variance)
    assert correlation.abs().max() < 1e-3


def test_full_rank_is_lossless() -> None:
    codec = transform(2, (2, 4))
    codec.fit(correlated())
    other = correlated(seed=5)
    torch.testing.assert_close(codec.decode(codec.encode(other)), other, rtol=1e-4, atol=1e-4)


# -- video -------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(1, 7))
def test_video_is_padded_with_its_last_frame_and_cropped(frames: int) -> None:
    codec = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(3, 4, 4), coefficients=144))
    x = draw(2, 3, frames, 8, 12).clamp(-1, 1)
    codec.transform.fit(draw(4, 3, 6, 8, 12))
    z = codec.encode(x)
    assert tuple(z.shape[2:]) == codec.latent_sizes(frames, 8, 12) == (-(-frames // 3), 2, 3)
    torch.testing.assert_close(codec.decode(z, frames), x, rtol=1e-3, atol=1e-3)
    padded = x[:, :, [min(i, frames - 1) for i in range(3 * z.shape[2])]]
    torch.testing.assert_close(z, codec.transform.encode(padded))


def test_decoded_video_stays_in_range() -> None:
    codec = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(1, 2, 2), coefficients=12))
    out = codec.decode(9 * draw(1, 12, 2, 3, 3), 2)
    assert float(out.min()) == -1 and float(out.max()) == 1


# -- refinement --------------------------------------------------------------------------------------------------------


def refined_codec(channels: int = 8) -> PatchVideoCodec:
    """Random convolutions behind a fitted transform of patches of two frames."""
    torch.manual_seed(5)
    codec = PatchVideoCodec(
        PatchTransformConfig(channels=3, patch=(2, 4, 4), coefficients=20), RefinementConfig(channels=channels)
    )
    codec.transform.fit(draw(4, 3, 6, 8, 8))
    assert codec.refinement is not None
    with torch.no_grad():
        for parameter in codec.refinement.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    return codec


def test_a_new_refinement_changes_nothing() -> None:
    plain = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 4, 4), coefficients=20))
    refined = PatchVideoCodec(plain.config, RefinementConfig(channels=4))
    plain.transform.fit(draw(4, 3, 6, 8, 8))
    refined.transform.load_state_dict(plain.transform.state_dict())
    z = 0.3 * draw(2, 20, 3, 2, 2)
    assert torch.equal(refined.decode(z, 5), plain.decode(z, 5))
    assert torch.equal(refined.encode(0.3 * draw(1, 3, 4, 8, 8)), plain.encode(0.3 * draw(1, 3, 4, 8, 8)))


def test_refinement_keeps_the_moments_apart() -> None:
    """Another latent changes its own frames and no others; a neighbour in space changes pixels across the border."""
    codec = refined_codec()
    z = 0.2 * draw(1, 20, 3, 2, 2)
    moved = z.clone()
    moved[:, :, 1] += 0.3
    before, after = codec.decode(z, 6), codec.decode(moved, 6)
    assert torch.equal(before[:, :, [0, 1, 4, 5]], after[:, :, [0, 1, 4, 5]])
    assert (before[:, :, 2:4] != after[:, :, 2:4]).any()
    aside = z.clone()
    aside[:, :, 0, 0, 0] += 0.3
    assert (codec.decode(aside, 6)[:, :, :2, :, 4:] != before[:, :, :2, :, 4:]).any()


def test_refinement_is_the_same_in_any_batch_and_crops() -> None:
    codec = refined_codec()
    z = 0.2 * draw(3, 20, 4, 3, 2)
    together = codec.decode(z, 7)
    assert together.shape == (3, 3, 7, 12, 8) and together.abs().max() <= 1
    for i in range(3):
        assert torch.equal(codec.decode(z[i : i + 1], 7)[0], together[i])


def test_refinement_against_its_definition() -> None:
    """Frame pairs as six channels, 2 x 2 pixels as four: written out again with slices, in float64."""
    codec = refined_codec().double()
    net = codec.refinement
    assert net is not None
    z = 0.2 * draw(1, 20, 2, 2, 3).double()
    plain = codec.transform.decode(z)
    out = codec.decode(z, 4)
    for t in range(2):
        pair = torch.stack([plain[0, c, 2 * t + f] for c in range(3) for f in range(2)])
        cells = torch.stack([pair[k, i::2, j::2] for k in range(6) for i in range(2) for j in range(2)])

        def layer(conv: torch.nn.Conv2d, x: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
            h, w = x.shape[1:]
            windows = torch.stack([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], dim=1)
            assert conv.bias is not None
            return torch.einsum("ock,ckhw->ohw", conv.weight.flatten(2), windows) + conv.bias[:, None, None]

        def silu(x: Tensor) -> Tensor:
            return x / (1 + torch.exp(-x))

        y = silu(layer(net.second, silu(layer(net.first, cells))))
        added = layer(net.last, y + silu(layer(net.third, y)))
        for c in range(3):
            for f in range(2):
                expected = plain[0, c, 2 * t + f].clone()
                for i in range(2):
                    for j in range(2):
                        expected[i::2, j::2] += added[4 * (2 * c + f) + 2 * i + j]
                torch.testing.assert_close(out[0, c, 2 * t + f], expected.clamp(-1, 1))


def test_refinement_configuration() -> None:
    codec = refined_codec(6)
    audio = PatchAudioCodec(PatchTransformConfig(channels=1, patch=(8, 16), coefficients=9), LogMelConfig())
    again, _ = build_codecs(json.loads(json.dumps(codec_config(codec, audio))))
    again.load_state_dict(codec.state_dict(), strict=True)
    z = 0.2 * draw(1, 20, 2, 2, 2)
    assert torch.equal(again.decode(z, 4), codec.decode(z, 4))
    with pytest.raises(ValueError, match="must be even"):
        PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 3, 4), coefficients=4), RefinementConfig())
    with pytest.raises(ValueError, match="1..4096"):
        RefinementConfig(channels=0)


# -- log-mel -----------------------------------------------------------------------------------------------------------


def sine(hertz: float, seconds: float = 0.5, level: float = 0.5) -> Tensor:
    return level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


@pytest.mark.parametrize("band", [8, 20, 35, 50, 62])
def test_a_sine_peaks_in_its_mel_band(band: int) -> None:
    """Band b of n is centred at (b + 1) / (n + 1) of the way from 80 to 8000 Hz on the HTK mel scale."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (80, 8000))
    hertz = 700 * (10 ** ((low + (high - low) * (band + 1) / 65) / 2595) - 1)
    mel = LogMel(LogMelConfig()).encode(sine(hertz)[None])[0]
    inner = mel[8:-8]
    assert (inner.argmax(1) == band).all()
    quieter = LogMel(LogMelConfig()).encode(sine(hertz, level=0.05)[None])[0, 8:-8]
    # Three decades span -1..1, so a tenth of the amplitude is 2/3 lower.
    np.testing.assert_allclose((inner - quieter)[:, band], 2 / 3, atol=1e-3)


def test_silence_and_full_scale() -> None:
    mel = LogMel(LogMelConfig())
    assert (mel.encode(torch.zeros(1, 4000)) == mel.silence).all()
    assert float(mel.encode(sine(1000, level=1.0)[None]).max()) == pytest.approx(1, abs=0.25)


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 3000), frames=st.sampled_from([1, 4, 8]))
def test_audio_latents_have_the_promised_size(samples: int, frames: int) -> None:
    codec = PatchAudioCodec(PatchTransformConfig(channels=1, patch=(frames, 16), coefficients=5), LogMelConfig())
    z = codec.encode(0.1 * draw(2, samples))
    assert tuple(z.shape[2:]) == codec.latent_sizes(samples) == (math.ceil(math.ceil(samples / 125) / frames), 4)
    assert codec.decode(z, samples).shape == (2, samples)


# -- Griffin-Lim -------------------------------------------------------------------------------------------------------


def struck(at: float, hertz: float, seconds: float = 1.0) -> Tensor:
    """A decaying tone with a burst of noise that starts at ``at`` seconds."""
    t = torch.arange(round(seconds * RATE)) / RATE - at
    tone = torch.sin(2 * math.pi * hertz * t) * torch.exp(-t.clamp(min=0) / 0.12)
    burst = draw(len(t), seed=3) * torch.exp(-t.clamp(min=0) / 0.008)
    return torch.where(t >= 0, 0.4 * tone + 0.2 * burst, torch.zeros(()))


def onset(audio: Tensor) -> float:
    """First instant, in seconds, at which the level over 2 ms exceeds a third of its maximum."""
    level = audio.unfold(0, 32, 1).square().mean(1).sqrt()
    return (int((level > level.max() / 3).nonzero()[0]) + 16) / RATE


@pytest.mark.parametrize(("at", "hertz"), [(0.2, 440.0), (0.5011, 1200.0), (0.777, 3000.0)])
def test_round_trip_keeps_onset_and_pitch(at: float, hertz: float) -> None:
    audio = struck(at, hertz)
    mel = LogMel(LogMelConfig())
    back = mel.decode(mel.encode(audio[None]), RATE)[0]
    assert abs(onset(back) - onset(audio)) < 0.008
    after = back[round((at + 0.02) * RATE) :][: RATE // 8]
    spectrum = torch.fft.rfft(after * torch.hann_window(len(after)), 1 << 15).abs()
    heard = float(spectrum.argmax()) * RATE / (1 << 15)
    assert abs(12 * math.log2(heard / hertz)) < 1  # semitones; a mel band is wider
    silent = back[: round((at - 0.05) * RATE)]
    assert silent.abs().max() < 0.05 * back.abs().max()


def test_phases_follow_the_seed_whatever_the_batch() -> None:
    mel = LogMel(LogMelConfig(iterations=12))
    encoded = mel.encode(torch.stack((struck(0.2, 500.0, 0.6), struck(0.3, 900.0, 0.6), struck(0.1, 700.0, 0.6))))
    together = mel.decode(encoded, 9600, seeds=[5, 6, 7])
    for i in range(3):
        alone = mel.decode(encoded[i : i + 1], 9600, seeds=[5 + i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    assert torch.equal(mel.decode(encoded, 9600, seeds=[5, 6, 7]), together)
    assert (mel.decode(encoded, 9600, seeds=[5, 6, 8]) - together)[2].abs().max() > 1e-2
    assert torch.equal(mel.decode(encoded, 9600), mel.decode(encoded, 9600, seeds=[0, 1, 2]))


def test_decoding_any_length() -> None:
    mel = LogMel(LogMelConfig(iterations=2))
    encoded = mel.encode(struck(0.1, 600.0, 0.5)[None])
    for samples in (1, 124, 4000, 8000, 9999):
        out = mel.decode(encoded, samples)
        assert out.shape == (1, samples) and out.isfinite().all() and out.abs().max() <= 1
    assert mel.decode(encoded, 16000)[0, 10000:].abs().max() < 1e-3  # silence beyond what was encoded


# -- configuration -----------------------------------------------------------------------------------------------------


def test_configuration_survives_json() -> None:
    video = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(2, 4, 4), coefficients=7))
    audio = PatchAudioCodec(
        PatchTransformConfig(channels=1, patch=(8, 16), coefficients=9), LogMelConfig(bins=32, hop=100)
    )
    video.transform.fit(draw(2, 3, 4, 8, 8))
    again_video, again_audio = build_codecs(json.loads(json.dumps(codec_config(video, audio))))
    assert (again_video.config, again_audio.config) == (video.config, audio.config)
    assert again_audio.mel.config == audio.mel.config
    again_video.load_state_dict(video.state_dict(), strict=True)
    again_audio.load_state_dict(audio.state_dict(), strict=True)
    x, wave = draw(1, 3, 4, 8, 8), 0.1 * draw(1, 4000)
    assert torch.equal(again_video.encode(x), video.encode(x))
    assert torch.equal(again_audio.encode(wave), audio.encode(wave))
