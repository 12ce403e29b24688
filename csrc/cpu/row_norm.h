// What the norms of a row share, for *_rows.cpp files only (anonymous namespace: see row_values.h).

#pragma once

#include "row_values.h"

namespace javis::cpu {
namespace {

struct RowStatistics {
  float mean, rstd;
};

// y = (x - mean) * rstd * (1 + scale) + shift over one row. Two passes over a row that sits in cache: the textbook
// one-pass variance cancels when |mean| >> deviation.
template <typename T>
inline RowStatistics normalise_row(const T* x, T* y, const float* shift, const float* scale, int64_t width, float eps) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < width; ++c) sum += load(x + c);
  const float mean = sum / static_cast<float>(width);

  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < width; ++c) {
    const float d = load(x + c) - mean;
    squares += d * d;
  }
  const float rstd = 1.f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);

#pragma omp simd
  for (int64_t c = 0; c < width; ++c) store(y + c, (load(x + c) - mean) * rstd * (1.f + scale[c]) + shift[c]);
  return {mean, rstd};
}

struct RowGradientMeans {
  float g, gx;  // of g = dy * (1 + scale), and of g * xhat
};

// Adds a row to the sums of dshift and dscale and returns the means that dx needs:
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)).
template <typename T>
inline RowGradientMeans add_modulation_gradients(
    const T* dy, const T* x, RowStatistics s, const float* scale, int64_t width, float* dshift, float* dscale) {
  float sum_g = 0.f, sum_gx = 0.f;
#pragma omp simd reduction(+ : sum_g, sum_gx)
  for (int64_t c = 0; c < width; ++c) {
    const float d = load(dy + c);
    const float xhat = (load(x + c) - s.mean) * s.rstd;
    const float g = d * (1.f + scale[c]);
    sum_g += g;
    sum_gx += g * xhat;
    dshift[c] += d;
    dscale[c] += d * xhat;
  }
  return {sum_g / static_cast<float>(width), sum_gx / static_cast<float>(width)};
}

// One value of that dx.
template <typename T>
inline float norm_gradient(const T* dy, const T* x, float scale, RowStatistics s, RowGradientMeans means) {
  const float xhat = (load(x) - s.mean) * s.rstd;
  return s.rstd * (load(dy) * (1.f + scale) - means.g - xhat * means.gx);
}

}  // namespace
}  // namespace javis::cpu
