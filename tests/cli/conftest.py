"""A pipeline that renders scenes of the world instead of sampling a model: real clips with known events, in no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from javis.errors import UsageError
from javis.pipeline import ClipBatch, JavisPipeline
from javis.world import WorldConfig, normalize_prompt, render_audio, render_video, scene_from_prompt


class RenderingPipeline:
    """Same calls and limits as `JavisPipeline`; remembers what it was asked for."""

    size, fps, sample_rate = 64, 16, 16000
    description: dict[str, Any] = {"world": "javis"}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.before_clip: Callable[[int], None] = lambda number: (
            None
        )  # hook: called with the number of clips made so far
        self.made = 0

    def captions(self, prompts: Sequence[str]) -> list[str]:
        return [normalize_prompt(prompt) for prompt in prompts]

    def frames_of(self, seconds: float) -> int:
        if not 0.25 <= seconds <= 4:
            raise UsageError(f"seconds must be between 0.25 and 4.0, got {seconds}")
        return round(seconds * self.fps)

    def __call__(self, prompt: Sequence[str], *, seed: Sequence[int], progress: Any = None, **kwargs: Any) -> ClipBatch:
        self.calls.append({"prompt": list(prompt), "seed": list(seed), **kwargs})
        config = WorldConfig(seconds=kwargs.get("seconds") or 2.0)
        videos, audios = [], []
        for words, number in zip(prompt, seed, strict=True):
            self.before_clip(self.made)
            scene = scene_from_prompt(words, number, config)
            videos.append(render_video(scene))
            audios.append(render_audio(scene))
            self.made += 1
            if progress is not None:
                progress(len(videos), len(prompt))
        guidance = kwargs.get("guidance")
        return ClipBatch(
            video=np.stack(videos),
            audio=np.stack(audios),
            fps=self.fps,
            sample_rate=self.sample_rate,
            prompts=self.captions(prompt),
            seeds=list(seed),
            steps=kwargs.get("steps") or 16,
            guidance=2.0 if guidance is None else guidance,
            audio_guidance=kwargs.get("audio_guidance") or 2.0,
            seconds_per_stage={"text": 0.1, "denoise": 0.2, "decode": 0.3},
        )


@pytest.fixture
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RenderingPipeline:
    """`JavisPipeline.from_pretrained` gives this; the working directory is ``tmp_path``."""
    pipeline = RenderingPipeline()
    if not getattr(request, "param", False):
        # Detecting and drawing take longer than all the rest; they have tests of their own.
        report = {"video_events": [], "audio_events": [], "matched": [], "mean_abs_offset_ms": None}
        monkeypatch.setattr("javis.eval.sync.sync_report", lambda *_: report)
        monkeypatch.setattr("javis.contact_sheet.contact_sheet", lambda path, *_, **__: Path(path).write_bytes(b"png"))
    monkeypatch.setattr(JavisPipeline, "from_pretrained", lambda *args, **kwargs: pipeline)
    monkeypatch.chdir(tmp_path)
    return pipeline


def files(folder: Path) -> set[str]:
    """Everything below ``folder``, hidden files included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
