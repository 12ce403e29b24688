"""Huge pages: counted in page faults of a fresh process, since the setting concerns all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import resource, sys
from javis.host_memory import ask_for_huge_pages
if sys.argv[1] == "ask":
    ask_for_huge_pages()
import torch
before = resource.getrusage(resource.RUSAGE_SELF)
blocks = [torch.zeros(96 << 18) for _ in range(2)]  # 96 MiB each, written
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before.ru_minflt)
"""


def page_faults(how: str, **setting: str) -> int:
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | setting
    command = [sys.executable, "-c", COUNT, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


def huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not huge_pages(), reason="this kernel gives no huge pages")
def test_large_blocks_take_huge_pages_unless_the_user_said_otherwise() -> None:
    small = page_faults("ask", THP_MEM_ALLOC_ENABLE="0")
    assert small > 2 * 96 * 200  # of the 256 pages in a MiB
    assert page_faults("ask") < small / 4
