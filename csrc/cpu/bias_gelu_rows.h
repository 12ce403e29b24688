// The inner loops of bias_gelu, compiled once per instruction set (see setup.py) and chosen at run time.

#pragma once

#include <cstdint>

#include "ada_layer_norm_rows.h"

namespace javis::cpu {

// Rows [begin, end) of width values; all dense. y may be z.
template <typename T>
struct BiasGeluRows {
  const T* z;
  const float* bias;  // [width], null: none
  T* y;
  int64_t begin, end, width;
};

template <typename T>
struct BiasGeluBackwardRows {
  const T* dy;
  const T* z;
  const float* bias;
  T* dz;
  int64_t begin, end, width;
};

struct BiasGeluKernels {
  void (*forward_float)(const BiasGeluRows<float>&);
  void (*forward_bf16)(const BiasGeluRows<bf16>&);
  void (*backward_float)(const BiasGeluBackwardRows<float>&);
  void (*backward_bf16)(const BiasGeluBackwardRows<bf16>&);
};

extern const BiasGeluKernels bias_gelu_rows_baseline;
#if defined(__x86_64__)
extern const BiasGeluKernels bias_gelu_rows_avx2;
extern const BiasGeluKernels bias_gelu_rows_avx512;
#endif

}  // namespace javis::cpu
