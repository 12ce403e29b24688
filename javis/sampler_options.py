"""How a clip is sampled: solver, timesteps, and what guidance may leave out. Names, ranges, flags; loads no torch.

The exact way is the default: everything approximate is off unless it is asked for, and then it is in the clip's json.
What the options do: docs/sampling.md, javis/sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict, get_args

from javis.cache_options import CacheConfig, parse_cache
from javis.errors import UsageError

SolverName = Literal["euler", "heun", "midpoint", "ab2", "ab3", "dpmpp2m", "dpmpp3m", "unipc"]
ScheduleName = Literal["uniform", "official", "fitted"]
SOLVERS: tuple[str, ...] = get_args(SolverName)
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
TWO_STAGES = ("heun", "midpoint")  # solvers that evaluate the model twice an interval
MAX_EVALUATIONS = 1000
RATIO_RANGE = (0.01, 100.0)


class SamplerKeywords(TypedDict, total=False):
    """Keyword arguments of :meth:`javis.pipeline.JavisPipeline.__call__` about sampling. None: the checkpoint's.

    solver: how an interval is crossed (:mod:`javis.sample.solvers`); ``steps`` counts evaluations whatever the solver.
    schedule: timesteps (:mod:`javis.sample.schedules`). timestep_ratio: their shift towards noise, 1 = none.
    audio_steps: evaluations for the sound (:func:`javis.sample.sample_in_order`).
    redraw: timestep from which the picture is made again to the finished sound; 1000: from noise.
    audio_seed: of the sound's noise; as ``seed``. audio_negative_prompt: what not to hear; as ``negative_prompt``.
    guidance_interval: (low, high), timesteps in 0..1000 between which there is guidance.
    guidance_rescale: share 0..1 of the guided prediction that gets the conditional one's standard deviation.
    uncond_every: evaluate the unconditional half in every n-th guided evaluation.
    cache: what is re-used from step to step (:class:`javis.cache_options.CacheConfig`, or its text form).
    """

    solver: SolverName | None
    schedule: ScheduleName | None
    timestep_ratio: float | None
    audio_steps: int | None
    redraw: float | None
    audio_seed: int | Sequence[int] | None
    audio_negative_prompt: str | Sequence[str] | None
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float | None
    uncond_every: int | None
    cache: CacheConfig | str | None


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """The checked options of a call. The defaults are the exact way on the checkpoint's own timesteps."""

    solver: SolverName = "euler"
    schedule: ScheduleName | None = None
    timestep_ratio: float | None = None
    audio_steps: int | None = None
    redraw: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    uncond_every: int = 1
    cache: CacheConfig = field(default_factory=CacheConfig)

    def changed(self) -> dict[str, Any]:
        """The options that differ from the defaults, as json values; for the clip's json. A cache reports itself."""
        return {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in fields(self)
            if f.name != "cache" and getattr(self, f.name) != f.default
        }


OPTIONS = tuple(f.name for f in fields(SamplerOptions))


