// Arguments of the ops on heads of q and k (RMS norm, rotation), checked alike by each of them.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"

namespace javis::cpu {

// The values of a head need unit stride; between heads and tokens any stride will do.
inline Tensor with_dense_values(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline const float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// weights: float32 [2, D] (of q, of k) or none; cos, sin: float32 [L, D / 2] or none.
inline void check_norm_and_rotation(
    const std::optional<Tensor>& weights, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    int64_t length, int64_t size) {
  const auto check = [](const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
    check_shape(tensor, shape, name);
    check_dtype(tensor, ScalarType::Float, name);
    check_dense(tensor, name);
  };
  if (weights.has_value()) check(*weights, {2, size}, "weights");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "give both of cos and sin, or none");
  if (cos.has_value()) {
    STD_TORCH_CHECK(size % 2 == 0, "rotation needs heads of an even size, got ", size);
    check(*cos, {length, size / 2}, "cos");
    check(*sin, {length, size / 2}, "sin");
  }
}

}  // namespace javis::cpu
