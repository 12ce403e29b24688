// The inner loops of gated_residual_ada_layer_norm, compiled once per instruction set and chosen at run time.
//
// Includes nothing but freestanding headers; see ada_layer_norm_rows.h for why.

#pragma once

#include "ada_layer_norm_rows.h"

namespace javis::cpu {

// Rows [begin, end) of one sample, width values each; strides in elements between rows. gate and gate0 point to width
// floats; gate null: no gate. Outputs are dense.
template <typename T>
struct GatedForwardRows {
  const T* x;
  int64_t x_stride;
  const T* h;
  int64_t h_stride;
  T* r;
  T* y;
  float* mean;  // [rows]
  float* rstd;  // [rows]
  const float* gate;
  const float* gate0;
  Modulation modulation;
  int64_t begin, end, width;
  float eps;
};

template <typename T>
struct GatedBackwardRows {
  const T* dr;
  int64_t dr_stride;
  const T* dy;
  int64_t dy_stride;
  const T* r;
  int64_t r_stride;
  const T* h;  // null without a gate
  int64_t h_stride;
  const float* mean;
  const float* rstd;
  T* dx;
  T* dh;           // written with a gate only
  float* partial;  // [k or 2k, width], overwritten: dshift, dscale(, dgate) of the rows, then those of timestep 0
  const float* gate;
  const float* gate0;
  Modulation modulation;
  int64_t begin, end, width;
};

struct GatedRowKernels {
  void (*forward_float)(const GatedForwardRows<float>&);
  void (*forward_bf16)(const GatedForwardRows<bf16>&);
  void (*backward_float)(const GatedBackwardRows<float>&);
  void (*backward_bf16)(const GatedBackwardRows<bf16>&);
};

// One per instruction set that setup.py compiles.
extern const GatedRowKernels gated_residual_ada_layer_norm_rows_baseline;
#if defined(__x86_64__)
extern const GatedRowKernels gated_residual_ada_layer_norm_rows_avx2;
extern const GatedRowKernels gated_residual_ada_layer_norm_rows_avx512;
#endif

}  // namespace javis::cpu
