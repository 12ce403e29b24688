// Every CUDA op of javis, on one screen: its schema and what implements it.
//
// A namespace of its own, javis_cuda: the ops take modulation in any dtype and other layouts than their CPU twins in
// javis_native, and this library also works where that one was not built. PyTorch's stable ABI only, as there.
// Python registers the shape functions (fakes) in javis/kernels/ops/<op>/contract.py.
//
// Compiled with -DJAVIS_EMULATE, the same ops are javis_emulated and take CPU tensors: tests call them, see docs/cuda.md.

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace {

template <typename Library>
void define(Library& m) {
  m.def(
      "ada_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor? shift0, Tensor? scale0, Tensor? frame_mask, float eps)"
      " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "ada_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor scale, Tensor? scale0,"
      " Tensor? frame_mask) -> (Tensor dx, Tensor dmodulation)");
  m.def(
      "ada_layer_norm_fp8(Tensor x, Tensor shift, Tensor scale, Tensor? y_scale, Tensor? shift0, Tensor? scale0,"
      " Tensor? frame_mask, float eps) -> (Tensor q, Tensor row_scale)");
  m.def(
      "gated_residual_ada_layer_norm(Tensor x, Tensor h, Tensor? gate, Tensor shift, Tensor scale, Tensor? gate0,"
      " Tensor? shift0, Tensor? scale0, Tensor? frame_mask, float eps) -> (Tensor r, Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "gated_residual_ada_layer_norm_backward(Tensor dr, Tensor dy, Tensor r, Tensor? h, Tensor mean, Tensor rstd,"
      " Tensor? gate, Tensor scale, Tensor? gate0, Tensor? scale0, Tensor? frame_mask)"
      " -> (Tensor dx, Tensor dh, Tensor dmodulation)");
  m.def(
      "gated_residual_ada_layer_norm_fp8(Tensor x, Tensor h, Tensor? gate, Tensor shift, Tensor scale, Tensor? y_scale,"
      " Tensor? gate0, Tensor? shift0, Tensor? scale0, Tensor? frame_mask, float eps)"
      " -> (Tensor r, Tensor q, Tensor row_scale)");
  m.def("temporal_attention(Tensor qkv, Tensor? weights, Tensor? cos, Tensor? sin, float eps) -> Tensor");
  m.def(
      "bidirectional_attention(Tensor q_video, Tensor q_audio, Tensor v_video, Tensor v_audio, int num_heads)"
      " -> (Tensor to_video, Tensor to_audio, Tensor lse_video, Tensor lse_audio)");
}

template <typename Library>
void implement(Library& m) {
  m.impl("ada_layer_norm", TORCH_BOX(&javis::cuda::ada_layer_norm));
  m.impl("ada_layer_norm_backward", TORCH_BOX(&javis::cuda::ada_layer_norm_backward));
  m.impl("ada_layer_norm_fp8", TORCH_BOX(&javis::cuda::ada_layer_norm_fp8));
  m.impl("gated_residual_ada_layer_norm", TORCH_BOX(&javis::cuda::gated_residual_ada_layer_norm));
  m.impl("gated_residual_ada_layer_norm_backward", TORCH_BOX(&javis::cuda::gated_residual_ada_layer_norm_backward));
  m.impl("gated_residual_ada_layer_norm_fp8", TORCH_BOX(&javis::cuda::gated_residual_ada_layer_norm_fp8));
  m.impl("temporal_attention", TORCH_BOX(&javis::cuda::temporal_attention));
  m.impl("bidirectional_attention", TORCH_BOX(&javis::cuda::bidirectional_attention));
}

}  // namespace

#ifdef JAVIS_EMULATE
STABLE_TORCH_LIBRARY(javis_emulated, m) { define(m); }
STABLE_TORCH_LIBRARY_IMPL(javis_emulated, CPU, m) { implement(m); }
#else
STABLE_TORCH_LIBRARY(javis_cuda, m) { define(m); }
STABLE_TORCH_LIBRARY_IMPL(javis_cuda, CUDA, m) { implement(m); }

// Plain C, read through ctypes by javis/kernels/native.py: the architectures this library has code for, such as 80;90a.
extern "C" __attribute__((visibility("default"))) const char* javis_cuda_architectures() { return JAVIS_CUDA_ARCHS; }
#endif
