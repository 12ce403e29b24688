"""Rows and manifests for tests."""

from __future__ import annotations

from typing import Any

from javis.data.manifest import ClipRow


def clip_row(identity: str = "a", **changes: Any) -> ClipRow:
    """A row of two seconds of 64x64 at 16 fps with sound of 16 kHz."""
    values: dict[str, Any] = {
        "path": f"/data/{identity}.mp4",
        "id": identity,
        "relpath": f"{identity}.mp4",
        "num_frames": 32,
        "height": 64,
        "width": 64,
        "fps": 16.0,
        "audio_path": f"/data/{identity}.wav",
        "audio_fps": 16000,
        "text": "a red ball bounces",
    } | changes
    values.setdefault("aspect_ratio", values["height"] / values["width"])
    values.setdefault("resolution", values["height"] * values["width"])
    return ClipRow(**values)
