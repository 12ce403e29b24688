"""Memory of the host, for programs that compute on CPU.

glibc hands every large block that is freed back to the system, and the next block of that size is touched anew page by
page, each a fault that zeroes 4 KiB. A step of the full-size model takes and frees blocks of 100 MB all the time, and
on virtual machines such faults are dear.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks and reuse them, and ask for huge pages; True where that is possible (glibc).

    It concerns the whole process, so javis calls it in its own programs (the command line, benchmarks) and never when
    it is imported. Call it before torch is imported, which reads the setting for huge pages then. Memory that is freed
    stays with the process until it ends; the peak is about the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False  # another C library
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
