// gated_residual_ada_layer_norm and its float8 form on CUDA: arguments and memory. The kernels are in norm_forward.cuh and
// norm_backward.cuh, the formulas in docs/kernels/gated_residual_ada_layer_norm.md.

#include "norm_op.h"
#include "ops.h"

namespace javis::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_ada_layer_norm(
    const Tensor& x_in, const Tensor& h_in, const Optional& gate, const Tensor& shift, const Tensor& scale,
    const Optional& gate0, const Optional& shift0, const Optional& scale0, const Optional& frame_mask, double eps) {
  const OnDevice device(x_in);
  const Tensor x = with_aligned_rows(x_in);
  ForwardCall call(x, gate, shift, scale, gate0, shift0, scale0, frame_mask, eps);
  const Tensor h = check_tokens(h_in, x, call.sizes, "h");
  Tensor r = new_tokens(x), y = new_tokens(x), mean = new_statistic(x), rstd = new_statistic(x);
  call.residual(h, r);
  call.statistics(y, mean, rstd);
  check_launch(
      javis_cuda_gated_residual_ada_layer_norm(&call.words, device.stream()), "gated_residual_ada_layer_norm");
  return {r, y, mean, rstd};
}

// dh is empty without a gate: it equals dx.
std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_backward(
    const Tensor& dr_in, const Tensor& dy_in, const Tensor& r_in, const Optional& h_in, const Tensor& mean,
    const Tensor& rstd, const Optional& gate, const Tensor& scale, const Optional& gate0, const Optional& scale0,
    const Optional& frame_mask) {
  const OnDevice device(r_in);
  const Tensor r = with_aligned_rows(r_in);
  const NormSizes sizes = check_norm_inputs(r, frame_mask);
  const Tensor dr = check_tokens(dr_in, r, sizes, "dr"), dy = check_tokens(dy_in, r, sizes, "dy");
  STD_TORCH_CHECK(gate.has_value() == h_in.has_value(), "the gradient of the gate needs h");
  const Tensor h = gate.has_value() ? check_tokens(*h_in, r, sizes, "h") : r;  // r: a stand-in that is not read
  BackwardCall call(dy, r, mean, rstd, gate, scale, gate0, scale0, frame_mask);
  call.residual(dr);
  const Tensor dh = gate.has_value() ? new_tokens(r) : torch::stable::new_empty(r, {0});
  if (gate.has_value()) call.gated(h, dh);
  check_launch(
      javis_cuda_gated_residual_ada_layer_norm_backward(&call.words, device.stream()),
      "gated_residual_ada_layer_norm_backward");
  return {call.dx, dh, call.dmodulation};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_ada_layer_norm_fp8(
    const Tensor& x_in, const Tensor& h_in, const Optional& gate, const Tensor& shift, const Tensor& scale,
    const Optional& y_scale, const Optional& gate0, const Optional& shift0, const Optional& scale0,
    const Optional& frame_mask, double eps) {
  const OnDevice device(x_in);
  const Tensor x = with_aligned_rows(x_in);
  ForwardCall call(x, gate, shift, scale, gate0, shift0, scale0, frame_mask, eps);
  const Tensor h = check_tokens(h_in, x, call.sizes, "h");
  Tensor r = new_tokens(x), q = new_float8(x), row_scale = new_row_scale(x, !y_scale.has_value());
  call.residual(h, r);
  call.float8(q, y_scale, row_scale);
  check_launch(
      javis_cuda_gated_residual_ada_layer_norm(&call.words, device.stream()), "gated_residual_ada_layer_norm_fp8");
  return {r, q, row_scale};
}

}  // namespace javis::cuda
