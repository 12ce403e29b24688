"""The built-in model through the real command: what `make demo` does, with few steps and a short clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

import javis
from javis.media import read_clip

from .conftest import files

PACKAGE = Path(javis.__file__).parent
WEIGHTS = PACKAGE / "weights" / "demo"


def test_the_weights_are_in_the_package_and_small() -> None:
    """Safetensors and json only: the teacher at most 15 MB, both 25."""
    assert sorted(path.name for path in WEIGHTS.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        student = sum(file.get_tensor(name).nbytes for name in file.keys() if name.startswith("student."))  # noqa: SIM118
    assert (WEIGHTS / "model.safetensors").stat().st_size - student <= 15_000_000
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 25_000_000


def sample(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "javis", "sample", *arguments, "--steps", "1", "--seconds", "0.5"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        check=True,
        capture_output=True,
        timeout=300,
    )


def test_single_clips_equal_those_of_a_batch(tmp_path: Path) -> None:
    """Same seed, same clip, however it is made; and everything the contract names is there."""
    prompts = {"a": "a red ball bounces on the left", "b": "a small blue box swings on the right"}
    (tmp_path / "p.csv").write_text("id,prompt,seed\n" + "".join(f"{i},{p},7\n" for i, p in prompts.items()))
    sample(tmp_path, "--prompts", "p.csv", "--out", "many")
    sample(tmp_path, prompts["b"], "--seed", "7", "--out", "one/demo.mp4")
    made = {f"{stem}{suffix}" for stem in ("many/a", "many/b", "one/demo") for suffix in (".mp4", ".png", ".json")}
    assert files(tmp_path) == made | {"p.csv"}
    one, many = read_clip(tmp_path / "one/demo.mp4"), read_clip(tmp_path / "many/b.mp4")
    assert one.video.shape == (8, 256, 256, 3)
    assert one.audio.shape == (8000,)
    assert np.abs(one.video.astype(int) - many.video.astype(int)).mean() < 1
    assert np.abs(one.audio - many.audio).max() < 0.05
    other = read_clip(tmp_path / "many/a.mp4")
    assert np.abs(one.video.astype(int) - other.video.astype(int)).mean() > 1, "another prompt is another clip"
    facts = json.loads((tmp_path / "one/demo.json").read_text())
    assert (facts["prompt"], facts["seed"], facts["steps"]) == (prompts["b"], 7, 1)
    assert facts["seconds_per_stage"]["denoise"] > 0
    assert "f1" in facts["sync"]
