// Arguments of the norms with modulation, checked alike by each of them.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../checks.h"

namespace javis::cpu {

// Rows whose dshift and dscale are summed in float32 before the sums go on in float64. A fixed number, so that the
// result does not depend on how many threads there are.
constexpr int64_t kRowsPerBlock = 128;

// Rows need unit stride inside; between rows and samples any stride will do (a view of a wider tensor needs no copy).
inline Tensor with_dense_rows(const Tensor& tensor) {
  if (tensor.size(2) <= 1 || tensor.stride(2) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline const float* floats(const Tensor& tensor, int64_t offset) {
  return static_cast<const float*>(tensor.const_data_ptr()) + offset;
}

struct Sizes {
  int64_t batch, tokens, width, frames;
};

inline Sizes check_inputs(const Tensor& x, const std::optional<Tensor>& frame_mask) {
  STD_TORCH_CHECK(x.dim() == 3, "x has ", x.dim(), " dimensions, expected 3: [B, N, C]");
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
  Sizes sizes{x.size(0), x.size(1), x.size(2), 1};
  STD_TORCH_CHECK(sizes.width > 0, "x has width 0");
  if (frame_mask.has_value()) {
    STD_TORCH_CHECK(frame_mask->dim() == 2 && frame_mask->size(0) == sizes.batch, "frame_mask must be [B, T]");
    sizes.frames = frame_mask->size(1);
    check_dtype(*frame_mask, ScalarType::Bool, "frame_mask");
    check_dense(*frame_mask, "frame_mask");
    STD_TORCH_CHECK(
        sizes.frames > 0 && sizes.tokens % sizes.frames == 0, "frame_mask has ", sizes.frames, " frames, which does not divide ",
        sizes.tokens, " tokens");
  }
  return sizes;
}

inline void check_modulation(const Tensor& tensor, const Sizes& sizes, const char* name) {
  check_shape(tensor, {sizes.batch, sizes.width}, name);
  check_dtype(tensor, ScalarType::Float, name);
  check_dense(tensor, name);
}

// Second stage of the sums over tokens: partial [batch, blocks, sums, width] -> out [sums, batch, width], the blocks of
// each sample in order, in float64.
inline void sum_blocks(const float* partial, float* out, int64_t batch, int64_t blocks, int64_t sums, int64_t width) {
  const int64_t row_length = sums * width;
  torch::stable::parallel_for(0, batch * row_length, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / row_length, rest = i - b * row_length;
      const float* column = partial + b * blocks * row_length + rest;
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(column[block * row_length]);
      const int64_t k = rest / width, c = rest - k * width;
      out[(k * batch + b) * width + c] = static_cast<float>(sum);
    }
  });
}

}  // namespace javis::cpu
