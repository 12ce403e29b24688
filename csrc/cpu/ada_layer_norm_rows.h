// The inner loops of ada_layer_norm, compiled once per instruction set (see setup.py) and chosen at run time.
//
// ada_layer_norm_rows.cpp includes nothing but this file and freestanding headers: an inline function of the standard
// library compiled there with AVX-512 could be the copy the linker keeps for machines that do not have it.

#pragma once

#include <cstdint>

namespace javis::cpu {

// bfloat16 as raw bits; float is its own storage.
struct bf16 {
  uint16_t bits;
};

// One sample's modulation, each pointer to C floats; the 0-suffixed ones belong to frames at t = 0 and are null when
// there is no frame mask.
struct Modulation {
  const float* shift;
  const float* scale;
  const float* shift0;
  const float* scale0;
  const uint8_t* frame_mask;   // [frames], nonzero: (shift, scale); zero: (shift0, scale0). Null: all (shift, scale).
  int64_t tokens_per_frame;

  bool uses_first(int64_t row) const { return frame_mask == nullptr || frame_mask[row / tokens_per_frame] != 0; }
};

// Rows [begin, end) of one sample, width values each; strides in elements between rows.
template <typename T>
struct ForwardRows {
  const T* x;
  int64_t x_stride;
  T* y;          // dense
  float* mean;   // [rows]
  float* rstd;   // [rows]
  Modulation modulation;
  int64_t begin, end, width;
  float eps;
};

template <typename T>
struct BackwardRows {
  const T* dy;
  int64_t dy_stride;
  const T* x;
  int64_t x_stride;
  const float* mean;
  const float* rstd;
  T* dx;           // dense
  float* partial;  // [2 or 4, width], overwritten: sums over these rows of dshift, dscale(, dshift0, dscale0)
  Modulation modulation;
  int64_t begin, end, width;
};

struct RowKernels {
  const char* isa;
  void (*forward_float)(const ForwardRows<float>&);
  void (*forward_bf16)(const ForwardRows<bf16>&);
  void (*backward_float)(const BackwardRows<float>&);
  void (*backward_bf16)(const BackwardRows<bf16>&);
};

// One per instruction set that setup.py compiles.
extern const RowKernels ada_layer_norm_rows_baseline;
#if defined(__x86_64__)
extern const RowKernels ada_layer_norm_rows_avx2;
extern const RowKernels ada_layer_norm_rows_avx512;
#endif

}  // namespace javis::cpu
