"""Official sizes: what the tables promise, and the rules beside them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from javis.data.sizes import (
    RATIO_NAMES,
    SIZES,
    audio_latent_length,
    audio_latent_shape,
    image_size,
    num_frames,
    num_pixels,
    official_num_frames,
    waveform_length,
)
from javis.errors import UsageError


@pytest.mark.parametrize("resolution", SIZES)
def test_sizes_keep_the_ratio_and_the_area(resolution: str) -> None:
    for ratio, name in RATIO_NAMES.items():
        if name not in SIZES[resolution]:
            continue
        height, width = image_size(resolution, ratio)
        assert (height, width) == image_size(resolution, name)
        assert height / width == pytest.approx(float(name), rel=0.03)
        assert height * width == pytest.approx(num_pixels(resolution), rel=0.06)


def test_known_sizes() -> None:
    assert image_size("720p", "9:16") == (720, 1280)
    assert image_size("240p", "16:9") == (426, 240)
    assert image_size("512", "1:1") == (512, 512)
    assert num_pixels("1080p") == 1080 * 1920


def test_missing_sizes_name_what_exists() -> None:
    with pytest.raises(UsageError, match="unknown resolution '721p'; use one of 144p"):
        image_size("721p", "9:16")
    with pytest.raises(UsageError, match="resolution 512 has no size for the ratio '9:16'.*use one of 12:25, 1:2, 1:1"):
        image_size("512", "9:16")
    with pytest.raises(UsageError, match="unknown resolution"):
        num_pixels("8k")


def test_frames() -> None:
    assert [official_num_frames(x) for x in ("1x", "2x", "2s", "4s", "17", 34)] == [51, 102, 51, 102, 17, 34]
    for bad in ("", "x", "-3", "0", "2.5s", "3s", "2 m", "1xx"):
        with pytest.raises(UsageError):
            official_num_frames(bad)
    assert num_frames(4, 24) == 96  # unlike the official "4s"
    assert num_frames(2.125, 24) == 51
    assert num_frames(0.001, 12) == 1
    for seconds, fps in ((0, 24), (-1, 24), (float("nan"), 24), (2, 0), (float("inf"), 24)):
        with pytest.raises(UsageError, match="must be positive"):
            num_frames(seconds, fps)


@given(seconds=st.floats(0.02, 30))
def test_audio_latents_cover_the_waveform(seconds: float) -> None:
    length = audio_latent_length(seconds)
    assert length % 8 == 0
    assert (length - 8) * 0.04 <= seconds < length * 0.04 + 0.011
    assert audio_latent_shape(seconds, batch=3) == (3, 8, length, 16)
    assert waveform_length(seconds) <= seconds * 16000 < waveform_length(seconds) + 1


def test_audio_lengths_that_floats_decide() -> None:
    assert audio_latent_length(0.57) == 16  # 0.57 / 0.01 is 56.99...
    assert audio_latent_length(None) == 256
    assert waveform_length(None) == 163840
    with pytest.raises(UsageError, match="must be positive"):
        audio_latent_length(-2)
