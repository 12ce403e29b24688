// bidirectional_attention on CPU: what happens between its matrix products.

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace javis::cpu {

using torch::stable::Tensor;

void bidirectional_softmaxes(
    const Tensor& scores,
    Tensor rows_part,
    Tensor columns_part,
    Tensor row_lse,
    Tensor column_max,
    Tensor column_sum,
    Tensor keep,
    double scale);

void bidirectional_score_gradient(
    const Tensor& scores,
    Tensor d_scores,
    Tensor d_row,
    Tensor d_column,
    const Tensor& row_lse,
    const Tensor& row_delta,
    const Tensor& column_lse,
    const Tensor& column_delta,
    double scale);

}  // namespace javis::cpu
