"""One thread per test worker: workers that share the cores must not fight over them. Set before torch is imported."""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402

# Without a GPU, Triton kernels run in Triton's interpreter. It reads this when a kernel file is imported, which happens
# on the first launch, so here is early enough.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
