// Inner loops of qk_norm_rope. JAVIS_ISA names the instruction set this copy is compiled for.
//
// Forward:   n = x inverse weight with inverse = 1 / sqrt(mean(x^2) + eps), y = n rotated
// Backward:  dn = dy rotated back, xhat = x inverse, h = dn weight: dx = inverse (h - xhat mean(h xhat)), dweight += dn xhat

#include "qk_norm_rope_rows.h"

#include "row_values.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

template <typename T>
float inverse_norm(const T* x, int64_t size, float eps) {
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < size; ++c) squares += load(x + c) * load(x + c);
  return 1.f / __builtin_sqrtf(squares / static_cast<float>(size) + eps);
}

template <typename T>
void forward(const TokenForward<T>& token) {
  const int64_t size = token.size;
  float row[kMaxHead];
  for (int64_t h = 0; h < token.heads; ++h) {
    const T* x = token.x + h * token.stride_h;
    T* y = token.y + h * size;
    if (token.weight != nullptr) {
      const float inverse = inverse_norm(x, size, token.eps);
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) row[c] = load(x + c) * inverse * token.weight[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) row[c] = load(x + c);
    }
    if (token.cos != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < size / 2; ++i) {
        const float even = row[2 * i], odd = row[2 * i + 1];
        row[2 * i] = even * token.cos[i] - odd * token.sin[i];
        row[2 * i + 1] = odd * token.cos[i] + even * token.sin[i];
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) store(y + c, row[c]);
  }
}

template <typename T>
void backward(const TokenBackward<T>& all) {
  const TokenForward<T>& token = all.forward;
  const int64_t size = token.size;
  float row[kMaxHead];
  for (int64_t h = 0; h < token.heads; ++h) {
    const T* x = token.x + h * token.stride_h;
    const T* dy = all.dy + h * size;
    T* dx = token.y + h * size;
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) row[c] = load(dy + c);
    if (token.cos != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < size / 2; ++i) {
        const float even = row[2 * i], odd = row[2 * i + 1];
        row[2 * i] = even * token.cos[i] + odd * token.sin[i];
        row[2 * i + 1] = odd * token.cos[i] - even * token.sin[i];
      }
    }
    if (token.weight != nullptr) {
      const float inverse = inverse_norm(x, size, token.eps);
      float dot = 0.f;
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < size; ++c) {
        const float xhat = load(x + c) * inverse;
        all.dweight[c] += row[c] * xhat;
        dot += row[c] * token.weight[c] * xhat;
      }
      const float mean = dot / static_cast<float>(size);
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) row[c] = inverse * (row[c] * token.weight[c] - load(x + c) * inverse * mean);
    }
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) store(dx + c, row[c]);
  }
}

}  // namespace

extern const QkNormRopeKernels JAVIS_JOIN(qk_norm_rope_rows_, JAVIS_ISA) = {
    &forward<float>, &forward<bf16>, &backward<float>, &backward<bf16>};

}  // namespace javis::cpu
