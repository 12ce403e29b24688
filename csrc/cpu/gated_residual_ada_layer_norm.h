// gated_residual_ada_layer_norm on CPU: the two ops.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace javis::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm(
    const Tensor& x,
    const Tensor& h,
    const std::optional<Tensor>& gate,
    const Tensor& shift,
    const Tensor& scale,
    const std::optional<Tensor>& gate0,
    const std::optional<Tensor>& shift0,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask,
    double eps);

std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward(
    const Tensor& dr,
    const Tensor& dy,
    const Tensor& r,
    const std::optional<Tensor>& h,
    const Tensor& mean,
    const Tensor& rstd,
    const std::optional<Tensor>& gate,
    const Tensor& scale,
    const std::optional<Tensor>& gate0,
    const std::optional<Tensor>& scale0,
    const std::optional<Tensor>& frame_mask);

}  // namespace javis::cpu
