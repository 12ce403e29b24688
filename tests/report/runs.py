"""Small runs to report: a folder of clips with hostile captions, a training run, evaluations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from javis.eval.sync import sync_report
from javis.media import write_clip
from javis.world import WorldConfig, render_audio, render_video, scene_from_prompt

PROMPT = "a red ball bounces on the left"
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & 'a' \"b\" \x00\ud800"
ENVIRONMENT = {"device": "Abacus 3000", "commit": "abc1234", "torch": "2.13.0", "javis": "0.1.0", "dirty": False}


def clips(folder: Path, count: int = 2) -> None:
    """Clips of the world as ``javis sample`` writes them; the last one's words are hostile."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        scene = scene_from_prompt(PROMPT, i, WorldConfig(seconds=1.0))
        video, audio = render_video(scene), render_audio(scene)
        write_clip(folder / f"clip_{i + 1}.mp4", video, audio, 16.0, 16000)
        facts = {
            "prompt": HOSTILE if i == count - 1 else PROMPT,
            "seed": i,
            "variant": "</pre><script>document.title='owned'</script>",
            "sync": sync_report(video, audio, 16.0, 16000, PROMPT),
            "request": {"checkpoint": "demo", "checkpoint_fingerprint": "0123456789abcdef"},
            "javis": "0.1.0",
        }
        (folder / f"clip_{i + 1}.json").write_text(json.dumps(facts))


def training(folder: Path, steps: int = 1000) -> None:
    """A run of the engine: a log with a loss that is not finite, its configuration, a checkpoint, a sample."""
    (folder / "samples").mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        loss = 0.1 + math.exp(-step / 100)
        streams = {"video": loss / 2, "audio": loss / 2}
        rows.append({"step": step, "loss": loss, **streams, "lr": 1e-4, "seconds": step * 1.0})
    rows[5]["loss"] = math.nan
    rows.append({"step": steps, "validation": [0.4, 0.2]})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10')
    (folder / "config.json").write_text(json.dumps({"engine": {"steps": steps, "note": "</pre><script>x"}}))
    (folder / "codecs.json").write_text(json.dumps({"video": {"channels": 3}}))
    step = folder / "checkpoints" / "step_0001000"
    step.mkdir(parents=True)
    (step / "checkpoint.json").write_text("{}")
    picture(folder / "samples" / "step_0001000_0.png")


def picture(path: Path) -> None:
    from matplotlib.image import imsave

    imsave(path, np.zeros((8, 8, 3), np.uint8))


def evaluation() -> dict[str, Any]:
    """What ``javis eval world`` writes, as far as the page looks."""
    kind = {
        "clips": 4, "f1": {"62.5": 0.875}, "f1_interval": [0.75, 0.95], "shuffled_f1": 0.25, "mean_abs_offset_ms": 12.5,
        "objects_right": 1.0, "attributes": {"colour": 1.0},
    }  # fmt: skip
    both = {"clips": 9, "one_source": kind, "two_sources": kind, "attributes": {"colour": 0.5, "shape": 0.75}}
    return {"kind": "eval_world", "steps": 8, "generated": both, "checkpoint": "<b>demo", **ENVIRONMENT}
