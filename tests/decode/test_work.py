"""Counts against PyTorch's FLOP counter and against what a decode allocates; batches against the counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from javis.decode import (
    Batches,
    DecodeOptions,
    ImageDecoderShape,
    VideoDecoder,
    choose_batches,
    decode_peak_bytes,
    decode_work,
)
from javis.decode.image import decode_whole, prepare
from javis.decode.ops import library_norm_silu
from javis.decode.temporal import decode_windows, prepare_temporal
from javis.decode.work import SHARE, band_peak_bytes, free_memory, image_layers
from javis.model.vae_temporal import TemporalVAE, TemporalVAEConfig

from .allocations import Allocations
from .codec import WIDTHS, latents, make_autoencoder, make_codec

TOY = {
    "image": ImageDecoderShape(widths=WIDTHS, layers=1, groups=4),
    "temporal": TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4),
}
FULL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}


@pytest.mark.parametrize("upsampling", ["fused", "plain"])
def test_flops_of_the_full_size_are_those_that_pytorch_counts(upsampling: Any) -> None:
    """Without values: 20 frames (a window of 17 and one of 3) of 256x192."""
    with torch.device("meta"):
        import diffusers

        vae = diffusers.AutoencoderKL(
            **FULL, up_block_types=["UpDecoderBlock2D"] * 4, down_block_types=["DownEncoderBlock2D"] * 4
        )
        temporal = TemporalVAE(TemporalVAEConfig())
        features, long, short = torch.randn(20, 4, 32, 24), torch.randn(1, 4, 5, 32, 24), torch.randn(1, 4, 1, 32, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decode_whole(prepare(vae, torch.float32, upsampling=upsampling), features, library_norm_silu)
        steps = prepare_temporal(temporal, torch.float32)
        decode_windows(steps, long, 17, library_norm_silu)
        decode_windows(steps, short, 3, library_norm_silu)
    assert decode_work(20, 256, 192, upsampling=upsampling).flops == counter.get_total_flops()


def test_work_grows_as_it_should() -> None:
    one = decode_work(17, 256, 256)
    assert decode_work(17, 256, 256, batch=3).flops == 3 * one.flops
    assert decode_work(34, 256, 256).flops == 2 * one.flops
    assert decode_work(17, 256, 256, dtype=torch.float32).bytes == 2 * one.bytes
    assert decode_work(17, 256, 256, upsampling="plain").flops > one.flops
    assert decode_work(17, 256, 256, frames_at_once=17).bytes < one.bytes


@pytest.mark.parametrize("upsampling", ["fused", "plain"])
@pytest.mark.parametrize(("frames", "size"), [(1, 6), (17, 8), (20, 4)])
def test_peak_is_what_a_decode_allocates(frames: int, size: int, upsampling: Any) -> None:
    decoder = VideoDecoder(
        make_codec(torch.float32), DecodeOptions(frames_at_once=4, windows_at_once=2, upsampling=upsampling)
    )
    z = latents(frames, size, size)[0]
    with Allocations() as watched:
        for chunk in decoder.stream(z, frames):
            del chunk
    expected = decode_peak_bytes(
        frames, 8 * size, 8 * size, Batches(min(4, frames), min(2, -(-frames // 17))), dtype=torch.float32,
        upsampling=upsampling, copies=False, **TOY,
    )  # fmt: skip
    assert watched.peak == pytest.approx(expected, rel=0.1)


def test_peak_of_bands_is_what_they_allocate() -> None:
    """Bounds from above, and not by much."""
    from javis.decode.tiled import BandedDecoder

    vae, z = make_autoencoder(torch.float32), torch.randn(1, 4, 16, 16)
    steps = prepare(vae, torch.float32)
    for rows in (4, 16, 64):
        with Allocations() as watched:
            BandedDecoder(steps, rows=rows)(z)
        bound = band_peak_bytes(128, 128, TOY["image"], torch.float32, rows, "device")
        assert watched.peak <= 1.05 * bound
        assert watched.peak >= 0.6 * bound


def test_layers_end_at_full_size() -> None:
    *_, last = image_layers(ImageDecoderShape(), 64, 32)
    assert (last.kind, last.channels_in, last.channels_out, last.places) == ("out", 128, 3, 512 * 256)


def test_batches_fit_into_their_share_and_use_it() -> None:
    gib = 2**30
    for free in (4 * gib, 8 * gib, 24 * gib, 80 * gib):
        batches = choose_batches(free, 51, 720, 1280, device="cuda")
        peak = decode_peak_bytes(51, 720, 1280, batches)
        assert peak <= SHARE["cuda"] * free + 0.3 * gib  # weights and features beside the activations
        if batches.rows is None:
            more = Batches(2 * batches.frames_at_once, batches.windows_at_once)
            busy = batches.frames_at_once * 720 * 1280 >= 8 * 512 * 512
            assert busy or decode_peak_bytes(51, 720, 1280, more) > SHARE["cuda"] * free
    assert choose_batches(80 * gib, 51, 720, 1280, device="cuda") == Batches(3, 3)
    assert choose_batches(80 * gib, 51, 512, 512, device="cuda") == Batches(8, 3)
    assert choose_batches(80 * gib, 1, 512, 512, device="cuda").frames_at_once == 1


def test_small_cards_get_bands() -> None:
    small = choose_batches(int(1.5 * 2**30), 51, 720, 1280, device="cuda")
    assert (small.frames_at_once, small.rows, small.storage) == (1, 64, "host")
    larger = choose_batches(int(1.82 * 2**30), 51, 720, 1280, device="cuda")
    assert (larger.rows, larger.storage) == (64, "device")
    on_card, on_host = (
        band_peak_bytes(720, 1280, ImageDecoderShape(), torch.bfloat16, 64, storage) for storage in ("device", "host")
    )
    assert on_host < 0.4 * on_card


def test_memory_that_is_not_known() -> None:
    assert choose_batches(None, 51, 512, 512, device="cpu") == Batches(1, 1)
    assert free_memory(torch.device("meta")) is None
    free = free_memory(torch.device("cpu"))
    assert free is not None and free > 2**20
