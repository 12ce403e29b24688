// Inner loops of bias_gelu. JAVIS_ISA names the instruction set this copy is compiled for.
//
// With x = z + bias, u = sqrt(2/pi) (x + 0.044715 x^3) and s = 1 / (1 + exp(-2 u)), which is (1 + tanh(u)) / 2:
//   y  = x s                                       (no cancellation for negative x, which 1 + tanh(u) has)
//   dz = dy (s + x s (1 - s) 2 u'),   2 u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)

#include "bias_gelu_rows.h"
#include "row_exp.h"
#include "row_values.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

constexpr float kTwoSlope = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kCubic = 0.044715f;

inline float gelu(float x) { return x / (1.f + exp_of(-kTwoSlope * (x + kCubic * x * x * x))); }

inline float gelu_slope(float x) {
  const float exponent = -kTwoSlope * (x + kCubic * x * x * x);
  const float e = exp_of(exponent > 87.f ? 87.f : exponent);  // finite, so that s * e is 1 and not 0 * inf
  const float s = 1.f / (1.f + e);
  return s + x * s * (s * e) * kTwoSlope * (1.f + 3.f * kCubic * x * x);
}

template <typename T, bool BIAS>
void forward(const BiasGeluRows<T>& rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* z = rows.z + row * rows.width;
    T* y = rows.y + row * rows.width;
#pragma omp simd
    for (int64_t c = 0; c < rows.width; ++c) store(y + c, gelu(load(z + c) + (BIAS ? rows.bias[c] : 0.f)));
  }
}

template <typename T, bool BIAS>
void backward(const BiasGeluBackwardRows<T>& rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* dy = rows.dy + row * rows.width;
    const T* z = rows.z + row * rows.width;
    T* dz = rows.dz + row * rows.width;
#pragma omp simd
    for (int64_t c = 0; c < rows.width; ++c)
      store(dz + c, load(dy + c) * gelu_slope(load(z + c) + (BIAS ? rows.bias[c] : 0.f)));
  }
}

template <typename T>
void forward_any(const BiasGeluRows<T>& rows) {
  rows.bias == nullptr ? forward<T, false>(rows) : forward<T, true>(rows);
}

template <typename T>
void backward_any(const BiasGeluBackwardRows<T>& rows) {
  rows.bias == nullptr ? backward<T, false>(rows) : backward<T, true>(rows);
}

}  // namespace

extern const BiasGeluKernels JAVIS_JOIN(bias_gelu_rows_, JAVIS_ISA) = {
    &forward_any<float>, &forward_any<bf16>, &backward_any<float>, &backward_any<bf16>};

}  // namespace javis::cpu
