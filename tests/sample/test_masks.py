"""Condition masks: what is masked is the reference, the rest is left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from javis.errors import UsageError
from javis.sample.masks import (
    MaskedLatents,
    MaskGroup,
    Reference,
    apply_mask_strategies,
    audio_frames_per_video_frame,
    nearest_chunk_start,
    parse_mask_strategy,
    training_audio_masks,
)

FRAMES, AUDIO_FRAMES, SCALE = 15, 56, audio_frames_per_video_frame(24)
VIDEO, AUDIO = torch.randn(1, 2, FRAMES, 2, 2), torch.randn(1, 3, AUDIO_FRAMES, 4)
REFERENCE = Reference(torch.randn(2, 10, 2, 2), torch.randn(3, 36, 4))


def apply(strategy: str, **options: object) -> MaskedLatents:
    result = apply_mask_strategies(VIDEO, AUDIO, [[REFERENCE]], [strategy], audio_per_video=SCALE, **options)  # type: ignore[arg-type]
    assert result is not None
    return result


def frames(x: Tensor) -> Tensor:
    """[1, C, T, ...] -> [T, values of a frame]."""
    return x[0].transpose(0, 1).flatten(1)


def test_scale_is_five_latents_per_17_frames_and_40_ms() -> None:
    assert pytest.approx(17 / 24 / 5 / 0.04) == SCALE


@given(
    ref_start=st.integers(-10, 9),
    start=st.integers(-FRAMES, FRAMES - 1),
    length=st.integers(1, 20) | st.just(-1),
    ratio=st.sampled_from([0, 0.25, 0.5]),
    modality=st.sampled_from([0, 1]),
)
def test_video_frames_are_reference_or_untouched(
    ref_start: int, start: int, length: int, ratio: float, modality: int
) -> None:
    strategy = f"0,0,{ref_start},{start},{length},{ratio},{modality}"
    out = apply(strategy)
    first, source = start % FRAMES, ref_start % 10
    count = min(FRAMES if length == -1 else length, FRAMES - first, 10 - source)
    expected = torch.ones(FRAMES)
    expected[first : first + count] = ratio
    assert torch.equal(out.video_mask[0], expected)
    assert REFERENCE.video is not None
    assert torch.equal(out.video[0, :, first : first + count], REFERENCE.video[:, source : source + count])
    assert torch.equal(frames(out.video)[expected == 1], frames(VIDEO)[expected == 1])
    changed = out.audio_mask[0] != 1
    assert torch.equal(frames(out.audio)[~changed], frames(AUDIO)[~changed])
    if modality == 1:
        assert not changed.any()
    else:
        # The sound covers the time of the frames, down to the cut to whole audio frames, as far as the reference goes.
        a, b = int(first * SCALE), int(source * SCALE)
        n = min(int(count * SCALE), AUDIO_FRAMES - a, 36 - b)
        assert changed.nonzero().flatten().tolist() == list(range(a, a + n))
        assert REFERENCE.audio is not None
        assert torch.equal(out.audio[0, :, a : a + n], REFERENCE.audio[:, b : b + n])


def test_audio_alone_and_all_of_it() -> None:
    out = apply("0,0,0,2,0,0.5,2")
    start = int(2 * SCALE)
    assert (out.audio_mask[0] == 0.5).nonzero().flatten().tolist() == list(range(start, start + 36))
    assert torch.equal(out.video, VIDEO)
    assert (out.video_mask == 1).all()


def test_image_and_sound_give_all_of_the_sound() -> None:
    out = apply("0,0,0,0,1,0,3")
    assert out.video_mask[0].tolist() == [0.0] + [1.0] * 14
    assert (out.audio_mask == 0).all()
    assert REFERENCE.audio is not None
    assert torch.equal(out.audio[0, :, :36], REFERENCE.audio)


def test_no_strategy_other_loops_and_inputs_kept() -> None:
    before = VIDEO.clone()
    assert apply_mask_strategies(VIDEO, AUDIO, [], [], audio_per_video=SCALE) is None
    for strategy in ("", "1,0,0,0,1,0,0"):
        out = apply(strategy)
        assert (out.video_mask == 1).all()
        assert torch.equal(out.video, VIDEO)
    assert (apply("1,0,0,0,1,0,0", loop=1).video_mask[0, 0] == 0).all()
    apply("0,0,0,0,-1,0,0")
    assert torch.equal(VIDEO, before)


@given(value=st.integers(0, 40), chunk=st.integers(1, 9), chunks=st.integers(1, 6))
def test_aligned_starts_hold_a_whole_chunk(value: int, chunk: int, chunks: int) -> None:
    length = chunk * chunks
    got = nearest_chunk_start(min(value, length - 1), chunk, length)
    assert got % chunk == 0
    assert got + chunk <= length
    assert got in apply_nearest(min(value, length - 1), chunk, length)


def apply_nearest(value: int, chunk: int, length: int) -> list[int]:
    """All chunk starts at the smallest distance, by trying them."""
    starts = range(0, length - chunk + 1, chunk)
    least = min(abs(value - s) for s in starts)
    return [s for s in starts if abs(value - s) == least]


def test_alignment_moves_whole_chunks() -> None:
    out = apply("0,0,2,8,5,0,1", align=5)
    assert REFERENCE.video is not None
    assert (out.video_mask[0] == 0).nonzero().flatten().tolist() == [10, 11, 12, 13, 14]
    assert torch.equal(out.video[0, :, 10:], REFERENCE.video[:, :5])


def test_parsing() -> None:
    assert parse_mask_strategy("0,1,-5,2,3,0.5,3;1,0,0,0,1,0,2") == [
        MaskGroup(0, 1, -5, 2, 3, 0.5, 3),
        MaskGroup(1, 0, 0, 0, 1, 0.0, 2),
    ]
    assert parse_mask_strategy("0,1", fields=6) == [MaskGroup(0, 1, 0, 0, 1, 0.0)]
    assert parse_mask_strategy("") == []


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        ("0,0,0,0,1,0", "has 6 fields; expected 7"),
        ("0,0,0,0,1,0,0,0", "has 8 fields"),
        ("a,0,0,0,1,0,0", "whole numbers"),
        ("0,0,0,0,1,1.5,0", "not within 0..1"),
        ("0,0,0,0,1,nan,0", "not within 0..1"),
        ("0,0,0,0,1,0,7", "none of 0, 1, 2, 3"),
        ("0,4,0,0,1,0,0", "names reference 4"),
        ("0,0,0,0,-4,0,1", "do not fit"),
        (";", "has 1 fields"),
    ],
)
def test_unusable_strategies_are_named(strategy: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        apply(strategy)


def test_a_reference_without_the_needed_modality_is_named() -> None:
    with pytest.raises(UsageError, match="needs the audio of reference 0"):
        apply_mask_strategies(
            VIDEO, AUDIO, [[Reference(video=REFERENCE.video)]], ["0,0,0,0,1,0,0"], audio_per_video=SCALE
        )


def test_training_masks() -> None:
    video = torch.tensor([[False, False, True, True, True]] * 5)
    names = ["random", "image_head", "sound_image_animate", "audio_to_video", "video_to_audio"]
    masks = training_audio_masks(video, names, 10)
    assert masks.tolist() == [
        [False] * 4 + [True] * 6,
        [True] * 10,
        [False] * 10,
        [False] * 10,
        [True] * 10,
    ]
    with pytest.raises(ValueError, match="5 video masks"):
        training_audio_masks(video, ["random"], 10)
