// Inner loops of ada_layer_norm. JAVIS_ISA names the instruction set this copy is compiled for.
//
// Forward, per row:   xhat = (x - mean) * rstd,   y = xhat * (1 + scale) + shift
// Backward, per row:  g = dy * (1 + scale),       dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
//                     dshift = sum over rows of dy, dscale = sum over rows of dy * xhat

#include "ada_layer_norm_rows.h"
#include "row_norm.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

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

    const RowStatistics s = normalise_row(x, y, shift, scale, width, rows.eps);
    rows.mean[row] = s.mean;
    rows.rstd[row] = s.rstd;
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
    const RowStatistics s{rows.mean[row], rows.rstd[row]};
    const RowGradientMeans means = add_modulation_gradients(dy, x, s, scale, width, dshift, dscale);
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) store(dx + c, norm_gradient(dy + c, x + c, scale[c], s, means));
  }
}

}  // namespace

#define JAVIS_STRING2(a) #a
#define JAVIS_STRING(a) JAVIS_STRING2(a)

extern const RowKernels JAVIS_JOIN(ada_layer_norm_rows_, JAVIS_ISA) = {
    JAVIS_STRING(JAVIS_ISA), &forward<float>, &forward<bf16>, &backward<float>, &backward<bf16>};

}  // namespace javis::cpu
