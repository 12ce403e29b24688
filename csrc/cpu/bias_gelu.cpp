// bias_gelu on CPU: checks, memory, threads. The arithmetic is in bias_gelu_rows.cpp.
//
//   y = gelu_tanh(z + bias)      z, y: float32 or bfloat16 [rows, width], dense; bias: float32 [width] or none
//
// The form with the underscore overwrites z: a new tensor of this size costs more in first touches of its pages than the
// GELU itself.

#include "bias_gelu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "bias_gelu_rows.h"
#include "row_isa.h"

namespace javis::cpu {
namespace {

const BiasGeluKernels& kernels() {
#if defined(__x86_64__)
  static const BiasGeluKernels& chosen = choose_isa(bias_gelu_rows_baseline, bias_gelu_rows_avx2, bias_gelu_rows_avx512);
#else
  static const BiasGeluKernels& chosen = choose_isa(bias_gelu_rows_baseline);
#endif
  return chosen;
}

const float* check_inputs(const Tensor& z, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(z.dim() == 2, "z has ", z.dim(), " dimensions, expected 2: [rows, width]");
  STD_TORCH_CHECK(
      z.scalar_type() == ScalarType::Float || z.scalar_type() == ScalarType::BFloat16, "z must be float32 or bfloat16");
  check_dense(z, "z");
  if (!bias.has_value()) return nullptr;
  check_shape(*bias, {z.size(1)}, "bias");
  check_dtype(*bias, ScalarType::Float, "bias");
  check_dense(*bias, "bias");
  return static_cast<const float*>(bias->const_data_ptr());
}

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

template <typename T>
void forward(const void* z, const float* bias, void* y, int64_t count, int64_t width, void (*kernel)(const BiasGeluRows<T>&)) {
  torch::stable::parallel_for(0, count, rows_per_task(width), [&](int64_t begin, int64_t end) {
    kernel({static_cast<const T*>(z), bias, static_cast<T*>(y), begin, end, width});
  });
}

void forward(const Tensor& z, const float* bias, void* y) {
  if (z.scalar_type() == ScalarType::Float)
    forward<float>(z.const_data_ptr(), bias, y, z.size(0), z.size(1), kernels().forward_float);
  else
    forward<bf16>(z.const_data_ptr(), bias, y, z.size(0), z.size(1), kernels().forward_bf16);
}

template <typename T>
void backward(const Tensor& dy, const Tensor& z, const float* bias, Tensor& dz, void (*kernel)(const BiasGeluBackwardRows<T>&)) {
  const T* dy_data = static_cast<const T*>(dy.const_data_ptr());
  const T* z_data = static_cast<const T*>(z.const_data_ptr());
  T* dz_data = static_cast<T*>(dz.mutable_data_ptr());
  torch::stable::parallel_for(0, z.size(0), rows_per_task(z.size(1)), [&](int64_t begin, int64_t end) {
    kernel({dy_data, z_data, bias, dz_data, begin, end, z.size(1)});
  });
}

}  // namespace

Tensor bias_gelu(const Tensor& z, const std::optional<Tensor>& bias) {
  const float* bias_data = check_inputs(z, bias);
  Tensor y = torch::stable::new_empty(z, {z.size(0), z.size(1)});
  forward(z, bias_data, y.mutable_data_ptr());
  return y;
}

void bias_gelu_(Tensor z, const std::optional<Tensor>& bias) {
  const float* bias_data = check_inputs(z, bias);
  forward(z, bias_data, z.mutable_data_ptr());
}

Tensor bias_gelu_backward(const Tensor& dy_in, const Tensor& z, const std::optional<Tensor>& bias) {
  const float* bias_data = check_inputs(z, bias);
  check_shape(dy_in, {z.size(0), z.size(1)}, "dy");
  check_dtype(dy_in, z.scalar_type(), "dy");
  const Tensor dy = dy_in.is_contiguous() ? dy_in : torch::stable::contiguous(dy_in);
  Tensor dz = torch::stable::new_empty(z, {z.size(0), z.size(1)});
  if (z.scalar_type() == ScalarType::Float)
    backward<float>(dy, z, bias_data, dz, kernels().backward_float);
  else
    backward<bf16>(dy, z, bias_data, dz, kernels().backward_bf16);
  return dz;
}

}  // namespace javis::cpu
