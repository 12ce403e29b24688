// The CUDA ops as PyTorch sees them (schemas in registration.cpp). Each checks its arguments, makes its outputs and launches
// the kernels of the .cu file of the same name on the current stream of the tensors' device.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace javis::cuda {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// ada_layer_norm_op.cpp
std::tuple<Tensor, Tensor, Tensor> ada_layer_norm(
    const Tensor& x, const Tensor& shift, const Tensor& scale, const Optional& shift0, const Optional& scale0,
    const Optional& frame_mask, double eps);
std::tuple<Tensor, Tensor> ada_layer_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& scale, const Optional& scale0,
    const Optional& frame_mask);
std::tuple<Tensor, Tensor> ada_layer_norm_fp8(
    const Tensor& x, const Tensor& shift, const Tensor& scale, const Optional& y_scale, const Optional& shift0,
    const Optional& scale0, const Optional& frame_mask, double eps);

// gated_residual_ada_layer_norm_op.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm(
    const Tensor& x, const Tensor& h, const Optional& gate, const Tensor& shift, const Tensor& scale, const Optional& gate0,
    const Optional& shift0, const Optional& scale0, const Optional& frame_mask, double eps);
std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward(
    const Tensor& dr, const Tensor& dy, const Tensor& r, const Optional& h, const Tensor& mean, const Tensor& rstd,
    const Optional& gate, const Tensor& scale, const Optional& gate0, const Optional& scale0, const Optional& frame_mask);
std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_fp8(
    const Tensor& x, const Tensor& h, const Optional& gate, const Tensor& shift, const Tensor& scale, const Optional& y_scale,
    const Optional& gate0, const Optional& shift0, const Optional& scale0, const Optional& frame_mask, double eps);

// temporal_attention_op.cpp: qkv [B, T, S, 3, H, D] -> [B, T * S, H * D]; weights [2, D], cos and sin [T, D / 2] in float32.
Tensor temporal_attention(
    const Tensor& qkv, const Optional& weights, const Optional& cos, const Optional& sin, double eps);

// bidirectional_attention_op.cpp: q, v [B, N, H * D] -> what audio says to video, what video says to audio, and the logarithms
// (base 2) of both softmaxes' denominators, float32 [B, H, N].
std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_attention(
    const Tensor& q_video, const Tensor& q_audio, const Tensor& v_video, const Tensor& v_audio, int64_t num_heads);

}  // namespace javis::cuda
