// gated_residual_ada_layer_norm on CPU: checks, memory, threads. The arithmetic is in
// gated_residual_ada_layer_norm_rows.cpp.
//
//   r[b, n, :] = x[b, n, :] + gate[b, :] * h[b, n, :]          (gate may be missing: 1)
//   y[b, n, :] = (r[b, n, :] - mean) / sqrt(var + eps) * (1 + scale[b, :]) + shift[b, :]
//
// where frames whose frame_mask is false take (gate0, shift0, scale0). x, h, r, y: float32 or bfloat16 [B, N, C];
// modulation: float32 [B, C]; frame_mask: bool [B, T], T divides N; mean and rstd: float32 [B, N].

#include "gated_residual_ada_layer_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "gated_residual_ada_layer_norm_rows.h"
#include "norm_arguments.h"
#include "row_isa.h"

namespace javis::cpu {
namespace {

const GatedRowKernels& gated_row_kernels() {
#if defined(__x86_64__)
  static const GatedRowKernels& chosen = choose_isa(
      gated_residual_ada_layer_norm_rows_baseline, gated_residual_ada_layer_norm_rows_avx2,
      gated_residual_ada_layer_norm_rows_avx512);
#else
  static const GatedRowKernels& chosen = choose_isa(gated_residual_ada_layer_norm_rows_baseline);
#endif
  return chosen;
}

const float* optional_floats(const std::optional<Tensor>& tensor, const Sizes& sizes, const char* name) {
  if (!tensor.has_value()) return nullptr;
  check_modulation(*tensor, sizes, name);
  return floats(*tensor, 0);
}

void check_like(const Tensor& tensor, const Tensor& like, const Sizes& sizes, const char* name) {
  check_shape(tensor, {sizes.batch, sizes.tokens, sizes.width}, name);
  check_dtype(tensor, like.scalar_type(), name);
}

// Moves what belongs to sample 0 to sample b.
void to_sample(Modulation& m, const float*& gate, const float*& gate0, int64_t b, const Sizes& sizes) {
  const int64_t at = b * sizes.width;
  for (const float** vector : {&m.shift, &m.scale, &m.shift0, &m.scale0, &gate, &gate0})
    if (*vector != nullptr) *vector += at;
  if (m.frame_mask != nullptr) m.frame_mask += b * sizes.frames;
}

template <typename T>
void forward(const Tensor& x, const Tensor& h, const GatedForwardRows<T>& whole, const Sizes& sizes,
             void (*kernel)(const GatedForwardRows<T>&)) {
  const int64_t x_b = x.stride(0), h_b = h.stride(0);
  const int64_t grain = std::max<int64_t>(1, 16384 / sizes.width);
  torch::stable::parallel_for(0, sizes.batch * sizes.tokens, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // one sample at a time
      const int64_t b = begin / sizes.tokens, row = begin - b * sizes.tokens, first = b * sizes.tokens;
      GatedForwardRows<T> rows = whole;
      rows.x += b * x_b;
      rows.h += b * h_b;
      rows.r += first * sizes.width;
      rows.y += first * sizes.width;
      rows.mean += first;
      rows.rstd += first;
      rows.begin = row;
      rows.end = std::min(sizes.tokens, row + (end - begin));
      to_sample(rows.modulation, rows.gate, rows.gate0, b, sizes);
      kernel(rows);
      begin += rows.end - row;
    }
  });
}

