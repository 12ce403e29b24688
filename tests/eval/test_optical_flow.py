"""The flow trajectory of AV-Align: a picture that moves by known amounts."""

from __future__ import annotations

import numpy as np
import pytest

from javis.eval.optical_flow import flow_method, flow_trajectory


def textured(steps: list[int]) -> np.ndarray:
    """Smooth random texture that moves to the right by ``steps`` pixels: uint8 [T, 96, 96, 3]."""
    rough = np.random.default_rng(0).normal(size=(160, 160))
    for axis in (0, 1):
        rough = sum(np.roll(rough, k, axis) * np.exp(-((k / 3) ** 2)) for k in range(-9, 10))
    grey = np.round(127 + 90 * rough / np.abs(rough).max()).astype(np.uint8)
    places = np.cumsum([0, *steps])
    return np.stack([np.repeat(np.roll(grey, p, 1)[32:128, 32:128, None], 3, -1) for p in places])


def test_farneback_gives_pixels_a_frame() -> None:
    pytest.importorskip("cv2")
    steps = [2, 0, 1, 3]
    found = flow_trajectory(textured(steps), "farneback")
    np.testing.assert_allclose(found, [2, *steps], atol=0.25)
    assert flow_method() == "farneback"


def test_frame_difference_in_closed_form() -> None:
    levels = np.array([0, 10, 10, 255, 3], np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (5, 8, 8, 3)).copy()
    np.testing.assert_array_equal(flow_trajectory(video, "frame_difference"), [10, 10, 0, 245, 252])
    assert flow_trajectory(video[:1]).tolist() == [0.0]


def test_without_opencv_the_method_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert flow_method() == "frame_difference"
    with pytest.raises(ImportError):
        flow_trajectory(np.zeros((2, 8, 8, 3), np.uint8), "farneback")


def test_other_arrays_are_refused() -> None:
    for bad in (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            flow_trajectory(bad)
