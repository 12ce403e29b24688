"""``javis eval gate``: does a checkpoint still do what was recorded of it, on 32 fixed held-out prompts?

What is recorded is kept clip by clip, so that a later run can be compared on the same prompts and seeds: what is hard
for both cancels, and a small loss shows that the interval over clips would hide. docs/report.md, "Quality gate".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from javis.errors import UsageError
from javis.eval.stats import Ratio
from javis.eval.steps_points import MeasuredClip
from javis.eval.steps_report import accuracy_of, f1_of, offset_of, shuffled_f1
from javis.eval.world_report import Clip, measure

FORMAT = 1
COUNT, SEED = 32, 6_000_000  # no other part of the package chooses or measures on these scenes
NUMBER_KEYS = ("f1", "offset_ms", "accuracy")


@dataclass(frozen=True)
class Figure:
    """A figure that is held: its words, which way is better, and the smallest difference that is worth a word."""

    label: str
    higher_is_better: bool
    matters: float


FIGURES = {
    "f1": Figure("event F1", True, 0.01),
    "offset_ms": Figure("mean |offset| in ms", False, 1.0),
    "accuracy": Figure("caption accuracy", True, 0.01),
}


@dataclass(frozen=True)
class GatePrompt:
    """A caption, the seed of its clip, and what the caption describes (`javis.world.parse_prompt`)."""

    caption: str
    seed: int
    clauses: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """What one clip adds to each figure: numerator and denominator."""

    f1: tuple[float, float]
    offset_ms: tuple[float, float]
    accuracy: tuple[float, float]


def fixed_prompts(config: Any = None) -> list[GatePrompt]:
    """The prompts of a first recording: of all kinds, held out of training. Later ones are read from the file."""
    from javis.eval.steps_prompts import prompts
    from javis.world import caption

    return [gate_prompt(caption(p.scene), p.seed) for p in prompts(COUNT // 2, SEED, config=config)[:COUNT]]


def gate_prompt(caption: str, seed: int) -> GatePrompt:
    """A prompt from its words. Raises `UsageError` for words that the world does not know."""
    from javis.world import parse_prompt

    return GatePrompt(caption, seed, tuple(parse_prompt(caption)))


# --- clips and rows -----------------------------------------------------------------------------------------------


def make_clips(
    pipe: Any,
    prompts: Sequence[GatePrompt],
    *,
    batch_size: int = 8,
    ablate: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Iterator[Clip]:
    """Clips of the prompts with the checkpoint's own settings: those that a user gets who asks for nothing else.

    Args:
        pipe: a ``JavisPipeline``.
        prompts: what to make.
        batch_size: clips made together; the clips do not depend on it.
        ablate: parts of the model to leave out, as the pipeline understands them (to see the gate fail).
        progress: called with the number of clips done.
    """
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        batch = pipe(
            [prompt.caption for prompt in part],
            seed=[prompt.seed for prompt in part],
            batch_size=batch_size,
            ablate=tuple(ablate),
        )
        for i, prompt in enumerate(part):
            yield Clip(prompt.clauses, batch.video[i], batch.audio[i], batch.fps, batch.sample_rate)
        if progress is not None:
            progress(start + len(part))


def measure_rows(clips: Iterable[Clip]) -> tuple[list[Row], float | None]:
    """Rows of the clips, and the event F1 of their pictures with the sound of another clip of the same kind."""
    measured = [MeasuredClip(measure(clip), {}) for clip in clips]
    found = {"f1": f1_of(measured), "offset_ms": offset_of(measured), "accuracy": accuracy_of(measured)}
    rows = [
        Row(**{name: (round(float(r.numerator[i]), 4), float(r.denominator[i])) for name, r in found.items()})
        for i in range(len(measured))
    ]
    return rows, shuffled_f1(measured)


def ratio_of(rows: Sequence[Row], name: str) -> Ratio:
    """A figure of a set of clips."""
    pairs = np.array([getattr(row, name) for row in rows], dtype=np.float64).reshape(-1, 2)
    return Ratio(pairs[:, 0], pairs[:, 1])


# --- the verdict --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One figure now, against what was recorded of the same prompts.

    Attributes:
        value: now; None if it is undefined, as the offset of clips in which nothing matches.
        recorded, low, high: what was recorded of these prompts, and its 95 % bootstrap interval over clips, at least as
            wide as the smallest difference that matters.
        difference: now less recorded, with its paired 99 % interval; None where a figure is undefined.
        held: the value is not on the wrong side of the interval, and the difference is not surely a loss that matters.
        better: it lies beyond the interval on the right side.
    """

    name: str
    value: float | None
    recorded: float
    low: float
    high: float
    difference: tuple[float, float, float] | None
    held: bool
    better: bool

    def row(self) -> dict[str, Any]:
        """Plain json values."""
        ends = None if self.difference is None else [round(x, 4) for x in self.difference]
        numbers = {
            key: None if getattr(self, key) is None else round(getattr(self, key), 4)
            for key in ("value", "recorded", "low", "high")
        }
        return {"name": self.name, **numbers, "difference": ends, "held": self.held, "better": self.better}

    def line(self) -> str:
        """``held   event F1 0.912, recorded 0.905 [0.870, 0.940], difference +0.007 [-0.010, 0.020]``."""
        digits = 1 if self.name == "offset_ms" else 3

        def told(value: float | None, sign: str = "") -> str:
            return "undefined" if value is None else f"{value:{sign}.{digits}f}"

        text = f"{FIGURES[self.name].label} {told(self.value)}, "
        text += f"recorded {told(self.recorded)} [{told(self.low)}, {told(self.high)}]"
        if self.difference is not None:
            change, low, high = self.difference
            text += f", difference {told(change, '+')} [{told(low, '+')}, {told(high, '+')}]"
        return f"{'held  ' if self.held else 'MISSED'} {text}" + ("  (better: record it)" if self.better else "")


