"""Golden cases of sizes and condition masks (official datasets.aspect, prepare_latents, mask strategies)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from javis.data.sizes import audio_latent_shape, image_size, num_pixels, official_num_frames, waveform_length
from javis.errors import UsageError
from javis.sample.masks import (
    Reference,
    apply_mask_strategies,
    audio_frames_per_video_frame,
    nearest_chunk_start,
    parse_mask_strategy,
    training_audio_masks,
)

from .harness import GoldenCase


def image_sizes(table: dict[str, list[int] | None]) -> None:
    for key, expected in table.items():
        resolution, ratio = key.split("|")
        if expected is None:
            with pytest.raises(UsageError, match="has no size|unknown resolution"):
                image_size(resolution, ratio)
        else:
            assert image_size(resolution, ratio) == tuple(expected), key


def pixel_counts(table: dict[str, int]) -> None:
    assert {resolution: num_pixels(resolution) for resolution in table} == table


def frame_counts(table: list[list[Any]]) -> None:
    assert [[length, official_num_frames(length)] for length, _ in table] == table


def audio_latents(table: list[dict[str, Any]]) -> None:
    for row in table:
        seconds, shape = row["audio_length_in_s"], row["latent_shape"]
        assert audio_latent_shape(seconds, batch=shape[0]) == tuple(shape), seconds
        assert waveform_length(seconds) == row["original_waveform_length"], seconds


def chunk_starts(table: list[list[int]]) -> None:
    assert [[v, p, m, nearest_chunk_start(v, p, m)] for v, p, m, _ in table] == table


def strategies(table: dict[str, list[list[float]] | str]) -> None:
    for key, expected in table.items():
        text, _, fields = key.partition("|max_num_groups=")
        if isinstance(expected, str):  # the official exception
            with pytest.raises(UsageError, match="fields"):
                parse_mask_strategy(text, int(fields))
        else:
            groups = parse_mask_strategy(text, int(fields))
            assert [list(group)[: int(fields)] for group in groups] == expected, key


TABLES: dict[str, Callable[[Any], None]] = {
    "get_image_size": image_sizes,
    "get_num_pixels": pixel_counts,
    "get_num_frames": frame_counts,
    "audio_prepare_latents": audio_latents,
    "find_nearest_point": chunk_starts,
    "mask_strategy_parse": strategies,
}
# Inputs of the mask replays and remarks: nothing to compare.
INPUT_TABLES = ("mask_strategies", "mask_strategy_sizes", "train_mask_names", "notes")


def replay(case: GoldenCase) -> None:
    for name in case.meta.get("tables", {}):
        table = case.table(name)
        if name in INPUT_TABLES:
            continue
        assert name in TABLES, f"{case.name}: no replay for the table {name!r}"
        TABLES[name](table)
    replay_strategies(case)
    if "out.train_mask.audio" in case:
        target = case["out.train_mask.audio"]
        masks = training_audio_masks(
            case["in.train_mask.video"], case.meta["tables"]["train_mask_names"], target.shape[1]
        )
        case.check("out.train_mask.audio", masks, atol=0)


def replay_strategies(case: GoldenCase) -> None:
    given = case.group("in.mask")
    count = len([name for name in given if name.startswith("v_ref")])
    references = [Reference(given[f"v_ref{i}"], given[f"a_ref{i}"]) for i in range(count)]
    tables = case.meta.get("tables", {})
    for sub in case.children("out.mask"):
        for align in case.children(f"out.mask.{sub}"):
            prefix = f"out.mask.{sub}.{align}"
            sizes = tables["mask_strategy_sizes"]
            assert audio_frames_per_video_frame(sizes["fps"]) == sizes["v2a_t_scale"]
            result = apply_mask_strategies(
                torch.zeros_like(case[f"{prefix}.vz"]),
                torch.zeros_like(case[f"{prefix}.az"]),
                [references],
                [tables["mask_strategies"][sub]],
                audio_per_video=sizes["v2a_t_scale"],
                loop=sizes["loop_i"],
                align=int(align.removeprefix("align")) or None,
            )
            assert result is not None
            case.check(f"{prefix}.vmask", result.video_mask, atol=0)
            case.check(f"{prefix}.amask", result.audio_mask, atol=0)
            case.check(f"{prefix}.vz", result.video, atol=0)
            case.check(f"{prefix}.az", result.audio, atol=0)
