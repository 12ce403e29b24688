// ada_layer_norm and ada_layer_norm_fp8 on CUDA: arguments and memory. The kernels are in norm_forward.cuh and
// norm_backward.cuh, the formulas in docs/kernels/ada_layer_norm.md.

#include "norm_op.h"
#include "ops.h"

namespace javis::cuda {

std::tuple<Tensor, Tensor, Tensor> ada_layer_norm(
    const Tensor& x_in, const Tensor& shift, const Tensor& scale, const Optional& shift0, const Optional& scale0,
    const Optional& frame_mask, double eps) {
  const OnDevice device(x_in);
  const Tensor x = with_aligned_rows(x_in);
  ForwardCall call(x, std::nullopt, shift, scale, std::nullopt, shift0, scale0, frame_mask, eps);
  Tensor y = new_tokens(x), mean = new_statistic(x), rstd = new_statistic(x);
  call.statistics(y, mean, rstd);
  check_launch(javis_cuda_ada_layer_norm(&call.words, device.stream()), "ada_layer_norm");
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> ada_layer_norm_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& mean, const Tensor& rstd, const Tensor& scale,
    const Optional& scale0, const Optional& frame_mask) {
  const OnDevice device(x_in);
  const Tensor x = with_aligned_rows(x_in);
  const Tensor dy = check_tokens(dy_in, x, check_norm_inputs(x, frame_mask), "dy");
  BackwardCall call(dy, x, mean, rstd, std::nullopt, scale, std::nullopt, scale0, frame_mask);
  check_launch(javis_cuda_ada_layer_norm_backward(&call.words, device.stream()), "ada_layer_norm_backward");
  return {call.dx, call.dmodulation};
}

std::tuple<Tensor, Tensor> ada_layer_norm_fp8(
    const Tensor& x_in, const Tensor& shift, const Tensor& scale, const Optional& y_scale, const Optional& shift0,
    const Optional& scale0, const Optional& frame_mask, double eps) {
  const OnDevice device(x_in);
  const Tensor x = with_aligned_rows(x_in);
  ForwardCall call(x, std::nullopt, shift, scale, std::nullopt, shift0, scale0, frame_mask, eps);
  Tensor q = new_float8(x), row_scale = new_row_scale(x, !y_scale.has_value());
  call.float8(q, y_scale, row_scale);
  check_launch(javis_cuda_ada_layer_norm(&call.words, device.stream()), "ada_layer_norm_fp8");
  return {q, row_scale};
}

}  // namespace javis::cuda
