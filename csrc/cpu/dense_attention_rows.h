// The inner loops of dense attention: one copy per instruction set (see setup.py), and one for processors that multiply
// bfloat16 (AVX512_BF16), all chosen at run time.

#pragma once

#include <cstdint>

#include "ada_layer_norm_rows.h"  // bf16

namespace javis::cpu {

constexpr int64_t kQueryBlock = 64;   // queries whose scores are computed together: four vectors of 16
constexpr int64_t kKeyBlock = 126;    // keys whose scores are kept at a time, at most; a multiple of 6, and even
constexpr int64_t kQueryChunk = 1024;  // queries of a task: the keys of its head are packed once for them

// One head of one sample. Strides in elements, between tokens; the values of a head are dense.
template <typename T>
struct DenseHead {
  const T* q;
  const T* k;
  const T* v;
  T* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  const uint8_t* mask;  // [keys], 0: no key; null: all are
  int64_t queries, keys, size;
  float* packed;        // packed_floats(keys, size), filled by `pack`
  float* work;          // dense_work_floats(size)
};

// static: a copy with external linkage could be the one compiled for a processor that is not there.
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static inline int64_t packed_floats(int64_t keys, int64_t size) {
  return round_up(keys, 6) * size + round_up(keys, 2) * round_up(size, 6) + 16;
}

static inline int64_t dense_work_floats(int64_t size) {
  const int64_t columns = round_up(size, 48);  // of 6 and of 16
  return (2 * columns + kKeyBlock + 4) * kQueryBlock + 16 * columns;
}

template <typename T>
struct DenseFunctions {
  int64_t (*pack)(const DenseHead<T>&);  // keys and values into `packed`; returns how many keys there are
  void (*attend)(const DenseHead<T>&, int64_t keys, int64_t first, int64_t last);  // queries first to last
};

struct DenseKernels {
  DenseFunctions<float> of_float;
  DenseFunctions<bf16> of_bf16;
};

extern const DenseKernels dense_attention_rows_baseline;
#if defined(__x86_64__)
extern const DenseKernels dense_attention_rows_avx2;
extern const DenseKernels dense_attention_rows_avx512;
extern const DenseFunctions<bf16> dense_attention_avx512bf16;
#endif

}  // namespace javis::cpu
