// Attention over the time axis of packed projections on CPU: the two ops.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace javis::cpu {

using torch::stable::Tensor;

Tensor temporal_attention(
    const Tensor& qkv,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin,
    double eps);

std::tuple<Tensor, Tensor> temporal_attention_backward(
    const Tensor& dout,
    const Tensor& qkv,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin,
    double eps);

}  // namespace javis::cpu
