// ada_layer_norm on CPU: checks, memory, threads. The arithmetic is in ada_layer_norm_rows.cpp.
//
//   y[b, n, :] = (x[b, n, :] - mean) / sqrt(var + eps) * (1 + scale[b, :]) + shift[b, :]
//
// where frames whose frame_mask is false take (shift0, scale0). x, y: float32 or bfloat16 [B, N, C]; modulation:
// float32 [B, C]; frame_mask: bool [B, T], T divides N; mean and rstd: float32 [B, N], kept for the backward pass.

#include "ada_layer_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "ada_layer_norm_rows.h"
#include "norm_arguments.h"
#include "row_isa.h"

namespace javis::cpu {
namespace {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  static const RowKernels& chosen =
      choose_isa(ada_layer_norm_rows_baseline, ada_layer_norm_rows_avx2, ada_layer_norm_rows_avx512);
#else
  static const RowKernels& chosen = choose_isa(ada_layer_norm_rows_baseline);
#endif
  return chosen;
}

template <typename T>
void forward(const Tensor& x, const Modulation& whole, Tensor& y, Tensor& mean, Tensor& rstd, const Sizes& sizes, float eps,
             void (*kernel)(const ForwardRows<T>&)) {
  const T* x_data = static_cast<const T*>(x.const_data_ptr());
  T* y_data = static_cast<T*>(y.mutable_data_ptr());
  float* mean_data = static_cast<float*>(mean.mutable_data_ptr());
  float* rstd_data = static_cast<float*>(rstd.mutable_data_ptr());
  const int64_t stride_b = x.stride(0), stride_n = x.stride(1);
  const int64_t grain = std::max<int64_t>(1, 16384 / sizes.width);
  torch::stable::parallel_for(0, sizes.batch * sizes.tokens, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // one sample at a time
      const int64_t b = begin / sizes.tokens, row = begin - b * sizes.tokens;
      const int64_t stop = std::min(sizes.tokens, row + (end - begin));
      const int64_t at = b * sizes.width;
      ForwardRows<T> rows{x_data + b * stride_b, stride_n, y_data + b * sizes.tokens * sizes.width,
                          mean_data + b * sizes.tokens, rstd_data + b * sizes.tokens, whole, row, stop, sizes.width, eps};
      rows.modulation.shift += at;
      rows.modulation.scale += at;
      if (whole.frame_mask != nullptr) {
        rows.modulation.shift0 += at;
        rows.modulation.scale0 += at;
        rows.modulation.frame_mask += b * sizes.frames;
      }
      kernel(rows);
      begin += stop - row;
    }
  });
}

