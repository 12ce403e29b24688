"""The metric of silhouettes: its formula, and what it is for, on real clips that went through the codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from javis import JavisPipeline
from javis.eval import shape_metric
from javis.eval.attributes import read_objects
from javis.eval.world_report import held_out_scenes, pipeline_codec, real_clips
from javis.world import WorldConfig


def test_distances_are_those_of_the_regularised_inverse_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    residuals = rng.standard_normal((40, 12)) * np.linspace(0.1, 3, 12)
    monkeypatch.setattr(shape_metric, "LEAST", 0.0)
    fitted = shape_metric.fit(residuals)
    unit, shares = fitted["directions"].astype(np.float32), fitted["shares"]
    monkeypatch.setattr(shape_metric, "directions", lambda: (unit, shares))
    covariance = residuals.T @ residuals / len(residuals)
    floor = shape_metric.FLOOR * np.trace(covariance) / 12
    others = rng.standard_normal((5, 12))
    exact = floor * np.einsum("ni,ni->n", others, np.linalg.solve(covariance + floor * np.eye(12), others.T).T)
    np.testing.assert_allclose(shape_metric.distances(others), exact, rtol=5e-3)  # directions are kept in float16


def test_the_packaged_directions_are_orthonormal() -> None:
    unit, shares = shape_metric.directions()
    np.testing.assert_allclose(unit @ unit.T, np.eye(len(unit)), atol=2e-3)
    assert (np.diff(shares) <= 0).all() and shape_metric.LEAST < shares[-1] <= shares[0] < 1


@pytest.mark.slow
def test_shapes_are_read_through_the_codec() -> None:
    """On scenes that the fit has not seen."""
    pipe = JavisPipeline.from_pretrained("demo")
    form = WorldConfig(size=pipe.size, fps=pipe.fps, sample_rate=pipe.sample_rate)
    wrong: list[Any] = []
    count = 0
    for clip in real_clips(held_out_scenes(100, 770_000, split="any", config=form)[:200], pipeline_codec(pipe)):
        found = {seen.colour: seen.shape for seen in read_objects(clip.video, clip.fps)}
        for clause in clip.clauses:
            count += 1
            if found.get(clause["colour"]) != clause["shape"]:
                wrong.append((clause["shape"], found.get(clause["colour"])))
    assert count == 300
    assert len(wrong) <= 3, wrong
