"""What a call allocates, by the records of PyTorch's profiler: independent of what the plan counts."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_allocated(run: Callable[[], object]) -> int:
    """Most bytes that CPU allocations during ``run`` held at one time, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    results = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        now += nbytes
        most = max(most, now)
    assert most > 0, "the profiler saw no allocation"
    return most
