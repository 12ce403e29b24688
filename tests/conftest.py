"""One thread per test worker: workers that share the cores must not fight over them. Set before torch is imported."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
