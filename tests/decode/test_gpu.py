"""What only a GPU shows: the kernel in the decode, activations in main memory, copies beside the decode, real peaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not (Path(__file__).resolve().parents[2] / "benchmarks/decode.py").is_file():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks.decode import TOY, Clip, make_codec, make_latents
from javis.decode import DecodeOptions, VideoDecoder, decode_peak_bytes
from javis.decode.video import to_bytes
from javis.kernels.testing import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = {
    "norms of the library": DecodeOptions(norms="library"),
    "kernel": DecodeOptions(norms="kernel"),
    "bands": DecodeOptions(rows=8),
    "bands in main memory": DecodeOptions(rows=8, storage="host"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_within_the_error_budget(name: str, dtype: torch.dtype) -> None:
    exact, plain = (
        make_codec(TOY, t, "cuda").decode(make_latents(TOY, t, "cuda"), TOY.frames).clamp(-1, 1)
        for t in (torch.float64, dtype)
    )
    decoder = VideoDecoder(make_codec(TOY, dtype, "cuda"), OPTIONS[name])
    y = decoder.decode(make_latents(TOY, dtype, "cuda"), TOY.frames)
    assert_within_budget(name, y, exact, plain)


def test_stream_is_the_decode() -> None:
    decoder = VideoDecoder(make_codec(TOY, torch.bfloat16, "cuda"), DecodeOptions(frames_at_once=3))
    z = make_latents(TOY, torch.bfloat16, "cuda")
    frames = torch.cat(list(decoder.stream(z[0], TOY.frames)))
    assert torch.equal(frames, to_bytes(decoder.decode(z, TOY.frames)[0].transpose(0, 1)).cpu())


@pytest.mark.parametrize("rows", [None, 64])
def test_peak_of_the_full_size_is_as_predicted(rows: int | None) -> None:
    """Within 15 %, and 256 MB for workspaces of libraries."""
    clip = Clip(frames=20, height=512, width=512)
    decoder = VideoDecoder(make_codec(clip, torch.bfloat16, "cuda"), DecodeOptions(rows=rows))
    z = make_latents(clip, torch.bfloat16, "cuda")
    batches = decoder.batches(z, clip.frames)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in decoder.stream(z[0], clip.frames):
        pass
    peak = torch.cuda.max_memory_allocated() - before
    expected = decode_peak_bytes(clip.frames, clip.height, clip.width, batches)
    assert 0.85 * expected <= peak <= 1.15 * expected + 2**28