def judge(recorded: Sequence[Row], now: Sequence[Row]) -> list[Verdict]:
    """Compare clips of the same prompts, row by row.

    A figure is held if it lies within the recorded 95 % interval or on the better side of it, and unless the paired
    99 % interval of the difference lies wholly on the worse side, by a mean that matters (`Figure.matters`).

    Raises:
        ValueError: not as many rows, none, or a recorded figure that is undefined.
    """
    if len(recorded) != len(now) or not recorded:
        raise ValueError(f"{len(recorded)} recorded clips and {len(now)} now: expected the same ones, and some")
    return [_verdict(name, ratio_of(recorded, name), ratio_of(now, name)) for name in NUMBER_KEYS]


def _verdict(name: str, recorded: Ratio, now: Ratio) -> Verdict:
    figure, before, ends = FIGURES[name], recorded.value, recorded.interval()
    if before is None or ends is None:
        raise ValueError(f"the recorded {figure.label} of these prompts is undefined; take more of them")
    # So few clips may all be perfect; an interval without width would then make a gate of a single rounding error.
    low, high = min(ends[0], before - figure.matters), max(ends[1], before + figure.matters)
    value, difference = now.value, now.difference(recorded, level=0.99)
    if value is None or difference is None:
        return Verdict(name, None, before, low, high, None, held=False, better=False)
    change, least, most = difference
    if figure.higher_is_better:
        lost, inside, better = most < 0 and change < -figure.matters, value >= low, value > high
    else:
        lost, inside, better = least > 0 and change > figure.matters, value <= high, value < low
    return Verdict(name, value, before, low, high, difference, held=inside and not lost, better=better)


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A recording as it was read: prompts, their rows and everything else that the file says."""

    prompts: list[GatePrompt]
    rows: list[Row]
    facts: Mapping[str, Any]


def weights_sha256(checkpoint: str) -> str | None:
    """Digest of config.json and of all weights of a small checkpoint; None where they are not."""
    from javis.demo_checkpoint import DEMO_FOLDER

    folder = DEMO_FOLDER if checkpoint == "demo" else Path(checkpoint)
    digest = hashlib.sha256()
    try:
        for name in ("config.json", "model.safetensors"):
            digest.update((folder / name).read_bytes())
    except OSError:
        return None
    return digest.hexdigest()


def default_file(checkpoint: str) -> Path:
    """Where the recording of a checkpoint is: in the package for the built-in one, else beside the weights."""
    return Path(__file__).with_name("gate.json") if checkpoint == "demo" else Path(checkpoint) / "gate.json"


def figures_of(rows: Sequence[Row]) -> dict[str, dict[str, float] | None]:
    """Value and 95 % bootstrap interval of each figure, rounded."""
    found: dict[str, dict[str, float] | None] = {}
    for name in NUMBER_KEYS:
        ratio = ratio_of(rows, name)
        value, ends = ratio.value, ratio.interval()
        found[name] = (
            None
            if value is None or ends is None
            else dict(zip(("value", "low", "high"), (round(x, 4) for x in (value, *ends)), strict=True))
        )
    return found


def as_text(prompts: Sequence[GatePrompt], rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The recording as json, a line for each clip."""
    head = json.dumps({"kind": "eval_gate", "format": FORMAT, **facts}, indent=1).removesuffix("\n}")
    lines = [
        "  " + json.dumps({"caption": p.caption, "seed": p.seed, **{key: list(getattr(r, key)) for key in NUMBER_KEYS}})
        for p, r in zip(prompts, rows, strict=True)
    ]
    return head + ',\n "clips": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def read(path: Path) -> Recorded:
    """Read a recording.

    Raises:
        UsageError: it is not there, or is not one.
    """
    again = "make it with 'javis eval gate --record'"
    if not path.is_file():
        raise UsageError(f"nothing is recorded: no file {path}; {again}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["kind"] != "eval_gate" or facts["format"] != FORMAT:
            raise UsageError(f"{path} is of kind {facts['kind']!r}, format {facts['format']}; {again}")
        clips = facts.pop("clips")
        rows = [Row(*(_pair(clip[key]) for key in NUMBER_KEYS)) for clip in clips]
        prompts = [gate_prompt(clip["caption"], int(clip["seed"])) for clip in clips]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not a recording of the gate ({type(error).__name__}: {error}); {again}") from None
    if not rows:
        raise UsageError(f"{path} holds no clip; {again}")
    return Recorded(prompts, rows, facts)


def _pair(values: Sequence[float]) -> tuple[float, float]:
    above, below = (float(value) for value in values)
    if not (np.isfinite(above) and np.isfinite(below) and below >= 0):
        raise ValueError(f"{values} is no pair of finite numbers")
    return above, below