template <typename T>
void backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Modulation& whole, Tensor& dx,
              float* partial, int64_t blocks, const Sizes& sizes, void (*kernel)(const BackwardRows<T>&)) {
  const T* dy_data = static_cast<const T*>(dy.const_data_ptr());
  const T* x_data = static_cast<const T*>(x.const_data_ptr());
  T* dx_data = static_cast<T*>(dx.mutable_data_ptr());
  const int64_t dy_b = dy.stride(0), dy_n = dy.stride(1), x_b = x.stride(0), x_n = x.stride(1);
  const int64_t sums = whole.frame_mask == nullptr ? 2 : 4;
  torch::stable::parallel_for(0, sizes.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, row = (i - b * blocks) * kRowsPerBlock;
      BackwardRows<T> rows{dy_data + b * dy_b, dy_n, x_data + b * x_b, x_n, floats(mean, b * sizes.tokens),
                           floats(rstd, b * sizes.tokens), dx_data + b * sizes.tokens * sizes.width,
                           partial + i * sums * sizes.width, whole, row, std::min(sizes.tokens, row + kRowsPerBlock),
                           sizes.width};
      rows.modulation.scale += b * sizes.width;
      if (whole.frame_mask != nullptr) {
        rows.modulation.scale0 += b * sizes.width;
        rows.modulation.frame_mask += b * sizes.frames;
      }
      kernel(rows);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ada_layer_norm(
    const Tensor& x_in,
    const Tensor& shift,
    const Tensor& scale,
    const std::optional<Tensor>& shift0,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask,
    double eps) {
  const Sizes sizes = check_inputs(x_in, frame_mask);
  check_modulation(shift, sizes, "shift");
  check_modulation(scale, sizes, "scale");
  Modulation modulation{floats(shift, 0), floats(scale, 0), nullptr, nullptr, nullptr, sizes.tokens / sizes.frames};
  if (frame_mask.has_value()) {
    STD_TORCH_CHECK(shift0.has_value() && scale0.has_value(), "frame_mask needs shift0 and scale0");
    check_modulation(*shift0, sizes, "shift0");
    check_modulation(*scale0, sizes, "scale0");
    modulation.shift0 = floats(*shift0, 0);
    modulation.scale0 = floats(*scale0, 0);
    modulation.frame_mask = static_cast<const uint8_t*>(frame_mask->const_data_ptr());
  }
  const Tensor x = with_dense_rows(x_in);
  Tensor y = torch::stable::new_empty(x, {sizes.batch, sizes.tokens, sizes.width});
  Tensor mean = torch::stable::new_empty(x, {sizes.batch, sizes.tokens}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {sizes.batch, sizes.tokens}, ScalarType::Float);
  const RowKernels& kernels = row_kernels();
  if (x.scalar_type() == ScalarType::Float)
    forward<float>(x, modulation, y, mean, rstd, sizes, static_cast<float>(eps), kernels.forward_float);
  else
    forward<bf16>(x, modulation, y, mean, rstd, sizes, static_cast<float>(eps), kernels.forward_bf16);
  return {y, mean, rstd};
}

// dmodulation: float32 [2, B, C] (dshift, dscale), or [4, B, C] with a frame mask (dshift, dscale, dshift0, dscale0).
std::tuple<Tensor, Tensor> ada_layer_norm_backward(
    const Tensor& dy_in,
    const Tensor& x_in,
    const Tensor& mean,
    const Tensor& rstd,
    const Tensor& scale,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask) {
  const Sizes sizes = check_inputs(x_in, frame_mask);
  check_shape(dy_in, {sizes.batch, sizes.tokens, sizes.width}, "dy");
  check_dtype(dy_in, x_in.scalar_type(), "dy");
  check_modulation(scale, sizes, "scale");
  for (const Tensor* statistic : {&mean, &rstd}) {
    check_shape(*statistic, {sizes.batch, sizes.tokens}, "mean or rstd");
    check_dtype(*statistic, ScalarType::Float, "mean or rstd");
    check_dense(*statistic, "mean or rstd");
  }
  Modulation modulation{nullptr, floats(scale, 0), nullptr, nullptr, nullptr, sizes.tokens / sizes.frames};
  if (frame_mask.has_value()) {
    STD_TORCH_CHECK(scale0.has_value(), "frame_mask needs scale0");
    check_modulation(*scale0, sizes, "scale0");
    modulation.scale0 = floats(*scale0, 0);
    modulation.frame_mask = static_cast<const uint8_t*>(frame_mask->const_data_ptr());
  }
  const Tensor x = with_dense_rows(x_in), dy = with_dense_rows(dy_in);
  const int64_t sums = frame_mask.has_value() ? 4 : 2;
  const int64_t blocks = (sizes.tokens + kRowsPerBlock - 1) / kRowsPerBlock;
  Tensor dx = torch::stable::new_empty(x, {sizes.batch, sizes.tokens, sizes.width});
  Tensor dmodulation = torch::stable::new_empty(x, {sums, sizes.batch, sizes.width}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(x, {sizes.batch, blocks, sums, sizes.width}, ScalarType::Float);
  float* partial_data = static_cast<float*>(partial.mutable_data_ptr());
  const RowKernels& kernels = row_kernels();
  if (x.scalar_type() == ScalarType::Float)
    backward<float>(dy, x, mean, rstd, modulation, dx, partial_data, blocks, sizes, kernels.backward_float);
  else
    backward<bf16>(dy, x, mean, rstd, modulation, dx, partial_data, blocks, sizes, kernels.backward_bf16);

  sum_blocks(partial_data, static_cast<float*>(dmodulation.mutable_data_ptr()), sizes.batch, blocks, sums, sizes.width);
  return {dx, dmodulation};
}

}  // namespace javis::cpu

// Plain C, read through ctypes by javis/kernels/native.py: which copy of the row kernels runs on this machine.
extern "C" __attribute__((visibility("default"))) const char* javis_cpu_isa() {
  try {
    return javis::cpu::row_kernels().isa;
  } catch (...) {  // no exception may cross into C; a call of the op reports it in words
    return "unavailable";
  }
}
