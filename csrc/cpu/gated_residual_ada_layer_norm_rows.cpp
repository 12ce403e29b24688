// Inner loops of gated_residual_ada_layer_norm. JAVIS_ISA names the instruction set this copy is compiled for.
//
// Forward, per row:   r = x + gate * h,           y = (r - mean) * rstd * (1 + scale) + shift
// Backward, per row:  g = dy * (1 + scale),       dx = dr + rstd * (g - mean(g) - xhat * mean(g * xhat)),   dh = gate * dx
//                     dshift, dscale, dgate = sums over rows of dy, dy * xhat, dx * h

#include "gated_residual_ada_layer_norm_rows.h"

#include "row_norm.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

template <typename T>
void forward(const GatedForwardRows<T>& rows) {
  const int64_t width = rows.width;
  const Modulation& m = rows.modulation;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = rows.x + row * rows.x_stride;
    const T* h = rows.h + row * rows.h_stride;
    T* r = rows.r + row * width;
    T* y = rows.y + row * width;
    const bool first = m.uses_first(row);
    const float* shift = first ? m.shift : m.shift0;
    const float* scale = first ? m.scale : m.scale0;
    const float* gate = first ? rows.gate : rows.gate0;

    if (rows.gate == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) store(r + c, load(x + c) + load(h + c));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) store(r + c, load(x + c) + gate[c] * load(h + c));
    }

    // r is in cache now, rounded: the norm sees what later ops see.
    const RowStatistics s = normalise_row(r, y, shift, scale, width, rows.eps);
    rows.mean[row] = s.mean;
    rows.rstd[row] = s.rstd;
  }
}

template <typename T>
void backward(const GatedBackwardRows<T>& rows) {
  const int64_t width = rows.width;
  const Modulation& m = rows.modulation;
  const int64_t sums = rows.gate == nullptr ? 2 : 3;
  for (int64_t i = 0; i < sums * (m.frame_mask == nullptr ? 1 : 2) * width; ++i) rows.partial[i] = 0.f;

  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* dr = rows.dr + row * rows.dr_stride;
    const T* dy = rows.dy + row * rows.dy_stride;
    const T* r = rows.r + row * rows.r_stride;
    T* dx = rows.dx + row * width;
    const bool first = m.uses_first(row);
    const float* scale = first ? m.scale : m.scale0;
    float* dshift = rows.partial + (first ? 0 : sums * width);
    float* dscale = dshift + width;
    const RowStatistics s{rows.mean[row], rows.rstd[row]};
    const RowGradientMeans means = add_modulation_gradients(dy, r, s, scale, width, dshift, dscale);

    if (rows.gate == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c)
        store(dx + c, load(dr + c) + norm_gradient(dy + c, r + c, scale[c], s, means));
    } else {
      const T* h = rows.h + row * rows.h_stride;
      T* dh = rows.dh + row * width;
      const float* gate = first ? rows.gate : rows.gate0;
      float* dgate = dscale + width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        const float total = load(dr + c) + norm_gradient(dy + c, r + c, scale[c], s, means);
        dgate[c] += total * load(h + c);
        store(dh + c, gate[c] * total);
        store(dx + c, total);
      }
    }
  }
}

}  // namespace

extern const GatedRowKernels JAVIS_JOIN(gated_residual_ada_layer_norm_rows_, JAVIS_ISA) = {
    &forward<float>, &forward<bf16>, &backward<float>, &backward<bf16>};

}  // namespace javis::cpu
