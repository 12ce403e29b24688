"""Freed memory is kept: counted in page faults of a fresh process, since the setting concerns all of it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from javis.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(96 << 18)  # 96 MiB, written and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(4)))
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_block_that_is_freed_is_taken_again_without_page_faults() -> None:
    anew = page_faults("leave")
    assert anew > 1000
    assert page_faults("keep") < anew / 10  # not none: the kernel may take pages back that it finds idle
