// Tensors as the kernels read them: shared by the bindings (*_op.cpp).

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace javis::cuda {

using torch::stable::Tensor;

inline const void* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// The tensor if 16-byte accesses can read its rows (dense inside, every row at a multiple of 16 bytes), else a copy: rows
// and samples may lie anywhere, as in a slice of a wider tensor.
inline Tensor with_aligned_rows(const Tensor& tensor) {
  const int64_t axes = tensor.dim(), bytes = tensor.element_size();
  bool aligned = tensor.stride(axes - 1) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t axis = 0; axis + 1 < axes; ++axis)
    aligned = aligned && (tensor.size(axis) <= 1 || tensor.stride(axis) * bytes % 16 == 0);
  if (aligned || tensor.numel() == 0) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  return torch::stable::copy_(copy, tensor);
}

}  // namespace javis::cuda
