"""The metrics of JavisBench and those that need no weights: what each is computed from, and how its figure is made.

The arithmetic is that of `javis.eval.metrics`; here it is applied to the stored parts of clips. A score takes two
clips, the picture of the first and the sound (or the text) of the second, which are one but for the shuffled control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from javis.eval.javisbench.figures import Counts, Parts
from javis.eval.javisbench.measure import PEAKS, SYNC
from javis.eval.matching import count_events, match_events
from javis.eval.metrics import (
    av_align,
    avh_score,
    cosine_similarity_mean,
    desync,
    frechet_audio_distance,
    frechet_distance,
    javis_score,
    kernel_distance,
)
from javis.eval.metrics.protocol import MetricProtocol
from javis.eval.sync import PRIMARY, TOLERANCES

Direction = Literal["higher", "lower"]
PairScore = Callable[[Parts, Parts, MetricProtocol], Counts | None]


@dataclass(frozen=True)
class Metric:
    """One column of the results.

    ``part`` names what it is computed from: an extractor, or a part that needs none. Exactly one of ``score`` and
    ``distance`` is set; ``kind`` says which vectors a distance compares.
    """

    name: str
    label: str
    part: str
    better: Direction
    about: str
    score: PairScore | None = None
    distance: Callable[..., float] | None = None
    kind: str = ""
    shuffles: bool = True
    needs_text: bool = False
    needs_world: bool = False  # text in the words of the built-in world
    may_lack: bool = False  # a clip without it is none to complain of
    is_detail: bool = False  # beside another one; not in tables of categories


def _mean(value: float | None) -> Counts | None:
    return None if value is None or not math.isfinite(value) else (value, 1.0)


def _arrays(clip: Parts, part: str, *names: str) -> list[np.ndarray] | None:
    """Arrays of a part; None if the clip lacks one of them, or one holds what is no number."""
    found = clip.get(part)
    if found is None or any(name not in found.arrays for name in names):
        return None
    arrays = [found.arrays[name] for name in names]
    return arrays if all(array.size and np.isfinite(array).all() for array in arrays) else None


# --- scores of one clip -------------------------------------------------------------------------------------------


def cosine(part: str, first: str, second: str, clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """Mean cosine of one clip's vectors and another's: [D] or [N, D] with [D], or row by row with [M, D]."""
    a, b = _arrays(clip, part, first), _arrays(other, part, second)
    if a is None or b is None:
        return None
    x, y = np.atleast_2d(a[0]), np.atleast_2d(b[0])
    if len(y) > 1:
        rows = min(len(x), len(y))
        x, y = x[:rows], y[:rows]
    if len(y) == 1 and len(x) > 1:
        y = np.repeat(y, len(x), axis=0)
    return _mean(cosine_similarity_mean(x, y))


def harmony(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """AVHScore."""
    a, b = _arrays(clip, "imagebind", "frames"), _arrays(other, "imagebind", "audio")
    return None if a is None or b is None else _mean(avh_score(a[0], b[0]))


def javis(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """JavisScore; of two clips of different length as many windows as both have."""
    a = _arrays(clip, "imagebind", "frames", "video_windows")
    b = _arrays(other, "imagebind", "audio_windows")
    if a is None or b is None:
        return None
    frames, windows = a
    count = min(len(windows), len(b[0]))
    return _mean(javis_score([frames[s:e] for s, e in windows[:count]], b[0][:count], protocol=protocol))


def peaks_align(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """AV-Align; a clip without any peak in picture and sound has none to align."""
    a, b = clip.get(PEAKS), other.get(PEAKS)
    if a is None or b is None or "video" not in a.facts or "audio" not in b.facts:
        return None
    video, audio = a.facts["video"], b.facts["audio"]
    return None if not video and not audio else _mean(av_align(video, audio, a.facts["fps"], protocol=protocol))


def agreement(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """The score of `javis.eval.sync_score`."""
    return _mean(clip[PEAKS].facts.get("sync_score")) if PEAKS in clip else None


def offset_classes(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """DeSync."""
    found = _arrays(clip, "synchformer", "logits")
    return None if found is None else _mean(desync(found[0]))


def _sources(clip: Parts, other: Parts) -> list[tuple[list[float], list[float]]] | None:
    a, b = clip.get(SYNC), other.get(SYNC)
    if a is None or b is None or "sources" not in a.facts or "sources" not in b.facts:
        return None
    pairs = zip(a.facts["sources"], b.facts["sources"], strict=False)
    return [(seen, heard) for (seen, _), (_, heard) in pairs]


def event_f1(tolerance: float, clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """Twice the matched events over all events, source by source.

    A source that the text describes and that makes no event at all counts as one missed in picture and sound, as in
    `javis eval world`; without such a text there is nothing to miss.
    """
    sources = _sources(clip, other)
    if sources is None:
        return None
    described = bool(clip[SYNC].facts["by_source"])
    matched = events = 0
    for seen, heard in sources:
        if not seen and not heard:
            events += 2 * described
            continue
        found = count_events(seen, heard, tolerance)
        matched, events = matched + 2 * found.matched, events + found.reference + found.other
    return (float(matched), float(events)) if events else None


def offset(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """Sum of the absolute offsets (ms) of matched events, and how many there are."""
    offsets = [
        1000 * abs(heard[j] - seen[i])
        for seen, heard in _sources(clip, other) or []
        for i, j in match_events(seen, heard, PRIMARY)
    ]
    return (float(sum(offsets)), float(len(offsets))) if offsets else None


def caption(clip: Parts, other: Parts, protocol: MetricProtocol) -> Counts | None:
    """Named attributes that the clip has, and how many are named."""
    found = clip.get(SYNC)
    if found is None or not found.facts.get("checks"):
        return None
    rights = [right for values in found.facts["checks"].values() for right in values]
    return float(sum(rights)), float(len(rights))


# --- the list -----------------------------------------------------------------------------------------------------

_IB, _I3D = "imagebind", "i3d"
METRICS: tuple[Metric, ...] = (
    Metric("fvd", "FVD", _I3D, "lower", "Frechet distance of I3D features", distance=frechet_distance, kind="video"),
    Metric("kvd", "KVD", _I3D, "lower", "kernel distance of I3D features", distance=kernel_distance, kind="video"),
    Metric(
        "fad", "FAD", "audioclip", "lower", "Frechet distance of AudioCLIP features, times 10,000",
        distance=frechet_audio_distance, kind="audio",
    ),
    Metric("ib_tv", "TV-IB", _IB, "higher", "ImageBind, picture and text",
           partial(cosine, _IB, "video", "text"), needs_text=True),
    Metric("ib_ta", "TA-IB", _IB, "higher", "ImageBind, sound and text",
           partial(cosine, _IB, "audio", "audio_text"), needs_text=True),
    Metric("clip", "CLIP", "clip", "higher", "CLIP, frames and text",
           partial(cosine, "clip", "frames", "text"), needs_text=True),
    Metric("clap", "CLAP", "clap", "higher", "CLAP, sound and text",
           partial(cosine, "clap", "audio", "audio_text"), needs_text=True),
    Metric("ib_av", "AV-IB", _IB, "higher", "ImageBind, picture and sound", partial(cosine, _IB, "video", "audio")),
    Metric("cavp", "CAVP", "cavp", "higher", "CAVP, picture and sound in time",
           partial(cosine, "cavp", "video", "audio")),
    Metric("avh_score", "AVHScore", _IB, "higher", "every frame with the whole sound", harmony),
    Metric("javis_score", "JavisScore", _IB, "higher", "the worst frames of each window with its sound", javis),
    Metric("desync", "DeSync", "synchformer", "lower", "offset that Synchformer sees, s", offset_classes,
           shuffles=False),
    Metric("av_align", "AV-Align", PEAKS, "higher", "peaks of optical flow and of sound", peaks_align),
    Metric("sync_score", "Sync", PEAKS, "higher", "agreement of events and energies, without a text", agreement,
           shuffles=False),
    *(
        Metric(f"event_f1_{1000 * tolerance:g}ms", f"F1@{1000 * tolerance:g}", SYNC, "higher",
               f"events seen and heard within {1000 * tolerance:g} ms", partial(event_f1, tolerance),
               is_detail=tolerance != PRIMARY)
        for tolerance in sorted(TOLERANCES, key=lambda t: (t != PRIMARY, t))
    ),
    Metric("offset_ms", "Offset", SYNC, "lower", "mean absolute offset of matched events, ms", offset, may_lack=True),
    Metric("caption", "Caption", SYNC, "higher", "named attributes that the clip has", caption, shuffles=False,
           needs_world=True, may_lack=True),
    Metric("builtin_picture", "FD-picture", "builtin", "lower", "Frechet distance of the built-in picture features",
           distance=frechet_distance, kind="video"),
    Metric("builtin_sound", "FD-sound", "builtin", "lower", "Frechet distance of the built-in sound features",
           distance=frechet_distance, kind="audio"),
)  # fmt: skip
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
