"""Which native parts load here, and what the kernels take of the GPU. 1 if a part that was built does not load."""

from __future__ import annotations

import sys

from javis.kernels import native
from javis.kernels.triton_support import HAS_TRITON


def main() -> int:
    record = native.build_record()
    print(f"build record: {record or 'none'}")
    print(f"C++ ops: {native.WHY_NOT or f'loaded, {native.cpu_isa()}'}")
    print(f"CUDA ops: {native.WHY_NOT_CUDA or f'loaded, for sm_{native.cuda_architectures()}'}")
    print(f"Triton: {'installed' if HAS_TRITON else 'missing'}")
    attributes = getattr(native, "kernel_attributes", None)
    if native.WHY_NOT_CUDA is None and attributes is not None:
        try:
            found = attributes()
        except RuntimeError as error:  # no driver: the library loads without one
            print(f"kernel attributes: {error}")
        else:
            for name, facts in found.items() if isinstance(found, dict) else enumerate(found):
                print(f"  {name}: {facts}")
    broken = (native.LIBRARY.is_file() and native.WHY_NOT is not None) or (
        native.CUDA_LIBRARY.is_file() and native.WHY_NOT_CUDA is not None
    )
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
