// bias_gelu on CPU: see bias_gelu.cpp.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace javis::cpu {

using torch::stable::Tensor;

Tensor bias_gelu(const Tensor& z, const std::optional<Tensor>& bias);
void bias_gelu_(Tensor z, const std::optional<Tensor>& bias);
Tensor bias_gelu_backward(const Tensor& dy, const Tensor& z, const std::optional<Tensor>& bias);

}  // namespace javis::cpu
