// bidirectional_attention on CPU, between its matrix products: checks and threads. The arithmetic is in
// bidirectional_attention_rows.cpp, the products and the loop over chunks of video in
// javis/kernels/ops/bidirectional_attention/native_impl.py.
//
// scores: float32 [H, R, N], R video tokens against N audio tokens; probabilities and gradients: float32 or bfloat16
// [H, R, N]; statistics of rows: float32 [H, R], of columns: [H, N]. Heads are independent, so they are what threads share, and the result does not depend on threads.

#include "bidirectional_attention.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks.h"
#include "bidirectional_attention_rows.h"
#include "row_isa.h"

namespace javis::cpu {
namespace {

const BidirectionalKernels& row_kernels() {
#if defined(__x86_64__)
  static const BidirectionalKernels& chosen = choose_isa(
      bidirectional_attention_rows_baseline, bidirectional_attention_rows_avx2, bidirectional_attention_rows_avx512);
#else
  static const BidirectionalKernels& chosen = choose_isa(bidirectional_attention_rows_baseline);
#endif
  return chosen;
}

constexpr double kLog2E = 1.4426950408889634;

struct Sizes {
  int64_t heads, rows, columns;
};

Sizes check_scores(const Tensor& scores) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores has ", scores.dim(), " dimensions, expected 3: [H, R, N]");
  check_dtype(scores, ScalarType::Float, "scores");
  return {scores.size(0), scores.size(1), scores.size(2)};
}

// Heads may have any stride (a chunk of a larger buffer); below that everything is dense.
void check_matrix(const Tensor& tensor, ScalarType dtype, const Sizes& sizes, const char* name) {
  check_shape(tensor, {sizes.heads, sizes.rows, sizes.columns}, name);
  check_dtype(tensor, dtype, name);
  STD_TORCH_CHECK(
      (sizes.columns <= 1 || tensor.stride(2) == 1) && (sizes.rows <= 1 || tensor.stride(1) == sizes.columns),
      name, " must be dense within a head");
}

void check_vector(const Tensor& tensor, int64_t heads, int64_t length, const char* name) {
  check_shape(tensor, {heads, length}, name);
  check_dtype(tensor, ScalarType::Float, name);
  STD_TORCH_CHECK(length <= 1 || tensor.stride(1) == 1, name, " must be dense within a head");
}

template <typename T>
void softmaxes(const Tensor& scores, const Tensor& rows_part, const Tensor& columns_part, const Tensor& row_lse, const Tensor& column_max,
               const Tensor& column_sum, const Tensor& keep, const Sizes& sizes, float scale,
               void (*kernel)(const TwoSoftmaxes<T>&)) {
  torch::stable::parallel_for(0, sizes.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(3 * sizes.columns));
    for (int64_t h = begin; h < end; ++h) {
      const auto vector = [h](const Tensor& tensor) {
        return static_cast<float*>(tensor.mutable_data_ptr()) + h * tensor.stride(0);
      };
      const auto matrix = [h](const Tensor& tensor) {
        return static_cast<T*>(tensor.mutable_data_ptr()) + h * tensor.stride(0);
      };
      kernel({vector(scores), matrix(rows_part), matrix(columns_part), vector(row_lse), vector(column_max),
              vector(column_sum), vector(keep), scratch.data(), sizes.rows, sizes.columns, scale});
    }
  });
}

template <typename T>
void score_gradient(const Tensor& scores, const Tensor& d_scores, const Tensor& d_row, const Tensor& d_column, const Tensor& row_lse,
                    const Tensor& row_delta, const Tensor& column_lse, const Tensor& column_delta, const Sizes& sizes,
                    double scale, void (*kernel)(const ScoreGradient<T>&)) {
  torch::stable::parallel_for(0, sizes.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const auto vector = [h](const Tensor& tensor) {
        return static_cast<const float*>(tensor.const_data_ptr()) + h * tensor.stride(0);
      };
      const auto matrix = [h](const Tensor& tensor) {
        return static_cast<T*>(tensor.mutable_data_ptr()) + h * tensor.stride(0);
      };
      kernel({vector(scores), matrix(d_scores), matrix(d_row), matrix(d_column), vector(row_lse), vector(row_delta), vector(column_lse),
              vector(column_delta), sizes.rows, sizes.columns, static_cast<float>(scale * kLog2E),
              static_cast<float>(scale)});
    }
  });
}

ScalarType half_or_float(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16, name,
      " must be float32 or bfloat16");
  return tensor.scalar_type();
}

}  // namespace

void bidirectional_softmaxes(
    const Tensor& scores,
    Tensor rows_part,
    Tensor columns_part,
    Tensor row_lse,
    Tensor column_max,
    Tensor column_sum,
    Tensor keep,
    double scale) {
  const Sizes sizes = check_scores(scores);
  const ScalarType dtype = half_or_float(rows_part, "rows_part");
  check_matrix(scores, ScalarType::Float, sizes, "scores");
  check_matrix(rows_part, dtype, sizes, "rows_part");
  check_matrix(columns_part, dtype, sizes, "columns_part");
  check_vector(row_lse, sizes.heads, sizes.rows, "row_lse");
  check_vector(column_max, sizes.heads, sizes.columns, "column_max");
  check_vector(column_sum, sizes.heads, sizes.columns, "column_sum");
  check_vector(keep, sizes.heads, sizes.columns, "keep");
  const BidirectionalKernels& kernels = row_kernels();
  const float scale2 = static_cast<float>(scale * kLog2E);
  if (dtype == ScalarType::Float)
    softmaxes<float>(scores, rows_part, columns_part, row_lse, column_max, column_sum, keep, sizes, scale2,
                     kernels.softmaxes_float);
  else
    softmaxes<bf16>(scores, rows_part, columns_part, row_lse, column_max, column_sum, keep, sizes, scale2,
                    kernels.softmaxes_bf16);
}

void bidirectional_score_gradient(
    const Tensor& scores,
    Tensor d_scores,
    Tensor d_row,
    Tensor d_column,
    const Tensor& row_lse,
    const Tensor& row_delta,
    const Tensor& column_lse,
    const Tensor& column_delta,
    double scale) {
  const Sizes sizes = check_scores(scores);
  const ScalarType dtype = half_or_float(d_scores, "d_scores");
  check_matrix(scores, ScalarType::Float, sizes, "scores");
  check_matrix(d_scores, dtype, sizes, "d_scores");
  check_matrix(d_row, dtype, sizes, "d_row");
  check_matrix(d_column, dtype, sizes, "d_column");
  check_vector(row_lse, sizes.heads, sizes.rows, "row_lse");
  check_vector(row_delta, sizes.heads, sizes.rows, "row_delta");
  check_vector(column_lse, sizes.heads, sizes.columns, "column_lse");
  check_vector(column_delta, sizes.heads, sizes.columns, "column_delta");
  const BidirectionalKernels& kernels = row_kernels();
  if (dtype == ScalarType::Float)
    score_gradient<float>(scores, d_scores, d_row, d_column, row_lse, row_delta, column_lse, column_delta, sizes, scale,
                          kernels.gradient_float);
  else
    score_gradient<bf16>(scores, d_scores, d_row, d_column, row_lse, row_delta, column_lse, column_delta, sizes, scale,
                         kernels.gradient_bf16);
}

}  // namespace javis::cpu
