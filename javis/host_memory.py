"""Memory of the host, for programs that compute on CPU.

glibc hands every large block that is freed back to the system, and the next block of that size is touched anew page by
page, each a fault that zeroes 4 KiB. A step of the full-size model takes and frees blocks of 100 MB all the time, and
on virtual machines such faults are dear. Huge pages make 512 of them one.
"""

from __future__ import annotations

import os


def ask_for_huge_pages() -> None:
    """Let torch ask the kernel for huge pages (Linux; elsewhere nothing happens). What the user has set stays.

    It concerns the whole process, so javis calls it in its own programs (the command line, benchmarks) and never when
    it is imported. Call it before torch allocates, which reads the setting then.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
