// The inner loops of qk_norm_rope, compiled once per instruction set (see setup.py) and chosen at run time.

#pragma once

#include <cstdint>

#include "ada_layer_norm_rows.h"  // bf16

namespace javis::cpu {

constexpr int64_t kMaxHead = 256;  // values: a head is kept on the stack; MAX_NATIVE in contract.py has the same number

// All heads of q or of k of one token. The values of a head are dense.
template <typename T>
struct TokenForward {
  const T* x;
  int64_t stride_h;     // between the heads of x
  T* y;                 // dense
  const float* weight;  // [D]; null: no norm
  const float* cos;     // [D / 2], of this place; null: no rotation
  const float* sin;
  int64_t heads, size;
  float eps;
};

template <typename T>
struct TokenBackward {
  TokenForward<T> forward;  // y is the gradient of x, dense
  const T* dy;              // dense
  float* dweight;           // [D], added to; not used without weight
};

struct QkNormRopeKernels {
  void (*forward_float)(const TokenForward<float>&);
  void (*forward_bf16)(const TokenForward<bf16>&);
  void (*backward_float)(const TokenBackward<float>&);
  void (*backward_bf16)(const TokenBackward<bf16>&);
};

extern const QkNormRopeKernels qk_norm_rope_rows_baseline;
#if defined(__x86_64__)
extern const QkNormRopeKernels qk_norm_rope_rows_avx2;
extern const QkNormRopeKernels qk_norm_rope_rows_avx512;
#endif

}  // namespace javis::cpu
