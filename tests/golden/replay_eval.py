"""eval*: arithmetic of the JavisBench metrics, under the official protocol."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from javis.eval.metrics import (
    audio_peaks,
    av_align,
    avh_score,
    class_grid,
    desync_scores,
    desync_segments,
    desync_windows,
    frechet_audio_distance,
    frechet_distance,
    javis_score,
    kernel_distance,
    onset_strength,
    segment_windows,
    video_peaks,
)

from .harness import GoldenCase

FRECHET_RTOL = 1e-3  # golden/README.md; float32 with singular values
COSINE_ATOL = 1e-6
STRENGTH_ATOL = 1e-4  # of dB, float32 there
GRID_ATOL = 1e-6


def replay(case: GoldenCase) -> None:
    for sub in case.children("out"):
        inputs = case.group(f"in.{sub}")
        if "fake_video" in inputs:
            replay_distances(case, sub, inputs)
        elif "frame_embed" in inputs:
            replay_cosines(case, sub, inputs)
        elif "wave" in inputs:
            replay_onsets(case, sub, inputs)
        elif "logits" in inputs:
            replay_desync(case, sub, inputs)
        elif f"out.{sub}.grid" in case:
            grid = case[f"out.{sub}.grid"]
            case.check(f"out.{sub}.grid", torch.tensor(class_grid(float(grid.max()), len(grid))), atol=GRID_ATOL)
    replay_tables(case)


def replay_distances(case: GoldenCase, sub: str, inputs: dict[str, Tensor]) -> None:
    video, real_video, audio, real_audio = (
        inputs[f"{kind}_{stream}"].numpy() for stream in ("video", "audio") for kind in ("fake", "real")
    )
    frechet = frechet_distance(video, real_video, protocol="official")
    figures = {
        "frechet": frechet,
        "polynomial_mmd": kernel_distance(video, real_video),
        "direct": torch.tensor(
            [
                frechet,
                kernel_distance(video, real_video, protocol="official"),
                frechet_audio_distance(audio, real_audio, protocol="official"),
            ]
        ),
    }
    for name in case.children(f"out.{sub}"):
        case.check(f"out.{sub}.{name}", figures[name], atol=1e-4, rtol=FRECHET_RTOL)


def replay_cosines(case: GoldenCase, sub: str, inputs: dict[str, Tensor]) -> None:
    frames = inputs["frame_embed"].numpy()
    windows = [frames[indices] for indices in inputs["window_indices"].numpy()]
    for key in case.keys(f"out.{sub}"):
        if key.endswith(".avh_score"):
            case.check(key, avh_score(frames, inputs["audio_embed"].numpy()), atol=COSINE_ATOL)
        elif share := re.fullmatch(r".*\.javis_score\.topk(\d+)", key):
            score = javis_score(
                windows, inputs["window_audio_embed"].numpy(), topk_min=int(share[1]), protocol="official"
            )
            case.check(key, score, atol=COSINE_ATOL)
        elif share := re.fullmatch(r".*\.javis_score\.topk(\d*\.\d+)", key):
            score = javis_score(
                windows, inputs["window_audio_embed"].numpy(), topk_min=float(share[1]), protocol="official"
            )
            case.check(key, score, atol=COSINE_ATOL)


def replay_onsets(case: GoldenCase, sub: str, inputs: dict[str, Tensor]) -> None:
    wave = inputs["wave"].numpy()
    told = re.search(r"(\d+) Hz", case.meta["keys"][f"in.{sub}.wave"]["what"])
    assert told, f"{case.name}: the sample rate of in.{sub}.wave is not told"
    rate = int(told[1])
    for key in case.keys(f"out.{sub}"):
        if key.endswith(".strength"):
            case.check(key, torch.tensor(onset_strength(wave, rate)), atol=STRENGTH_ATOL)
        elif limit := re.fullmatch(r".*\.max_(.+)", key):
            longest = None if limit[1] == "None" else float(limit[1])
            peaks = audio_peaks(wave, rate, max_seconds=longest)
            case.check(key, torch.tensor(peaks, dtype=torch.float64), atol=1e-9)


def replay_desync(case: GoldenCase, sub: str, inputs: dict[str, Tensor]) -> None:
    logits, grid = inputs["logits"].numpy(), case["out.desync.grid"].numpy()
    case.check(f"out.{sub}.scores_official", torch.tensor(desync_scores(logits, grid, protocol="official")), atol=1e-6)
    case.check(f"out.{sub}.scores_per_sample", torch.tensor(desync_scores(logits, grid)), atol=1e-6)


def replay_tables(case: GoldenCase) -> None:
    tables = case.meta.get("tables", {})
    for row in case.table("windows") if "windows" in tables else ():
        found = segment_windows(
            row["n_frames"],
            row["n_samples"],
            row["fps"],
            seconds=row["window_size_s"],
            overlap=row["window_overlap_s"],
            protocol="official",
        )
        assert [list(window) for window in found.video] == row["video_windows"], row
        assert [list(window) for window in found.audio] == row["audio_windows"], row
    for row in case.table("av_align_iou") if "av_align_iou" in tables else ():
        iou = av_align(row["video_peaks"], row["audio_peaks"], row["fps"], protocol="official")
        assert abs(iou - row["iou"]) < 1e-12, row
    for row in case.table("av_align_video_peaks") if "av_align_video_peaks" in tables else ():
        assert video_peaks(row["flow_trajectory"], row["fps"]) == row["video_peaks"], row
    for row in case.table("desync_windows") if "desync_windows" in tables else ():
        segments = row["num_segment_features"]
        assert desync_segments(row["video_frames"], row["audio_samples"]) == segments, row
        assert desync_windows(segments) == row["windows"], row
