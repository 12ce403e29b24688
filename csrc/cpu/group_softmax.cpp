// group_softmax_ on CPU: checks and threads. The arithmetic is in group_softmax_rows.cpp.
//
// scores [B, N, G * M], float32 or bfloat16, dense, is overwritten by the softmax of scores + bias over each of its G
// groups of M neighbours; bias: float32 [B, G * M], -inf removes a key. In place, because a new tensor of this size costs
// more in first touches of its pages than the softmax itself.

#include "group_softmax.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "group_softmax_rows.h"
#include "row_isa.h"

namespace javis::cpu {
namespace {

const GroupSoftmaxKernels& kernels() {
#if defined(__x86_64__)
  static const GroupSoftmaxKernels& chosen =
      choose_isa(group_softmax_rows_baseline, group_softmax_rows_avx2, group_softmax_rows_avx512);
#else
  static const GroupSoftmaxKernels& chosen = choose_isa(group_softmax_rows_baseline);
#endif
  return chosen;
}

template <typename T>
void run(Tensor& scores, const Tensor& bias, int64_t groups, void (*kernel)(const GroupSoftmaxRows<T>&)) {
  const int64_t batch = scores.size(0), tokens = scores.size(1), width = scores.size(2);
  T* data = static_cast<T*>(scores.mutable_data_ptr());
  const float* bias_data = static_cast<const float*>(bias.const_data_ptr());
  torch::stable::parallel_for(0, batch * tokens, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // one sample at a time
      const int64_t b = begin / tokens, row = begin - b * tokens;
      const int64_t stop = std::min(tokens, row + (end - begin));
      kernel({data + b * tokens * width, bias_data + b * width, row, stop, groups, width / groups});
      begin += stop - row;
    }
  });
}

}  // namespace

void group_softmax_(Tensor scores, const Tensor& bias, int64_t groups) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores has ", scores.dim(), " dimensions, expected 3: [B, N, G * M]");
  const int64_t width = scores.size(2);
  STD_TORCH_CHECK(
      groups > 0 && width > 0 && width % groups == 0, "scores has width ", width, ", which is not ", groups, " groups");
  STD_TORCH_CHECK(width / groups <= kMaxGroup, "groups have ", width / groups, " values, at most ", kMaxGroup, " can be");
  check_dense(scores, "scores");
  check_shape(bias, {scores.size(0), width}, "bias");
  check_dtype(bias, ScalarType::Float, "bias");
  check_dense(bias, "bias");
  if (scores.scalar_type() == ScalarType::Float) return run<float>(scores, bias, groups, kernels().run_float);
  check_dtype(scores, ScalarType::BFloat16, "scores");
  run<bf16>(scores, bias, groups, kernels().run_bf16);
}

}  // namespace javis::cpu
