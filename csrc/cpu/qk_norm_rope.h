// RMS norm of the heads of q and k and rotation on CPU: the two ops.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace javis::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> qk_norm_rope(
    const Tensor& q,
    const Tensor& k,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin,
    double eps);

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& dq,
    const Tensor& dk,
    const Tensor& q,
    const Tensor& k,
    const std::optional<Tensor>& weights,
    const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin,
    double eps);

}  // namespace javis::cpu
