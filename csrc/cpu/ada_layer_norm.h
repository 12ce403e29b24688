// ada_layer_norm on CPU: the two ops, and the row kernels below them.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace javis::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> ada_layer_norm(
    const Tensor& x,
    const Tensor& shift,
    const Tensor& scale,
    const std::optional<Tensor>& shift0,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask,
    double eps);

std::tuple<Tensor, Tensor> ada_layer_norm_backward(
    const Tensor& dy,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const Tensor& scale,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask);

}  // namespace javis::cpu
