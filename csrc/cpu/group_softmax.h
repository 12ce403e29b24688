// group_softmax_ on CPU: see group_softmax.cpp.

#pragma once

#include <torch/csrc/stable/tensor.h>

namespace javis::cpu {

void group_softmax_(torch::stable::Tensor scores, const torch::stable::Tensor& bias, int64_t groups);

}  // namespace javis::cpu
