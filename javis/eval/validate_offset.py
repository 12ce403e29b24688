"""Is the offset of a clip found? Real clips of the world whose sound is moved by known amounts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from javis.data.negatives_world import world_clip
from javis.eval.damage import MAX_SHIFT, shift_sound
from javis.eval.onsets import Sound, audio_onsets
from javis.eval.stats import Ratio
from javis.eval.sync_offset import RIVAL, event_lags, find_offset
from javis.eval.sync_score import Evidence, onset_strength
from javis.eval.sync_summary import CONFIDENT
from javis.world import Scene

STEP = 0.1  # seconds between the planted shifts of a grid
DRAWN = 4  # further shifts of every clip, drawn evenly from the whole range
BOUND = 0.010  # seconds within which a shift counts as found
GROSS = 0.060  # seconds beyond which it is another shift, not an inexact one
AS_GOOD = 0.95  # share of the true shift's agreement from which on another one explains the events as well


@dataclass(frozen=True)
class Shifted:
    """One clip with its sound moved by ``planted`` seconds."""

    clip: int
    motions: str
    planted: float
    found: float | None
    energy: float | None
    confidence: float
    ambiguous: bool


def is_ambiguous(events: Sequence[float], shift: float, seconds: float) -> bool:
    """Whether exact event times leave the shift open: none is left, or another shift explains them (nearly) as well.

    A pendulum shifted by its period, or two events of which one went over the edge: no method can tell from the times.
    """
    heard = [t + shift for t in events if 0 <= t + shift < seconds]
    nothing = np.zeros(1)
    lags, agreement = event_lags(Evidence(list(events), heard, nothing, nothing, nothing, 1.0, seconds, seconds))
    near = np.abs(lags - shift) < 1e-3
    if not near.any():
        return True
    rivals = agreement[np.abs(lags - shift) >= RIVAL]
    return bool(rivals.max(initial=0.0) >= AS_GOOD * agreement[near].max())


def shift_clips(scenes: Sequence[Scene], *, seed: int, progress: Callable[[int], None] | None = None) -> list[Shifted]:
    """Offsets found in every scene's clip, shifted by -500 to 500 ms in steps of 100 ms and by four drawn amounts."""
    found: list[Shifted] = []
    for index, scene in enumerate(scenes):
        clip = world_clip(scene)
        base = Evidence.of(clip.video, clip.waveform, clip.fps, clip.rate)
        motions = "+".join(sorted({source.motion for source in scene.sources}))
        rng = np.random.default_rng([seed, index])
        for planted in (*np.arange(-MAX_SHIFT, MAX_SHIFT + STEP / 2, STEP), *rng.uniform(-MAX_SHIFT, MAX_SHIFT, DRAWN)):
            shift = round(float(planted) * clip.rate) / clip.rate
            sound = Sound(shift_sound(clip.waveform, shift, clip.rate), clip.rate)
            heard = [event.time for event in audio_onsets(sound, clip.rate)]
            offset = find_offset(dataclasses.replace(base, heard=heard, onset=onset_strength(sound)))
            ambiguous = is_ambiguous(clip.events, shift, base.video_seconds)
            found.append(
                Shifted(index, motions, shift, offset.seconds, offset.energy_seconds, offset.confidence, ambiguous)
            )
        if progress is not None:
            progress(index + 1)
    return found


def offset_report(shifted: Sequence[Shifted], clips: int) -> dict[str, Any]:
    """Shares found within 10 ms, and errors in ms: of all, of those that the true times decide, and of the others."""
    clear = [s for s in shifted if not s.ambiguous]
    confident = [s for s in shifted if s.confidence >= CONFIDENT]
    motions = sorted({s.motions for s in clear})
    return {
        "bound_ms": 1000 * BOUND,
        "shifts": len(shifted),
        "ambiguous": len(shifted) - len(clear),
        "clips_with_ambiguous": len({s.clip for s in shifted if s.ambiguous}),
        "all": _errors(shifted, clips),
        "clear": _errors(clear, clips),
        "ambiguous_ones": _errors([s for s in shifted if s.ambiguous], clips),
        "confident": {"share": round(len(confident) / max(1, len(shifted)), 4), **_errors(confident, clips)},
        "by_motion": {m: _errors([s for s in clear if s.motions == m], clips) for m in motions},
        "energy_alone": _errors(clear, clips, energy=True),
    }


def _errors(shifted: Sequence[Shifted], clips: int, *, energy: bool = False) -> dict[str, Any]:
    right, total = np.zeros(clips), np.zeros(clips)
    errors = []
    for one in shifted:
        value = one.energy if energy else one.found
        error = None if value is None else value - one.planted
        total[one.clip] += 1
        right[one.clip] += error is not None and abs(error) <= BOUND
        if error is not None:
            errors.append(1000 * error)
    ratio, sizes = Ratio(right, total), np.abs(errors)
    ends = ratio.interval()
    if ratio.value is None or ends is None or not errors:
        return {"shifts": len(shifted), "found": None}
    return {
        "shifts": len(shifted),
        "found": {"value": round(ratio.value, 4), "low": round(ends[0], 4), "high": round(ends[1], 4)},
        "median_abs_ms": round(float(np.median(sizes)), 2),
        "p95_abs_ms": round(float(np.percentile(sizes, 95)), 2),
        "mean_ms": round(float(np.mean([e for e in errors if abs(e) <= 1000 * GROSS] or [0.0])), 2),
        "gross": int((sizes > 1000 * GROSS).sum()) + len(shifted) - len(errors),
    }
