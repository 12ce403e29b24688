// Attention of many queries to many keys on CPU: the op.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace javis::cpu {

using torch::stable::Tensor;

Tensor dense_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask);

}  // namespace javis::cpu
