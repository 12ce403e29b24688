// The inner loops of temporal attention, compiled once per instruction set (see setup.py) and chosen at run time.

#pragma once

#include <cstdint>

#include "ada_layer_norm_rows.h"  // bf16

namespace javis::cpu {

// One place of one sample: T frames, all heads. Strides in elements; the values of a head are dense.
template <typename T>
struct PlaceForward {
  const T* qkv;  // at frame 0
  int64_t stride_t, stride_part, stride_h;  // between frames, between q, k and v, between heads
  T* out;        // at frame 0; heads dense
  int64_t out_stride_t;
  const float* weights;  // [2, D]: of q, of k; null: no norm
  const float* cos;      // [T, D / 2]; null: no rotation
  const float* sin;
  float* work;           // work_floats(T, D)
  int64_t frames, heads, size;
  float eps;
};

template <typename T>
struct PlaceBackward {
  PlaceForward<T> forward;  // out is not used
  const T* dout;
  int64_t dout_stride_t;    // heads dense
  T* dqkv;                  // at frame 0; heads dense
  int64_t d_stride_t, d_stride_part;
  float* dweights;          // [2, D], overwritten: sums over the frames and heads of this place. Null without weights.
};

// static: a copy with external linkage could be the one compiled for a processor that is not there.
static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Both passes use tiles of padded(T) rows of padded(D), of padded(T) columns, and some transposed.
static inline int64_t work_floats(int64_t frames, int64_t size) {
  const int64_t t = padded(frames), d = padded(size);
  return 9 * t * d + 2 * t * t + 2 * t + 16;
}

struct TemporalKernels {
  void (*forward_float)(const PlaceForward<float>&);
  void (*forward_bf16)(const PlaceForward<bf16>&);
  void (*backward_float)(const PlaceBackward<float>&);
  void (*backward_bf16)(const PlaceBackward<bf16>&);
};

extern const TemporalKernels temporal_attention_rows_baseline;
#if defined(__x86_64__)
extern const TemporalKernels temporal_attention_rows_avx2;
extern const TemporalKernels temporal_attention_rows_avx512;
#endif

}  // namespace javis::cpu
