"""What sequence parallelism is made of, in one process: shards, combined softmaxes, places in the world."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from javis.errors import UsageError
from javis.kernels import native
from javis.kernels.ops.bidirectional_attention.lse import bidirectional_attention_lse
from javis.kernels.ops.bidirectional_attention.reference import bidirectional_attention_ref
from javis.kernels.testing import assert_within_budget
from javis.kernels.triton_support import HAS_TRITON
from javis.parallel import ParallelJavisDiT, Rank, rank_from_env
from javis.parallel.bidirectional import combine
from javis.parallel.collectives import span, split_sizes
from javis.parallel.ranks import clip_groups
from javis.parallel.shards import Shard

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))),
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
    "reference",
]


@given(st.integers(0, 500), st.integers(1, 64))
def test_shards_cover_the_axis_once_and_differ_by_one(length: int, parts: int) -> None:
    sizes = split_sizes(length, parts)
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1
    covered = [i for part in range(parts) for i in range(*span(sizes, part).indices(length))]
    assert covered == list(range(length))


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 6), st.integers(1, 8))
def test_latent_frames_go_with_their_frame_of_tokens(length: int, patch: int, places: int, ranks: int) -> None:
    grid = (-(-length // patch), places)
    shards = [Shard.of(length, patch, grid, ranks, rank) for rank in range(ranks)]
    owner = [rank for rank, shard in enumerate(shards) for _ in range(shard.frame.stop - shard.frame.start)]
    for rank, shard in enumerate(shards):
        assert [shard.latent_sizes, shard.frames] == [shards[0].latent_sizes, shards[0].frames]
        held = range(shard.latents.start, shard.latents.stop)
        assert list(held) == [i for i in range(length) if owner[i // patch] == rank]


def test_a_model_on_several_processes_is_not_for_training() -> None:
    with pytest.raises(UsageError, match="samples only; call condition once per clip, then denoise"):
        ParallelJavisDiT.forward(None)  # type: ignore[arg-type]


# -- one softmax from several parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_video_combine_to_all_of_it(backend: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    heads, parts = 2, [9, 1, 14]
    q_video, v_video = (torch.randn(2, 24, 16, generator=g).to(dtype) for _ in range(2))
    q_audio, v_audio = (torch.randn(2, 7, 16, generator=g).to(dtype) for _ in range(2))
    q_video[:, :9] *= 6  # parts of very unequal weight
    wide = [x.double() for x in (q_video, q_audio, v_video, v_audio)]
    exact, plain = (
        bidirectional_attention_ref(*wide, heads),
        bidirectional_attention_ref(q_video, q_audio, v_video, v_audio, heads),
    )
    made = [
        bidirectional_attention_lse(q, q_audio, v, v_audio, heads, backend=backend)
        for q, v in zip(q_video.split(parts, 1), v_video.split(parts, 1), strict=True)
    ]
    scores = torch.einsum("bihd,bjhd->bhij", *(x.unflatten(-1, (heads, -1)) for x in wide[:2])) / 8**0.5
    for (_, _, lse), rows in zip(made, scores.split(parts, 2), strict=True):
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), rows.exp().sum(2).log(), rtol=1e-5, atol=1e-5)
    assert_within_budget("to_video", torch.cat([part[0] for part in made], 1), exact[0], plain[0])
    together = combine(
        torch.stack([part[1].float() for part in made]), torch.stack([part[2].transpose(1, 2) for part in made])
    )
    if dtype is torch.float32:
        assert_within_budget("to_audio", together, exact[1], plain[1])
    else:  # the parts were rounded to bfloat16, and their weighted mean once more: half a unit each
        torch.testing.assert_close(together.double(), exact[1], rtol=2**-7, atol=2**-8)


def test_one_part_may_hold_all_of_the_weight() -> None:
    parts = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 2, 4)
    lse = torch.tensor([[-1e4, 700.0], [-1e4, -300.0], [-2e4, -1e9]]).view(3, 1, 2, 1)
    torch.testing.assert_close(combine(parts, lse), torch.tensor([1.5, 1.0]).view(1, 2, 1).expand(1, 2, 4))


def test_a_named_backend_runs_or_raises() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(UsageError, match="sdpa"):
        bidirectional_attention_lse(x, x, x, x, 2, backend="sdpa")
    with pytest.raises(ValueError, match="num_heads must divide"):
        bidirectional_attention_lse(x, x, x, x, 3)


# -- places in the world ----------------------------------------------------------------------------------------------


def test_the_place_comes_from_the_environment() -> None:
    assert rank_from_env({}) == Rank(0, 1, 0)
    assert rank_from_env({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Rank(5, 8, 1)
    assert rank_from_env({"RANK": "0", "WORLD_SIZE": "1"}) == Rank(0, 1, 0)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-3"},
    ],
)
def test_what_is_no_place(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="is no place among processes; start them with torchrun"):
        rank_from_env(environment)


def test_groups_must_come_out_even() -> None:
    assert [clip_groups(8, 1, 1), clip_groups(8, 2, 2), clip_groups(8, 1, 8), clip_groups(1, 1, 1)] == [8, 2, 1, 1]
    for cfg, seq in ((1, 3), (2, 3), (1, 16), (1, 0), (1, -2)):
        with pytest.raises(UsageError, match="8 processes cannot be divided"):
            clip_groups(8, cfg, seq)
    with pytest.raises(UsageError, match="guidance has two halves"):
        clip_groups(8, 3, 1)
