// Inner loops of ada_layer_norm. JAVIS_ISA names the instruction set this copy is compiled for.
//
// Forward, per row:   xhat = (x - mean) * rstd,   y = xhat * (1 + scale) + shift
// Backward, per row:  g = dy * (1 + scale),       dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//                     dshift = sum over rows of dy, dscale = sum over rows of dy * xhat

#include "ada_layer_norm_rows.h"
#include "row_values.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

// Two passes over a row that sits in cache: the textbook one-pass variance cancels when |mean| >> deviation.
template <typename T>
void forward(const ForwardRows<T>& rows) {
  const int64_t width = rows.width;
  const Modulation& m = rows.modulation;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = rows.x + row * rows.x_stride;
    T* y = rows.y + row * width;
    const bool first = m.uses_first(row);
    const float* shift = first ? m.shift : m.shift0;
    const float* scale = first ? m.scale : m.scale0;

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
    const float rstd = 1.f / __builtin_sqrtf(squares / static_cast<float>(width) + rows.eps);

#pragma omp simd
    for (int64_t c = 0; c < width; ++c) store(y + c, (load(x + c) - mean) * rstd * (1.f + scale[c]) + shift[c]);
    rows.mean[row] = mean;
    rows.rstd[row] = rstd;
  }
}

template <typename T>
void backward(const BackwardRows<T>& rows) {
  const int64_t width = rows.width;
  const Modulation& m = rows.modulation;
  const int64_t sums = (m.frame_mask == nullptr ? 2 : 4) * width;
  for (int64_t i = 0; i < sums; ++i) rows.partial[i] = 0.f;

  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* dy = rows.dy + row * rows.dy_stride;
    const T* x = rows.x + row * rows.x_stride;
    T* dx = rows.dx + row * width;
    const bool first = m.uses_first(row);
    const float* scale = first ? m.scale : m.scale0;
    float* dshift = rows.partial + (first ? 0 : 2 * width);
    float* dscale = dshift + width;
    const float mean = rows.mean[row], rstd = rows.rstd[row];

    float sum_g = 0.f, sum_gx = 0.f;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t c = 0; c < width; ++c) {
      const float d = load(dy + c);
      const float xhat = (load(x + c) - mean) * rstd;
      const float g = d * (1.f + scale[c]);
      sum_g += g;
      sum_gx += g * xhat;
      dshift[c] += d;
      dscale[c] += d * xhat;
    }
    const float mean_g = sum_g / static_cast<float>(width), mean_gx = sum_gx / static_cast<float>(width);

#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
      const float xhat = (load(x + c) - mean) * rstd;
      store(dx + c, rstd * (load(dy + c) * (1.f + scale[c]) - mean_g - xhat * mean_gx));
    }
  }
}

}  // namespace

#define JAVIS_STRING2(a) #a
#define JAVIS_STRING(a) JAVIS_STRING2(a)

extern const RowKernels JAVIS_JOIN(ada_layer_norm_rows_, JAVIS_ISA) = {
    JAVIS_STRING(JAVIS_ISA), &forward<float>, &forward<bf16>, &backward<float>, &backward<bf16>};

}  // namespace javis::cpu