template <typename T>
void backward(const Tensor& dr, const Tensor& dy, const Tensor& r, int64_t h_b, const GatedBackwardRows<T>& whole,
              int64_t blocks, int64_t sums, const Sizes& sizes, void (*kernel)(const GatedBackwardRows<T>&)) {
  const int64_t dr_b = dr.stride(0), dy_b = dy.stride(0), r_b = r.stride(0);
  torch::stable::parallel_for(0, sizes.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, row = (i - b * blocks) * kRowsPerBlock, first = b * sizes.tokens;
      GatedBackwardRows<T> rows = whole;
      rows.dr += b * dr_b;
      rows.dy += b * dy_b;
      rows.r += b * r_b;
      if (rows.h != nullptr) rows.h += b * h_b;
      rows.mean += first;
      rows.rstd += first;
      rows.dx += first * sizes.width;
      if (rows.dh != nullptr) rows.dh += first * sizes.width;
      rows.partial += i * sums * sizes.width;
      rows.begin = row;
      rows.end = std::min(sizes.tokens, row + kRowsPerBlock);
      to_sample(rows.modulation, rows.gate, rows.gate0, b, sizes);
      kernel(rows);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm(
    const Tensor& x_in,
    const Tensor& h_in,
    const std::optional<Tensor>& gate,
    const Tensor& shift,
    const Tensor& scale,
    const std::optional<Tensor>& gate0,
    const std::optional<Tensor>& shift0,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask,
    double eps) {
  const Sizes sizes = check_inputs(x_in, frame_mask);
  check_like(h_in, x_in, sizes, "h");
  check_modulation(shift, sizes, "shift");
  check_modulation(scale, sizes, "scale");
  const float* gate_data = optional_floats(gate, sizes, "gate");
  const float* gate0_data = optional_floats(gate0, sizes, "gate0");
  Modulation modulation{floats(shift, 0), floats(scale, 0), nullptr, nullptr, nullptr, sizes.tokens / sizes.frames};
  if (frame_mask.has_value()) {
    STD_TORCH_CHECK(shift0.has_value() && scale0.has_value(), "frame_mask needs shift0 and scale0");
    STD_TORCH_CHECK(gate.has_value() == gate0.has_value(), "frame_mask needs gate and gate0, or none of them");
    modulation.shift0 = optional_floats(shift0, sizes, "shift0");
    modulation.scale0 = optional_floats(scale0, sizes, "scale0");
    modulation.frame_mask = static_cast<const uint8_t*>(frame_mask->const_data_ptr());
  }
  const Tensor x = with_dense_rows(x_in), h = with_dense_rows(h_in);
  Tensor r = torch::stable::new_empty(x, {sizes.batch, sizes.tokens, sizes.width});
  Tensor y = torch::stable::new_empty(x, {sizes.batch, sizes.tokens, sizes.width});
  Tensor mean = torch::stable::new_empty(x, {sizes.batch, sizes.tokens}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {sizes.batch, sizes.tokens}, ScalarType::Float);
  const auto run = [&]<typename T>(void (*kernel)(const GatedForwardRows<T>&)) {
    const GatedForwardRows<T> whole{
        static_cast<const T*>(x.const_data_ptr()), x.stride(1), static_cast<const T*>(h.const_data_ptr()), h.stride(1),
        static_cast<T*>(r.mutable_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
        static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()),
        gate_data, gate0_data, modulation, 0, 0, sizes.width, static_cast<float>(eps)};
    forward<T>(x, h, whole, sizes, kernel);
  };
  if (x.scalar_type() == ScalarType::Float)
    run(gated_row_kernels().forward_float);
  else
    run(gated_row_kernels().forward_bf16);
  return {r, y, mean, rstd};
}

// dh is empty without a gate: it equals dx. dmodulation: float32 [k, B, C] (dshift, dscale and, with a gate, dgate), or
// [2k, B, C] with a frame mask, those of timestep 0 last.
std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward(
    const Tensor& dr_in,
    const Tensor& dy_in,
    const Tensor& r_in,
    const std::optional<Tensor>& h_in,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& gate,
    const Tensor& scale,
    const std::optional<Tensor>& gate0,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask) {
  const Sizes sizes = check_inputs(r_in, frame_mask);
  check_like(dr_in, r_in, sizes, "dr");
  check_like(dy_in, r_in, sizes, "dy");
  check_modulation(scale, sizes, "scale");
  STD_TORCH_CHECK(gate.has_value() == h_in.has_value(), "the gradient of the gate needs h");
  for (const Tensor* statistic : {&mean, &rstd}) {
    check_shape(*statistic, {sizes.batch, sizes.tokens}, "mean or rstd");
    check_dtype(*statistic, ScalarType::Float, "mean or rstd");
    check_dense(*statistic, "mean or rstd");
  }
  const float* gate_data = optional_floats(gate, sizes, "gate");
  const float* gate0_data = optional_floats(gate0, sizes, "gate0");
  Modulation modulation{nullptr, floats(scale, 0), nullptr, nullptr, nullptr, sizes.tokens / sizes.frames};
  if (frame_mask.has_value()) {
    STD_TORCH_CHECK(scale0.has_value(), "frame_mask needs scale0");
    STD_TORCH_CHECK(gate.has_value() == gate0.has_value(), "frame_mask needs gate and gate0, or none of them");
    modulation.scale0 = optional_floats(scale0, sizes, "scale0");
    modulation.frame_mask = static_cast<const uint8_t*>(frame_mask->const_data_ptr());
  }
  const Tensor dr = with_dense_rows(dr_in), dy = with_dense_rows(dy_in), r = with_dense_rows(r_in);
  const bool gated = gate.has_value();
  if (gated) check_like(*h_in, r_in, sizes, "h");
  const Tensor h = gated ? with_dense_rows(*h_in) : r;  // a stand-in that is not read
  const int64_t sums = (gated ? 3 : 2) * (frame_mask.has_value() ? 2 : 1);
  const int64_t blocks = (sizes.tokens + kRowsPerBlock - 1) / kRowsPerBlock;
  Tensor dx = torch::stable::new_empty(r, {sizes.batch, sizes.tokens, sizes.width});
  Tensor dh = gated ? torch::stable::new_empty(r, {sizes.batch, sizes.tokens, sizes.width})
                    : torch::stable::new_empty(r, {0});
  Tensor dmodulation = torch::stable::new_empty(r, {sums, sizes.batch, sizes.width}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(r, {sizes.batch, blocks, sums, sizes.width}, ScalarType::Float);
  float* partial_data = static_cast<float*>(partial.mutable_data_ptr());
  const auto run = [&]<typename T>(void (*kernel)(const GatedBackwardRows<T>&)) {
    const GatedBackwardRows<T> whole{
        static_cast<const T*>(dr.const_data_ptr()), dr.stride(1), static_cast<const T*>(dy.const_data_ptr()), dy.stride(1),
        static_cast<const T*>(r.const_data_ptr()), r.stride(1),
        gated ? static_cast<const T*>(h.const_data_ptr()) : nullptr, h.stride(1), floats(mean, 0), floats(rstd, 0),
        static_cast<T*>(dx.mutable_data_ptr()), gated ? static_cast<T*>(dh.mutable_data_ptr()) : nullptr, partial_data,
        gate_data, gate0_data, modulation, 0, 0, sizes.width};
    backward<T>(dr, dy, r, h.stride(0), whole, blocks, sums, sizes, kernel);
  };
  if (r.scalar_type() == ScalarType::Float)
    run(gated_row_kernels().backward_float);
  else
    run(gated_row_kernels().backward_bf16);
  sum_blocks(partial_data, static_cast<float*>(dmodulation.mutable_data_ptr()), sizes.batch, blocks, sums, sizes.width);
  return {dx, dh, dmodulation};
}

}  // namespace javis::cpu
