// The inner loops of group_softmax_, compiled once per instruction set (see setup.py) and chosen at run time.

#pragma once

#include <cstdint>

#include "ada_layer_norm_rows.h"

namespace javis::cpu {

constexpr int64_t kMaxGroup = 1024;  // values of a group; they wait in a buffer on the stack

// Rows [begin, end) of one sample, each of groups * keys values, replaced by the softmax of every group.
template <typename T>
struct GroupSoftmaxRows {
  T* scores;          // dense
  const float* bias;  // [groups * keys]
  int64_t begin, end, groups, keys;
};

struct GroupSoftmaxKernels {
  void (*run_float)(const GroupSoftmaxRows<float>&);
  void (*run_bf16)(const GroupSoftmaxRows<bf16>&);
};

extern const GroupSoftmaxKernels group_softmax_rows_baseline;
#if defined(__x86_64__)
extern const GroupSoftmaxKernels group_softmax_rows_avx2;
extern const GroupSoftmaxKernels group_softmax_rows_avx512;
#endif

}  // namespace javis::cpu