@dataclass(frozen=True, kw_only=True)
class SamplerArgs:
    """How the clip is sampled; what is left out is as the checkpoint says, without approximations."""

    solver: SolverName | None = None
    """How an interval between timesteps is crossed. Heun and midpoint take two of --steps for one interval."""
    schedule: ScheduleName | None = None
    """Timesteps: evenly spaced and shifted by --timestep-ratio, by size and length, or fitted to the checkpoint."""
    timestep_ratio: float | None = None
    """Shift of uniform timesteps towards noise, 1 = none."""
    audio_steps: int | None = None
    """Evaluations for the sound: of --steps (sound first), or beside them (together)."""
    redraw: float | None = None
    """Sound first: begin the picture's own part from the first part's picture with this timestep's share of noise."""
    audio_seed: int | None = None
    """Of the sound's noise (default: --seed). With --prompts, row i gets this + i."""
    audio_negative_prompt: str | None = None
    """What not to hear (default: --negative-prompt)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at timesteps from LOW to HIGH, of 0 (data) to 1000 (noise); elsewhere a step costs half."""
    guidance_rescale: float | None = None
    """Share of the guided prediction that gets the conditional one's standard deviation, 0 to 1."""
    uncond_every: int | None = None
    """Evaluate the unconditional half in every n-th guided step only; between them the last difference is used."""
    cache: str | None = None
    """What is re-used from step to step: first-block=0.1, tea=0.1 (thresholds), attention=2 (steps), or none."""

    def given(self) -> dict[str, Any]:
        """The options that were given, but for the seed, as keyword arguments of the pipeline."""
        return {
            f.name: value
            for f in fields(self)
            if f.name != "audio_seed" and (value := getattr(self, f.name)) is not None
        }

    def identity(self) -> dict[str, Any]:
        """The same as json values: part of the record by which a finished clip is known."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.given().items()}


def check_ranges(given: Mapping[str, Any]) -> None:
    """Refuse what no checkpoint can do; entries that are missing or None are fine.

    Raises:
        UsageError: names the option, what was given, and what is accepted.
    """
    value = given.get("solver")
    if value is not None and value not in SOLVERS:
        raise UsageError(f"unknown solver {value!r}; expected one of {', '.join(SOLVERS)}")
    value = given.get("schedule")
    if value is not None and value not in SCHEDULES:
        raise UsageError(f"unknown schedule {value!r}; expected one of {', '.join(SCHEDULES)}")
    low, high = RATIO_RANGE
    value = given.get("timestep_ratio")
    if value is not None and not (_is_number(value) and low <= value <= high):
        raise UsageError(f"timestep_ratio must be a number from {low:g} to {high:g} (1 = no shift), got {value!r}")
    value = given.get("redraw")
    if value is not None and not (_is_number(value) and 0 < value <= 1000):
        raise UsageError(f"redraw must be a timestep above 0 (data) and at most 1000 (noise), got {value!r}")
    for name in ("audio_steps", "uncond_every"):
        value = given.get(name)
        if value is not None and not (_is_whole(value) and 1 <= value <= MAX_EVALUATIONS):
            raise UsageError(f"{name} must be a whole number from 1 to {MAX_EVALUATIONS}, got {value!r}")
    value = given.get("guidance_rescale")
    if value is not None and not (_is_number(value) and 0 <= value <= 1):
        raise UsageError(f"guidance_rescale must be a number from 0 (off) to 1, got {value!r}")
    value = given.get("cache")
    if value is not None and not isinstance(value, CacheConfig):
        parse_cache(value)
    value = given.get("guidance_interval")
    if value is not None:
        pair = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_number, value))
        if not pair or not 0 <= value[0] < value[1] <= 1000:
            raise UsageError(
                f"guidance_interval must be two timesteps LOW < HIGH from 0 (data) to 1000 (noise), got {value!r}"
            )


def check_sampler(given: Mapping[str, Any], sampling: Mapping[str, Any], *, steps: int, order: str) -> SamplerOptions:
    """Fill in what was not given with the checkpoint's settings, and refuse what cannot be done.

    Args:
        given: the arguments of the call, of :class:`SamplerKeywords`.
        sampling: the checkpoint's "sampling", which may hold the same names.
        steps, order: of this call.

    Raises:
        UsageError: a name, a range, or a combination that is unusable.
    """
    check_ranges(given)
    asked = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    own = {name: sampling[name] for name in OPTIONS if sampling.get(name) is not None}
    own.pop("timestep_ratio", None)  # the constant of the "uniform" schedule, see javis/sample/schedules.py
    if (steps, order) != (sampling.get("steps"), sampling.get("order", "together")):
        own.pop("audio_steps", None)  # it divides the checkpoint's own steps
    if order != "sound_first":
        own.pop("redraw", None)
    if asked.keys() & {"timestep_ratio", "redraw"}:
        own.pop("schedule", None)  # both are about evenly spaced timesteps
    check_ranges(own)
    options = own | asked
    if "guidance_interval" in options:
        low, high = options["guidance_interval"]
        options["guidance_interval"] = (float(low), float(high))
    if isinstance(options.get("cache"), str):
        options["cache"] = parse_cache(options["cache"], sampling.get("cache_polynomials"))
    made = SamplerOptions(**options)
    if made.timestep_ratio is not None and made.schedule not in (None, "uniform"):
        raise UsageError(f"timestep_ratio is for schedule 'uniform', and schedule is {made.schedule!r}; leave one out")
    if made.redraw is not None and order != "sound_first":
        raise UsageError(f"redraw is for order 'sound_first', and order is {order!r}; leave one out")
    if made.redraw is not None and made.schedule == "fitted":
        raise UsageError("redraw is for even timesteps, and schedule is 'fitted', whose lists say where parts begin")
    if made.audio_steps is None or (made.audio_steps == steps and order == "together"):
        return made
    if order == "sound_first" and made.audio_steps >= steps:
        raise UsageError(
            f"audio_steps must be fewer than the steps, of which some are left for the picture: from 1 to steps - 1 "
            f"with order 'sound_first', got {made.audio_steps} of {steps}"
        )
    if order == "together" and made.solver in TWO_STAGES:
        raise UsageError(
            f"solver {made.solver!r} evaluates twice an interval, so picture and sound cannot have steps of their own "
            f"({steps} and {made.audio_steps}); expected one of "
            f"{', '.join(name for name in SOLVERS if name not in TWO_STAGES)}, or order 'sound_first'"
        )
    return made


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
