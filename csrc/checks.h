// Argument checks shared by the native ops. The Python API checks first and says more; these keep a direct call of
// torch.ops.javis_native.* from reading memory it does not own.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace javis {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> expected, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == static_cast<int64_t>(expected.size()), name, " has ", tensor.dim(), " dimensions, expected ", expected.size());
  int64_t axis = 0;
  for (const int64_t size : expected) {
    STD_TORCH_CHECK(
        tensor.size(axis) == size, name, " has size ", tensor.size(axis), " in dimension ", axis, ", expected ", size);
    ++axis;
  }
}

inline void check_dtype(const Tensor& tensor, ScalarType expected, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " has the wrong dtype for this op");
}

inline void check_dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

}  // namespace javis
