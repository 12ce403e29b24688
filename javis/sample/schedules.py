"""Timestep schedules: at which timesteps the intervals of a solution begin.

- "uniform": ``1000 * (1 - i/n)``, shifted towards noise by a constant ratio (:func:`javis.flow.transform_timestep`).
- "official": the same with a ratio that grows with the size and the length of the clip
  (:func:`javis.flow.timestep_ratio`).
- "fitted": lists of timesteps from the checkpoint's settings, made for it by ``javis fit-schedule``.

A solution has one or two parts (:func:`javis.sample.parts`), with timesteps from 1000 down; the last interval of
each ends at 0. The second part may begin lower, from the picture of the first one
(:func:`javis.sample.sample_in_order`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from javis.errors import UsageError
from javis.flow import NUM_TIMESTEPS, timestep_ratio
from javis.sample.order import Order, shifted_timesteps
from javis.sampler_options import SamplerOptions

FITTED = "fitted"  # the name of the lists in the checkpoint's "sampling": {order: {intervals joined by "+": [[t], ..]}}


def chosen_schedule(sampling: Mapping[str, Any], options: SamplerOptions) -> str:
    """Name of the schedule: asked for, or the checkpoint's, or what its settings have a ratio for."""
    if options.schedule is not None:
        return options.schedule
    if options.timestep_ratio is not None:
        return "uniform"
    return "uniform" if "timestep_ratio" in sampling else "official"


def schedule_of(
    sampling: Mapping[str, Any], options: SamplerOptions, *, height: int, width: int, frames: int, order: Order
) -> Callable[[Sequence[int]], list[Tensor]]:
    """What gives the timesteps of all parts, float32 [intervals] each, from their numbers of intervals.

    Args:
        sampling: settings of the checkpoint: "timestep_ratio" and "fitted" count, if they are there.
        options: of the call.
        height, width, frames: of the clip, in pixels and model frames.
        order: in which the clip is made.

    Raises:
        UsageError: from the returned function, if nothing was fitted for these numbers.
    """
    name = chosen_schedule(sampling, options)
    if name == FITTED:
        return lambda counts: fitted_timesteps(sampling.get(FITTED), order, counts)
    ratio = ratio_of(sampling, options, height=height, width=width, frames=frames)
    return lambda counts: shifted_timesteps(counts, ratio, options.redraw)


def ratio_of(sampling: Mapping[str, Any], options: SamplerOptions, *, height: int, width: int, frames: int) -> float:
    """Shift of the "uniform" and the "official" timesteps towards noise; arguments as of :func:`schedule_of`."""
    if chosen_schedule(sampling, options) == "official":
        return float(timestep_ratio(*(torch.tensor(float(n)) for n in (height, width, frames))))
    asked = options.timestep_ratio
    return float(sampling.get("timestep_ratio", 1.0) if asked is None else asked)


def fitted_key(counts: Sequence[int]) -> str:
    """Name of a fit: the intervals of its parts, such as "8" or "4+4"."""
    return "+".join(map(str, counts))


def has_fit(sampling: Mapping[str, Any], order: Order, counts: Sequence[int]) -> bool:
    """Whether timesteps were fitted for parts of so many intervals."""
    fitted = sampling.get(FITTED)
    return isinstance(fitted, Mapping) and fitted_key(counts) in fitted.get(order, {})


def fitted_first_part(sampling: Mapping[str, Any], order: Order, steps: int) -> int | None:
    """Intervals of the first part in the fit for ``steps`` intervals in two parts, if there is exactly one such fit."""
    fitted = sampling.get(FITTED)
    keys = fitted.get(order, {}) if isinstance(fitted, Mapping) else {}
    parts = [key.split("+") for key in keys]
    first = [int(p[0]) for p in parts if len(p) == 2 and all(n.isdigit() for n in p) and sum(map(int, p)) == steps]
    return first[0] if len(first) == 1 else None


def fitted_timesteps(fitted: Any, order: Order, counts: Sequence[int]) -> list[Tensor]:
    """The timesteps that were fitted for parts of so many intervals.

    Raises:
        UsageError: there are none, or the checkpoint's are unusable.
    """
    lists = fitted.get(order, {}) if isinstance(fitted, Mapping) else {}
    key = fitted_key(counts)
    if key not in lists:
        there = ", ".join(sorted(lists)) or "none"
        raise UsageError(
            f"the checkpoint has no fitted timesteps for {key} intervals in order {order!r}; there are: {there}. "
            "'javis fit-schedule' makes them; or choose schedule 'uniform' or 'official'"
        )
    found = lists[key]
    fits = isinstance(found, list) and [len(part) for part in found] == list(counts)
    if not fits or not usable(found[0]) or not all(usable(part, redrawn=True) for part in found[1:]):
        raise UsageError(
            f"the checkpoint's fitted timesteps for {key} intervals are unusable; expected lists of so many numbers "
            "that decrease from 1000 (the second list also from less) and stay above 0; make them again with "
            "'javis fit-schedule'"
        )
    return [torch.tensor(part, dtype=torch.float32) for part in found]


def usable(times: Sequence[Any], *, redrawn: bool = False) -> bool:
    """Whether these are decreasing timesteps from 1000 (``redrawn``: or from less), all above 0."""
    if not times or not all(isinstance(t, (int, float)) and math.isfinite(t) for t in times):
        return False
    begins = times[0] == NUM_TIMESTEPS or (redrawn and times[0] < NUM_TIMESTEPS)
    return begins and all(a > b for a, b in zip(times, [*times[1:], 0.0], strict=True))
