"""Which native parts load here, what ptxas said of the CUDA kernels, and what the GPU says of them.

1 if a part that was built does not load, or a kernel breaks the gate of `make native-cuda` (for this GPU alone).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from javis.errors import UsageError
from javis.kernels import native, ptxas
from javis.kernels.triton_support import HAS_TRITON


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.loads", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build", type=Path, default=Path("build"), help="where the logs of the CUDA build are")
    args = parser.parse_args(arguments)
    print(f"build record: {native.build_record() or 'none'}")
    print(f"C++ ops: {native.WHY_NOT or f'loaded, {native.cpu_isa()}'}")
    print(f"CUDA ops: {native.WHY_NOT_CUDA or 'loaded, for ' + ', '.join(native.cuda_architectures())}")
    print(f"Triton: {'installed' if HAS_TRITON else 'missing'}")
    red = False
    try:
        kernels = ptxas.collect(args.build)
        print("\n".join(ptxas.table(kernels)))
        red = any(kernel.red() is not None for kernel in kernels)
    except UsageError as error:
        print(f"ptxas: {error}")
    try:
        for facts in native.kernel_attributes():
            print(f"  {facts}")
    except UsageError as error:
        print(f"kernel attributes: {error}")
    reasons = ((native.LIBRARY, native.WHY_NOT), (native.CUDA_LIBRARY, native.WHY_NOT_CUDA))
    return int(red or any(path.is_file() and why is not None for path, why in reasons))


if __name__ == "__main__":
    sys.exit(main())
