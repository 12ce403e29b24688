// What the CUDA runtime says of a compiled kernel on the device at hand. Plain C: read by the pybind11 module.

#pragma once

struct JavisKernelAttributes {
  const char* name;  // as in the source, with template arguments
  int registers;     // per thread
  int local_bytes;   // per thread: stack and spills
  int shared_bytes;  // per block, static part
  int max_threads;   // per block
  int binary_version, ptx_version;  // 90: sm_90; which of the compiled architectures this device took
  int threads;            // per block, for blocks_per_multiprocessor
  int blocks_per_multiprocessor;  // with that many threads and no dynamic shared memory
};

// Facts about the kernel of that number, for blocks of `threads` (0 or too many: as many as it may have). Returns null, or
// what went wrong. After the last kernel `out->name` is null.
typedef const char* (*JavisKernelAttributesFunction)(int number, int threads, struct JavisKernelAttributes* out);
