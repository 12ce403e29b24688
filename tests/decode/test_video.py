"""All of the decode against the plain codec: any number of frames, any batches, and when the memory runs out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from javis.decode import DecodeOptions, VideoDecoder, decode_frames
from javis.decode import video as module
from javis.decode.video import to_bytes
from javis.errors import FailedError, UsageError
from javis.kernels.testing import assert_within_budget
from javis.model.codecs import PatchTransformConfig, PatchVideoCodec

from .codec import latents, make_codec, randomise


@pytest.mark.parametrize(("frames", "batch"), [(1, 2), (17, 1), (20, 2), (40, 1)])
def test_equals_the_plain_codec(frames: int, batch: int) -> None:
    codec, z = make_codec(), latents(frames, 2, 3, batch=batch).double()
    expected = codec.decode(z, frames).clamp(-1, 1)
    y = VideoDecoder(codec).decode(z, frames)
    assert y.shape == (batch, 3, frames, 16, 24)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 4])
def test_within_the_error_budget(dtype: torch.dtype, rows: int | None) -> None:
    z = latents(20, 3, 3).bfloat16().float()
    exact, plain = (make_codec(t).decode(z.to(t), 20).clamp(-1, 1) for t in (torch.float64, dtype))
    y = VideoDecoder(make_codec(dtype), DecodeOptions(rows=rows)).decode(z, 20)
    assert_within_budget("frames", y, exact, plain)


def test_dtype_of_the_decode_is_not_that_of_the_weights() -> None:
    z = latents(5, 2, 2)
    y = VideoDecoder(make_codec(torch.float32), DecodeOptions(dtype=torch.bfloat16)).decode(z, 5)
    assert torch.equal(y, VideoDecoder(make_codec(torch.bfloat16)).decode(z, 5))


@pytest.mark.parametrize(
    "options",
    [{"frames_at_once": 1}, {"frames_at_once": 7}, {"windows_at_once": 1}, {"frames_at_once": 100}],
    ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()),
)
def test_batches_change_nothing(options: dict[str, int]) -> None:
    codec, z = make_codec(), latents(40, 2, 2).double()
    one = VideoDecoder(codec, DecodeOptions(frames_at_once=3, windows_at_once=2)).decode(z, 40)
    other = VideoDecoder(codec, DecodeOptions(**options)).decode(z, 40)
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_clips_of_a_batch_do_not_see_each_other() -> None:
    codec, z = make_codec(), latents(20, 2, 2, batch=2).double()
    both, alone = (VideoDecoder(codec).decode(part, 20) for part in (z, z[1:]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"frames_at_once": 6}, {"rows": 5}], ids=["whole", "bands"])
def test_stream_gives_the_frames_in_order(options: dict[str, int]) -> None:
    codec, z = make_codec(torch.float32), latents(20, 2, 3)
    decoder = VideoDecoder(codec, DecodeOptions(**options))
    chunks = list(decoder.stream(z[0], 20))
    assert [len(chunk) for chunk in chunks] == ([6, 6, 6, 2] if "frames_at_once" in options else [1] * 20)
    frames = torch.cat(chunks)
    expected = ((codec.decode(z, 20)[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 3, 0)
    assert frames.dtype == torch.uint8 and frames.shape == (20, 16, 24, 3) and frames.is_contiguous()
    assert (frames.float() - expected).abs().max() <= 1  # a rounding of float32 beside a half


def test_bytes_round_to_nearest_and_stay_in_range() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5 / 127.5, 1.0, 1.5]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_bytes(values)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


class Memory:
    """A device that holds so many frames at once; what was tried."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, frames: float, rows: int = 10**6, then: float | None = None
    ) -> None:
        """``then``: frames that fit once a call has succeeded."""
        self.tried: list[Any] = []
        self.frames = frames
        whole, banded = module.decode_whole, module.BandedDecoder

        def decode_whole(steps: Any, features: Tensor, norm: Any) -> Tensor:
            self.tried.append(len(features))
            if len(features) > self.frames:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.frames = self.frames if then is None else then
            return whole(steps, features, norm)

        def make(steps: Any, *, rows: int, storage: Any) -> Any:
            self.tried.append((rows, storage))
            if rows > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return banded(steps, rows=rows, storage=storage)

        most = rows
        monkeypatch.setattr(module, "decode_whole", decode_whole)
        monkeypatch.setattr(
            module, "BandedDecoder", lambda steps, **options: lambda frame: make(steps, **options)(frame)
        )


def choose(monkeypatch: pytest.MonkeyPatch, frames_at_once: int) -> None:
    original = module.choose_batches
    monkeypatch.setattr(
        module, "choose_batches", lambda *a, **k: replace(original(*a, **k), frames_at_once=frames_at_once, rows=None)
    )


def test_out_of_memory_makes_batches_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, z = make_codec(), latents(17, 2, 2).double()
    expected = VideoDecoder(codec).decode(z, 17)
    memory = Memory(monkeypatch, 3)
    choose(monkeypatch, 8)
    torch.testing.assert_close(VideoDecoder(codec).decode(z, 17), expected, rtol=1e-10, atol=1e-10)
    assert memory.tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 1]


