"""The shared clock: the same moment looks the same in both streams, and the bidirectional attention starts there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from javis.model.blocks import BidirectionalBlock
from javis.model.config import JavisDiTConfig
from javis.model.embed import clock_rope
from javis.model.ops import ModelOps, apply_rope, bidirectional_attention

CONFIG = JavisDiTConfig(hidden_size=64, num_heads=4, depth=1, clock_attention=True)
HEAD = CONFIG.bidirectional_size // CONFIG.bidirectional_heads


@pytest.mark.parametrize(("frames", "audio_frames"), [(16, 32), (5, 14), (3, 3)])
def test_attention_starts_at_the_same_moment(frames: int, audio_frames: int) -> None:
    places, bands = 3, 2
    seen: list[tuple[Tensor, Tensor]] = []

    def record(q_video: Tensor, q_audio: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        seen.append((q_video, q_audio))
        return bidirectional_attention(q_video, q_audio, *rest)  # type: ignore[arg-type]

    block = BidirectionalBlock(CONFIG, ModelOps(bidirectional_attention=record))
    block.align_in_time()
    clock = (clock_rope(frames, places, frames, HEAD), clock_rope(audio_frames, bands, frames, HEAD))
    video, audio = torch.zeros(1, frames * places, 64), torch.zeros(1, audio_frames * bands, 64)
    with torch.no_grad():
        out = block(video, audio, clock)
    assert torch.equal(out[0], video) and torch.equal(out[1], audio)  # zero output weights: nothing changes at first
    scores = (seen[0][0] @ seen[0][1].transpose(1, 2))[0]
    seconds_video = ((torch.arange(frames) + 0.5) / frames).repeat_interleave(places)
    seconds_audio = ((torch.arange(audio_frames) + 0.5) / audio_frames).repeat_interleave(bands)
    apart = (seconds_video[:, None] - seconds_audio[None]).abs()
    best = apart.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    assert torch.allclose(best, apart.amin(1), atol=1e-6)


def test_rotation_depends_on_the_difference_of_moments_only() -> None:
    cos, sin = clock_rope(8, 1, 8, HEAD)
    q = torch.randn(HEAD).expand(8, HEAD)
    k = torch.randn(HEAD).expand(8, HEAD)
    scores = apply_rope(q, (cos, sin)) @ apply_rope(k, (cos, sin)).T
    for shift in range(-7, 8):
        diagonal = scores.diagonal(shift)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)


def test_without_it_the_block_is_that_of_the_official_model() -> None:
    block = BidirectionalBlock(replace(CONFIG, clock_attention=False), ModelOps())
    video, audio = torch.randn(2, 12, 64), torch.randn(2, 8, 64)
    still = (
        (torch.ones(12, HEAD // 2), torch.zeros(12, HEAD // 2)),
        (torch.ones(8, HEAD // 2), torch.zeros(8, HEAD // 2)),
    )
    with torch.no_grad():
        for plain, rotated in zip(block(video, audio), block(video, audio, still), strict=True):
            assert torch.allclose(plain, rotated, atol=1e-6)
