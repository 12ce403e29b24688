"""The upstream-equivalent baseline computes what the official code computes, and does the work it is timed for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from javis.sample import sample
from tests.golden import replay_rflow
from tests.golden.harness import GoldenCase, case_names, golden_dir
from tests.model.small import frame_masks, make_inputs, run, small_model

if not (Path(__file__).resolve().parents[1] / "benchmarks/baselines").is_dir():
    pytest.skip("needs a source tree", allow_module_level=True)
from benchmarks.baselines.upstream_equivalent import as_upstream


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_equals_our_model_over_the_whole_batch(batch: int, masked: bool) -> None:
    """At batch 1 our default; beyond, our form of the official leak between samples, which is not the default."""
    ours, upstream = small_model().double(), as_upstream(small_model().double())
    noisy, told = (in_float64(inputs) for inputs in make_inputs(ours.config, batch))
    masks = frame_masks(batch) if masked else {}
    actual = run(upstream, noisy, told, **masks)
    for scope in ("batch", "sample"):
        expected = run(ours, noisy, told | {"prior_scope": scope}, **masks)
        gap = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True))
        assert (gap < 1e-9) == (scope == "batch" or batch == 1), (scope, gap)


def test_it_does_the_repeated_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_upstream(small_model(depth=1))
    batch = 2
    noisy, told = make_inputs(model.config, batch)
    lengths: list[tuple[int, int, int]] = []
    plain = F.scaled_dot_product_attention

    def recording(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        lengths.append((q.shape[0], q.shape[2], k.shape[2]))
        return plain(q, k, v, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    run(model, noisy, told)
    frames, places = 3, 2 * 3  # latents of 3 x 4 x 6, patches of 1 x 2 x 2
    tokens = batch * frames * places
    assert (1, tokens, batch * frames * model.config.spatial_prior_len) in lengths
    assert (1, tokens, batch * places * model.config.temporal_prior_len) in lengths
    assert (batch * places, frames, frames) in lengths


def test_the_recorded_joint_batch_of_the_official_code() -> None:
    """Guidance in one batch, where the official prior attention mixes both halves: a different clip, recorded."""
    names = [name for name in case_names(golden_dir()) if name == "rflow_sample"]
    if not names:
        pytest.skip(f"no golden case rflow_sample in {golden_dir()}")
    case = GoldenCase.load(golden_dir(), "rflow_sample")
    model = as_upstream(replay_rflow.official_model(case))
    inputs, options = case.group("in"), case.config["sampler"]
    ratio = replay_rflow.timestep_ratio(inputs["height"], inputs["width"], inputs["num_frames"])[0]
    times = replay_rflow.timesteps(options["num_sampling_steps"], ratio)
    with torch.no_grad():
        condition = replay_rflow._guided_condition(model, case, None)
        latents = (inputs["latent.video"], inputs["latent.audio"])
        video, audio = sample(model, *latents, condition, times, guidance=options["cfg_scale"])
    case.check("info.joint_batch.final.video", video, atol=replay_rflow.TRAJECTORY_ATOL)
    case.check("info.joint_batch.final.audio", audio, atol=replay_rflow.TRAJECTORY_ATOL)
    assert (video - case["out.plain.final.video"]).abs().max() > 1  # and not what separate calls give