def test_out_of_memory_for_one_frame_goes_to_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, z = make_codec(), latents(2, 2, 2).double()
    expected = VideoDecoder(codec).decode(z, 2)
    memory = Memory(monkeypatch, 0.5, rows=20)
    choose(monkeypatch, 2)
    torch.testing.assert_close(VideoDecoder(codec).decode(z, 2), expected, rtol=1e-10, atol=1e-10)
    assert memory.tried == [2, 1, (64, "device"), (64, "host"), (16, "host"), (16, "host")]


def test_what_is_decoded_stays_when_the_memory_runs_out_later(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, z = make_codec(), latents(5, 2, 2).double()
    expected = VideoDecoder(codec).decode(z, 5)
    memory = Memory(monkeypatch, 2, then=0.5)
    choose(monkeypatch, 2)
    torch.testing.assert_close(VideoDecoder(codec).decode(z, 5), expected, rtol=1e-10, atol=1e-10)
    assert memory.tried == [2, 2, 1, (64, "device"), (64, "device"), (64, "device")]


def test_out_of_memory_for_bands_and_for_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, z = make_codec(), latents(2, 2, 2).double()
    Memory(monkeypatch, 0.5, rows=0)
    with pytest.raises(FailedError, match="bands of 16 rows; free memory"):
        VideoDecoder(codec).decode(z, 2)
    with pytest.raises(FailedError, match="decoding 2 at once"):
        VideoDecoder(codec, DecodeOptions(frames_at_once=2)).decode(z, 2)


def test_other_errors_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(module, "decode_whole", broken)
    with pytest.raises(RuntimeError, match="something else"):
        VideoDecoder(make_codec()).decode(latents(1, 2, 2).double(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames_at_once": 0}, "frames_at_once must be at least 1"),
        ({"rows": -1}, "rows must be at least 1"),
        ({"storage": "disk"}, "device or host"),
        ({"upsampling": "bilinear"}, "fused or plain"),
    ],
)
def test_unusable_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DecodeOptions(**options)


def test_unusable_input() -> None:
    decoder = VideoDecoder(make_codec())
    with pytest.raises(ValueError, match="20 frames have 6 latent frames, got latents"):
        decoder.decode(latents(17, 2, 2), 20)
    with pytest.raises(ValueError, match="at least one frame"):
        decoder.decode(latents(17, 2, 2), 0)
    with pytest.raises(UsageError, match="AutoencoderKL, got PatchVideoCodec"):
        VideoDecoder(PatchVideoCodec(PatchTransformConfig(channels=3, patch=(1, 2, 2), coefficients=4)))


def test_the_codec_of_the_full_size_pipeline() -> None:
    from javis.model.video_vae import OpenSoraVideoCodec, OpenSoraVideoCodecConfig

    codec = OpenSoraVideoCodec(OpenSoraVideoCodecConfig.toy()).requires_grad_(False)
    randomise(codec)
    decoder, z = VideoDecoder(codec.double()), latents(20, 2, 3, batch=2).double()
    torch.testing.assert_close(decoder.decode(z, 20), codec.decode(z, 20), rtol=1e-9, atol=1e-9)
    expected = codec.float().decode(z.float(), 20)  # the decoder reads what the weights are now
    torch.testing.assert_close(decoder.decode(z.float(), 20), expected, rtol=1e-3, atol=1e-3)


def test_it_runs_without_values() -> None:
    """On the meta device, as `javis plan` counts it."""
    with torch.device("meta"):
        y = VideoDecoder(make_codec(torch.float32).to("meta")).decode(latents(20, 2, 3).to("meta"), 20)
    assert y.shape == (1, 3, 20, 16, 24) and y.device.type == "meta"


def test_frames_that_are_not_kept_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from javis.model.video_vae import OpenSoraVideoCodec, OpenSoraVideoCodecConfig

    codec = OpenSoraVideoCodec(OpenSoraVideoCodecConfig.toy()).requires_grad_(False)
    randomise(codec)
    z = latents(34, 2, 3, batch=2)
    expected = to_bytes(codec.decode(z, 34)[:, :, :30].transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 30))
    memory = Memory(monkeypatch, 100)
    frames = decode_frames(codec, z, 34, 30, DecodeOptions(frames_at_once=10))
    assert memory.tried == [10] * 6
    assert frames.dtype == np.uint8 and frames.shape == (2, 30, 16, 24, 3)
    assert np.abs(frames.astype(int) - expected.numpy()).max() <= 1
    assert VideoDecoder(codec).decode(z, 34, keep=30).shape == (2, 3, 30, 16, 24)


def test_linear_codecs_decode_themselves() -> None:
    codec = PatchVideoCodec(PatchTransformConfig(channels=3, patch=(1, 2, 2), coefficients=4)).requires_grad_(False)
    z = torch.randn(2, 4, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    frames = decode_frames(codec, z, 5, 4)
    expected = ((codec.decode(z, 5) + 1) * 127.5).round().byte()[:, :, :4].permute(0, 2, 3, 4, 1)
    assert np.array_equal(frames, expected.numpy())
