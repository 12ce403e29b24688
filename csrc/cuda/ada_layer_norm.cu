// ada_layer_norm on CUDA: the kernels of norm_forward.cuh and norm_backward.cuh without a residual.

#include "norm_backward.cuh"

JAVIS_ENTRY javis_cuda_ada_layer_norm(const javis::cuda::NormForward* arguments, void* stream) {
  return javis::cuda::launch_norm_forward<false>(*arguments, stream);
}

JAVIS_ENTRY javis_cuda_ada_layer_norm_backward(const javis::cuda::NormBackward* arguments, void* stream) {
  return javis::cuda::launch_norm_backward<false>(*arguments, stream);
}
