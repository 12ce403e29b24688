"""Condition masks: their frequencies, and what each kind gives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from javis.errors import UsageError
from javis.train.recipes.config import OFFICIAL_SHARES
from javis.train.recipes.masks import KINDS, NONE, audio_mask, draw_kind, draw_masks, video_mask


def test_thirteen_kinds_that_are_thirty_percent() -> None:
    assert len(OFFICIAL_SHARES) == 13
    assert sum(OFFICIAL_SHARES.values()) == pytest.approx(0.30, abs=1e-12)


def test_measured_frequencies_are_the_official_shares() -> None:
    """Within five standard deviations of a binomial count, for every kind."""
    draws, rng = 40_000, np.random.default_rng(1)
    found = Counter(draw_kind(rng, OFFICIAL_SHARES) for _ in range(draws))
    for kind, share in {**OFFICIAL_SHARES, NONE: 0.70}.items():
        assert abs(found[kind] - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5, kind
    assert set(found) == set(KINDS)


def masks(kind: str, frames: int, heard: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """1 = given, of picture and sound."""
    video = video_mask(np.random.default_rng(seed), kind, frames)
    return [int(not x) for x in video], [int(not x) for x in audio_mask(kind, video, heard)]


def test_kinds_that_leave_nothing_to_chance() -> None:
    none, every = [0] * 8, [1] * 8
    first, last = [1, *[0] * 7], [*[0] * 7, 1]
    assert masks(NONE, 8, 8) == (none, none)
    assert masks("video_to_audio", 8, 8) == (every, none)
    assert masks("audio_to_video", 8, 8) == (none, every)
    assert masks("sound_image_animate", 8, 8) == (first, every)
    assert masks("image_head", 8, 8) == (first, none)
    assert masks("image_tail", 8, 8) == (last, none)
    assert masks("image_head_tail", 8, 8) == ([1, *[0] * 6, 1], none)


def test_every_second_frame_from_either() -> None:
    seen = {tuple(masks("interpolate", 5, 5, seed)[0]) for seed in range(20)}
    assert seen == {(1, 0, 1, 0, 1), (0, 1, 0, 1, 0)}


@pytest.mark.parametrize(
    "kind", ["quarter_head", "quarter_tail", "quarter_head_tail", "quarter_random", "image_random"]
)
def test_a_quarter_at_most_and_where_the_name_says(kind: str) -> None:
    frames, lengths, begins = 16, set(), set()
    for seed in range(300):
        given, heard = masks(kind, frames, frames, seed)
        run = "".join(map(str, given))
        assert heard == (given if "quarter" in kind else [0] * frames)
        if kind.endswith("head_tail"):
            assert run.strip("1").strip("0") == "" and run == run[::-1]
            lengths.add(run.count("1") // 2)
        else:
            assert "1" in run and "0" not in run.strip("0"), run  # in one piece
            lengths.add(run.count("1"))
            begins.add(run.index("1"))
            assert ("head" not in kind or run[0] == "1") and ("tail" not in kind or run[-1] == "1")
    assert lengths == ({1} if "image" in kind else {1, 2, 3, 4})
    if kind.endswith("random"):
        assert {0, 15} & begins and len(begins) > 10


def test_random_frames_leave_something_and_vary() -> None:
    shares = []
    for seed in range(500):
        given = masks("random", 10, 20, seed)[0]
        assert not all(given)
        shares.append(sum(given) / 10)
    assert 0.42 < np.mean(shares) < 0.56  # the share itself is uniform in 0.1..0.9
    assert min(shares) <= 0.1 and max(shares) >= 0.8


@pytest.mark.parametrize("heard", [7, 40, 56, 64])
def test_sound_follows_the_picture_in_time(heard: int) -> None:
    """As nearest-neighbour interpolation of the picture's mask, the official rule."""
    for seed in range(30):
        video = video_mask(np.random.default_rng(seed), "quarter_random", 15)
        expected = F.interpolate(torch.from_numpy(video)[None, None].float(), size=heard, mode="nearest")[0, 0] > 0
        assert audio_mask("quarter_random", video, heard).tolist() == expected.tolist()


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_short_clips(kind: str, frames: int) -> None:
    """The official code divides by four and fails below four latent frames."""
    given, heard = masks(kind, frames, 4)
    assert len(given) == frames and len(heard) == 4
    if frames == 1:
        assert given == [int(kind == "video_to_audio")]


def test_a_batch_is_a_pure_function_of_the_generator() -> None:
    a, b = (draw_masks(np.random.default_rng(5), 200, 15, 56) for _ in range(2))
    assert a.kinds == b.kinds and torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)
    assert a.video.shape == (200, 15) and a.audio.shape == (200, 56) and a.video.dtype == torch.bool
    c = draw_masks(np.random.default_rng(6), 200, 15, 56)
    assert a.kinds != c.kinds
    assert draw_masks(np.random.default_rng(5), 50, 15, 56, {}).video.all()


def test_unusable_shares() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match=r"unknown condition masks \['head'\]; expected some of"):
        draw_masks(rng, 1, 4, 4, {"head": 0.1})
    with pytest.raises(UsageError, match="together at most 1"):
        draw_masks(rng, 1, 4, 4, {"random": 0.6, "interpolate": 0.6})
    with pytest.raises(UsageError, match="from 0 to 1"):
        draw_masks(rng, 1, 4, 4, {"random": -0.1})
    with pytest.raises(ValueError, match="at least one latent frame"):
        draw_masks(rng, 1, 0, 4)
    with pytest.raises(ValueError, match="unknown condition mask 'head'"):
        video_mask(rng, "head", 4)
