"""One point of the curve: clips of all prompts at one setting, measured one by one and kept in a file.

The file is json lines: a header whenever a run begins, then one line per clip, so that what was interrupted goes on
behind the last whole line. Its name holds the settings and the fingerprint of the variant's weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from javis.clip_files import checkpoint_fingerprint
from javis.demo_checkpoint import DEMO_FOLDER
from javis.errors import UsageError
from javis.eval.frechet_features import SETS, clip_features, comparable
from javis.eval.steps_prompts import Prompt
from javis.eval.world_report import Clip, Measured, measure, real_clips
from javis.student import PREFIX

FORMAT = 2
REAL, CODEC = "real", "codec"  # the world's own rendering, and the same through the codecs


@dataclass(frozen=True)
class Setting:
    """What the pipeline is asked for; ``steps`` is None for ``real`` and ``codec``, which are not generated.

    ``options`` are further arguments of the pipeline's call, those that were given only.
    """

    variant: str
    steps: int | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For people: ``teacher, 8 steps, solver heun``."""
        steps = [] if self.steps is None else [f"{self.steps} step{'s' * (self.steps != 1)}"]
        return ", ".join([self.variant, *steps, *(f"{name} {value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Point:
    """A finished point: its setting, what was used, and its clips by the number of their prompt.

    Attributes:
        used: guidance, audio_guidance, order and the like, as the pipeline reports them.
        seconds_alone: median seconds (prompt to frames and samples) of clips that were made one at a time.
        environment: of the run that made the last clip (`javis.bench_environment`).
    """

    setting: Setting
    clips: Mapping[int, MeasuredClip]
    used: Mapping[str, Any]
    batch_size: int
    seconds_alone: float | None
    environment: Mapping[str, Any]

    def first(self, count: int) -> Point:
        """The same with the clips of the first ``count`` prompts."""
        return replace(self, clips={number: clip for number, clip in self.clips.items() if number < count})


@dataclass(frozen=True)
class MeasuredClip:
    """One clip: detectors and readers, feature vectors by set (empty where they do not apply), seconds and forwards."""

    measured: Measured
    features: Mapping[str, np.ndarray]
    seconds: float | None = None
    forwards: float | None = None


def key_of(setting: Setting, fingerprint: str | None, prompts_key: Mapping[str, Any]) -> str:
    """Digest of everything that decides how the clips look."""
    facts = [FORMAT, setting.variant, setting.steps, dict(setting.options), fingerprint, dict(prompts_key)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class PointFile:
    """Where a point is kept."""

    def __init__(self, folder: Path, setting: Setting, fingerprint: str | None, prompts_key: Mapping[str, Any]) -> None:
        steps = "" if setting.steps is None else f"-{setting.steps}"
        name = f"{setting.variant}{steps}-{key_of(setting, fingerprint, prompts_key)}.jsonl"
        self.setting, self.path = setting, folder / name
        self.about = {"setting": asdict(setting), "checkpoint_fingerprint": fingerprint, "prompts": dict(prompts_key)}

    def read(self) -> Point:
        """What is there; a line that was cut off is left out. An absent file is a point without clips."""
        header: dict[str, Any] = {}
        clips: dict[int, MeasuredClip] = {}
        used: dict[str, Any] = {}
        alone: list[float] = []
        dirty = False
        for row in _lines(self.path):
            if "environment" in row:
                header = row
                dirty = dirty or bool(row["environment"].get("dirty"))
            elif "clip" in row:
                clips[row["clip"]] = _clip_of(row)
            elif "used" in row:
                used = row["used"]
            elif "alone" in row:
                alone = row["alone"]
        return Point(
            self.setting,
            clips,
            used,
            int(header.get("batch_size", 0)),
            float(np.median(alone)) if alone else None,
            {**header.get("environment", {}), "dirty": dirty} if header else {},
        )

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line; a line that was cut off before it is ended first."""
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                cut = file.read(1) != b"\n"
            else:
                cut = False
            file.write((("\n" if cut else "") + json.dumps(row) + "\n").encode())


def variant_fingerprint(checkpoint: str, variant: str) -> str | None:
    """Digest of what decides a variant's clips: of a teacher's, everything but the student beside it.

    So a teacher's points hold when another student is exported into its folder. None where nothing can be read.
    """
    if variant == "student":
        return checkpoint_fingerprint(checkpoint)
    folder = DEMO_FOLDER if checkpoint == "demo" else Path(checkpoint)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps({**facts, "student": None}, sort_keys=True).encode())
        with safe_open(folder / "model.safetensors", "np") as file:
            for name in sorted(file.keys()):
                if not name.startswith(PREFIX):
                    digest.update(name.encode() + file.get_tensor(name).astype(np.float32).tobytes())
    except (OSError, ValueError, TypeError, SafetensorError):
        return checkpoint_fingerprint(checkpoint)  # not a small checkpoint
    return digest.hexdigest()[:16]


def points_in(folder: Path, fingerprint_of: Callable[[str], str | None], prompts_key: Mapping[str, Any]) -> list[Point]:
    """All points of a folder that are of these prompts and of variants with these fingerprints."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        about = next((row for row in _lines(path) if "setting" in row), None)
        if about is None:
            continue
        setting = Setting(**about["setting"])
        file = PointFile(folder, setting, fingerprint_of(setting.variant), prompts_key)
        if file.path == path:
            found.append(file.read())
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _clip_of(row: Mapping[str, Any]) -> MeasuredClip:
    measured = {**row["measured"], "sources": [(seen, heard) for seen, heard in row["measured"]["sources"]]}
    features = {name: np.array(values) for name, values in row["features"].items()}
    return MeasuredClip(Measured(**measured), features, row["seconds"], row["forwards"])


# --- making a point -----------------------------------------------------------------------------------------------


def make_point(
    pipe: Any,
    file: PointFile,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    alone: int,
    environment: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
) -> Point:
    """Make and measure the clips that the file does not have yet, and return the point.

    Args:
        pipe: a ``JavisPipeline``.
        file: where it is kept.
        prompts: all prompts; clips are numbered by their place in it.
        batch_size: clips generated together.
        alone: clips that are made once more, one at a time after one that does not count, for ``seconds_alone``.
        environment: of this run.
        progress: called with the number of clips that were just finished.
    """
    point = file.read()
    todo = [number for number in range(len(prompts)) if number not in point.clips]
    if progress is not None:
        progress(len(prompts) - len(todo))
    generated = file.setting.steps is not None
    wants_alone = generated and alone > 0 and point.seconds_alone is None
    if todo or wants_alone:
        file.append({**file.about, "batch_size": batch_size, "environment": dict(environment)})
    if not generated:
        codec = None
        if file.setting.variant == CODEC:
            from javis.eval.world_report import pipeline_codec

            codec = pipeline_codec(pipe)
        for number, clip in zip(todo, real_clips((prompts[n].scene for n in todo), codec), strict=True):
            _keep(file, number, clip)
            if progress is not None:
                progress(1)
        return file.read()
    for start in range(0, len(todo), batch_size):
        numbers = todo[start : start + batch_size]
        with counted_forwards() as count:
            batch = _call(pipe, file.setting, [prompts[n] for n in numbers])
        seconds = round(sum(getattr(batch, "seconds_per_stage", {}).values()) / len(numbers), 4) or None
        forwards = round(count[0] / len(numbers), 4) or None
        if start == 0:
            file.append({"used": _used(batch)})
        for i, (number, clip) in enumerate(zip(numbers, _clips(batch, prompts, numbers), strict=True)):
            _keep(file, number, clip, seconds, forwards)
            if progress is not None and i == len(numbers) - 1:
                progress(len(numbers))
    if wants_alone:
        file.append({"alone": _seconds_alone(pipe, file.setting, prompts, alone)})
    return file.read()


def _call(pipe: Any, setting: Setting, chosen: Sequence[Prompt]) -> Any:
    from javis.world import caption

    seeds = [prompt.seed for prompt in chosen]
    captions = [caption(prompt.scene) for prompt in chosen]
    options = dict(setting.options)
    if "variant" in inspect.signature(pipe.__call__).parameters:
        options["variant"] = setting.variant
    return pipe(captions, seed=seeds, steps=setting.steps, batch_size=len(chosen), **options)


def _used(batch: Any) -> dict[str, Any]:
    names = ("steps", "guidance", "audio_guidance", "order", "options")
    return {name: getattr(batch, name) for name in names if getattr(batch, name, None) is not None}


def _clips(batch: Any, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Iterable[Clip]:
    for i, number in enumerate(numbers):
        clauses = [dict(source.clause) for source in prompts[number].scene.sources]
        yield Clip(clauses, batch.video[i], batch.audio[i], batch.fps, batch.sample_rate)


def _keep(
    file: PointFile, number: int, clip: Clip, seconds: float | None = None, forwards: float | None = None
) -> None:
    features: dict[str, list[float]] = {}
    if comparable(clip.video, clip.fps, clip.sample_rate):
        found = clip_features(clip.video, clip.audio, clip.fps, clip.sample_rate)
        features = {name: [round(float(x), 6) for x in found[name]] for name in SETS}
    measured = asdict(measure(clip))
    file.append(
        {"clip": number, "measured": measured, "features": features, "seconds": seconds, "forwards": forwards},
    )


def _seconds_alone(pipe: Any, setting: Setting, prompts: Sequence[Prompt], count: int) -> list[float]:
    seconds = []
    for number in range(count + 1):
        started = time.perf_counter()
        _call(pipe, setting, [prompts[number % len(prompts)]])
        seconds.append(round(time.perf_counter() - started, 4))
    return seconds[1:]


@contextlib.contextmanager
def counted_forwards() -> Iterator[list[float]]:
    """Count evaluations of the diffusion model, one per sample: a guided step of one clip is two. Yields [count].

    What is counted is layers of a stream (`JavisDiT.stream`) over all that there are, so that the count holds for every
    solver, guidance interval and re-use, and a cache that leaves out layers lowers it.
    """
    from javis.model.dit import JavisDiT

    count = [0.0]
    original = JavisDiT.stream

    def stream(self: Any, name: Any, number: int, x: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += len(x) / (2 * self.config.depth)
        return original(self, name, number, x, *args, **kwargs)

    JavisDiT.stream = stream  # type: ignore[method-assign]
    try:
        yield count
    finally:
        JavisDiT.stream = original  # type: ignore[method-assign]


def check_options(pipe: Any, options: Mapping[str, Any]) -> None:
    """Refuse what the pipeline's call does not know.

    Raises:
        UsageError: names the option.
    """
    from javis.sampler_options import SamplerKeywords

    known = inspect.signature(pipe.__call__).parameters
    able = {name for name, parameter in known.items() if parameter.kind == parameter.KEYWORD_ONLY}
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values()):
        able |= set(SamplerKeywords.__annotations__)
    able -= {"seed", "audio_seed", "generator", "steps", "batch_size", "variant", "progress", "callback_on_step_end"}
    for name in options:
        if name not in able:
            raise UsageError(f"the pipeline takes no option {name!r} here; expected some of {', '.join(sorted(able))}")
