// Arguments of the CUDA norms with modulation, and their entry points. Plain C; see docs/kernels/ada_layer_norm.md.
//
// All fields are words of 8 bytes, so that a test can fill them in through ctypes. Strides count elements; rows of C
// values are dense and 16-byte aligned, C is divisible by 8. Modulation has one row a sample.

#pragma once

#include <cstdint>

namespace javis::cuda {

enum NormDtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Fp8Mode : int64_t { kNoFp8 = 0, kFp8Static = 1, kFp8Rows = 2 };

// r = x + gate * h (without h: r = x),  y = (r - mean) * rstd * (1 + scale) + shift.
struct NormForward {
  const void *x, *h;                    // h: null without a residual
  const void *gate, *shift, *scale;     // of timestep t; gate: null for 1
  const void *gate0, *shift0, *scale0;  // of timestep 0; used where frame_mask is 0
  const uint8_t* frame_mask;            // [batch, frames]; null: all timestep t
  void *r, *y;                          // r: null without h; y: dtype of x, or e4m3
  float *mean, *rstd;                   // [batch, tokens]; null with float8
  const float* y_scale;                 // one number, for kFp8Static
  float* row_scale;                     // [batch, tokens], for kFp8Rows
  int64_t x_b, x_n, h_b, h_n;
  int64_t gate_b, shift_b, scale_b, gate0_b, shift0_b, scale0_b;
  int64_t batch, tokens, width, frames;
  int64_t dtype;             // of x, h and r
  int64_t float_modulation;  // modulation is float32; else it has the dtype of x
  int64_t fp8;
  double eps;
};

// dx = dr + rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * (1 + scale);  dh = gate * dx;  and the sums over
// tokens dshift = sum(dy), dscale = sum(dy * xhat), dgate = sum(dx * h).
struct NormBackward {
  const void *dr, *dy, *r, *h;  // dr: null without a residual; h: null without a gate
  const float *mean, *rstd;
  const void *gate, *scale, *gate0, *scale0;
  const uint8_t* frame_mask;
  void *dx, *dh;      // dh: null without a gate
  float* partial;     // [batch * frames * parts, sums, width]: workspace
  void* dmodulation;  // [sums or 2 sums, batch, width]: dshift, dscale(, dgate), with a mask then those of timestep 0
  int64_t dr_b, dr_n, dy_b, dy_n, r_b, r_n, h_b, h_n;
  int64_t gate_b, scale_b, gate0_b, scale0_b;
  int64_t batch, tokens, width, frames;
  int64_t parts, rows_per_part;  // of each frame: norm_parts below
  int64_t dtype, float_modulation;
};

constexpr int64_t kMaxNormWidth = 4096;

// Rows whose gradients one block of the backward kernel adds up: about four blocks for each SM of an H100 (132), at
// least 4 rows, so that partial sums (2 or 3 rows of float32 each) stay a small part of the traffic.
inline int64_t norm_rows_per_part(int64_t all_tokens, int64_t places) {
  int64_t rows = 4;
  while (rows < 64 && rows * 512 < all_tokens) rows *= 2;
  return rows < places ? rows : (places > 0 ? places : 1);
}

// The number of values in a row of partial sums for one sample and one column.
inline int64_t norm_sums(bool gate) { return gate ? 3 : 2; }

}  // namespace javis::cuda

extern "C" {
const char* javis_cuda_ada_layer_norm(const javis::cuda::NormForward* arguments, void* stream);
const char* javis_cuda_ada_layer_norm_backward(const javis::cuda::NormBackward* arguments, void* stream);
const char* javis_cuda_gated_residual_ada_layer_norm(const javis::cuda::NormForward* arguments, void* stream);
const char* javis_cuda_gated_residual_ada_layer_norm_backward(const javis::cuda::NormBackward* arguments, void* stream);
}
