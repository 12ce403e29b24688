// Every native op of javis, on one screen: its schema, and what implements it on which device.
//
// Everything here is PyTorch's stable ABI (torch/csrc/stable): one library serves every torch >= 2.11 and every Python.
// Python registers the shape functions (fakes) in javis/kernels/ops/<op>/contract.py.

#include <torch/csrc/stable/library.h>

#include "cpu/ada_layer_norm.h"
#include "cpu/bidirectional_attention.h"
#include "cpu/dense_attention.h"
#include "cpu/gated_residual_ada_layer_norm.h"
#include "cpu/temporal_attention.h"
#include "cpu/bias_gelu.h"
#include "cpu/group_softmax.h"
#include "cpu/qk_norm_rope.h"

STABLE_TORCH_LIBRARY(javis_native, m) {
  m.def(
      "ada_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor? shift0, Tensor? scale0, Tensor? frame_mask, float eps)"
      " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "ada_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor? scale0,"
      " Tensor? frame_mask) -> (Tensor dx, Tensor dmodulation)");
  m.def(
      "gated_residual_ada_layer_norm(Tensor x, Tensor h, Tensor? gate, Tensor shift, Tensor scale, Tensor? gate0,"
      " Tensor? shift0, Tensor? scale0, Tensor? frame_mask, float eps) -> (Tensor r, Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_ada_layer_norm_backward(Tensor dr, Tensor dy, Tensor r, Tensor? h, Tensor mean, Tensor rstd,"
      " Tensor? gate, Tensor scale, Tensor? gate0, Tensor? scale0, Tensor? frame_mask)"
      " -> (Tensor dx, Tensor dh, Tensor dmodulation)");
  m.def(
      "bidirectional_softmaxes(Tensor scores, Tensor(a!) rows_part, Tensor(b!) columns_part, Tensor(c!) row_lse,"
      " Tensor(d!) column_max, Tensor(e!) column_sum, Tensor(f!) keep, float scale) -> ()");
  m.def(
      "bidirectional_score_gradient(Tensor scores, Tensor(a!) d_scores, Tensor(b!) d_row, Tensor(c!) d_column, Tensor row_lse,"
      " Tensor row_delta, Tensor column_lse, Tensor column_delta, float scale) -> ()");
  m.def("temporal_attention(Tensor qkv, Tensor? weights, Tensor? cos, Tensor? sin, float eps) -> Tensor");
  m.def(
      "temporal_attention_backward(Tensor dout, Tensor qkv, Tensor? weights, Tensor? cos, Tensor? sin, float eps)"
      " -> (Tensor dqkv, Tensor dweights)");
  m.def("dense_attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor");
  m.def("group_softmax_(Tensor(a!) scores, Tensor bias, int groups) -> ()");
  m.def("bias_gelu(Tensor z, Tensor? bias) -> Tensor");
  m.def("bias_gelu_(Tensor(a!) z, Tensor? bias) -> ()");
  m.def("bias_gelu_backward(Tensor dy, Tensor z, Tensor? bias) -> Tensor");
  m.def("qk_norm_rope(Tensor q, Tensor k, Tensor? weights, Tensor? cos, Tensor? sin, float eps) -> (Tensor q, Tensor k)");
  m.def(
      "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor? weights, Tensor? cos, Tensor? sin, float eps)"
      " -> (Tensor dq, Tensor dk, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(javis_native, CPU, m) {
  m.impl("ada_layer_norm", TORCH_BOX(&javis::cpu::ada_layer_norm));
  m.impl("ada_layer_norm_backward", TORCH_BOX(&javis::cpu::ada_layer_norm_backward));
  m.impl("gated_residual_ada_layer_norm", TORCH_BOX(&javis::cpu::gated_residual_ada_layer_norm));
  m.impl("gated_residual_ada_layer_norm_backward", TORCH_BOX(&javis::cpu::gated_residual_ada_layer_norm_backward));
  m.impl("bidirectional_softmaxes", TORCH_BOX(&javis::cpu::bidirectional_softmaxes));
  m.impl("bidirectional_score_gradient", TORCH_BOX(&javis::cpu::bidirectional_score_gradient));
  m.impl("temporal_attention", TORCH_BOX(&javis::cpu::temporal_attention));
  m.impl("temporal_attention_backward", TORCH_BOX(&javis::cpu::temporal_attention_backward));
  m.impl("dense_attention", TORCH_BOX(&javis::cpu::dense_attention));
  m.impl("group_softmax_", TORCH_BOX(&javis::cpu::group_softmax_));
  m.impl("bias_gelu", TORCH_BOX(&javis::cpu::bias_gelu));
  m.impl("bias_gelu_", TORCH_BOX(&javis::cpu::bias_gelu_));
  m.impl("bias_gelu_backward", TORCH_BOX(&javis::cpu::bias_gelu_backward));
  m.impl("qk_norm_rope", TORCH_BOX(&javis::cpu::qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&javis::cpu::qk_norm_rope_backward));
}
