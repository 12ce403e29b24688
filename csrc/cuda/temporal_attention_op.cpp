// Attention over the time axis on CUDA: arguments and memory. The kernel is in temporal_attention.cu.

#include "../checks.h"
#include "aligned.h"
#include "ops.h"
#include "temporal_attention.h"
#include "torch_device.h"

namespace javis::cuda {
namespace {

// A float32 table, dense, at an address that 16-byte accesses can use.
Optional table(const Optional& tensor, std::initializer_list<int64_t> shape, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  check_shape(*tensor, shape, name);
  check_dtype(*tensor, ScalarType::Float, name);
  check_dense(*tensor, name);
  return with_aligned_rows(*tensor);
}

const float* floats(const Optional& tensor) { return static_cast<const float*>(data(tensor)); }

}  // namespace

Tensor temporal_attention(
    const Tensor& qkv_in, const Optional& weights_in, const Optional& cos_in, const Optional& sin_in, double eps) {
  STD_TORCH_CHECK(
      qkv_in.dim() == 6 && qkv_in.size(3) == 3, "qkv must be [B, T, S, 3, H, D], got ", qkv_in.dim(), " dimensions or no 3");
  STD_TORCH_CHECK(
      qkv_in.scalar_type() == ScalarType::BFloat16 || qkv_in.scalar_type() == ScalarType::Half,
      "qkv must be bfloat16 or float16");
  const int64_t frames = qkv_in.size(1), size = qkv_in.size(5);
  STD_TORCH_CHECK(frames <= 128, frames, " frames, at most 128");
  STD_TORCH_CHECK(size >= 8 && size <= 128 && size % 8 == 0, "heads of ", size, " values, not a multiple of 8 up to 128");
  STD_TORCH_CHECK(cos_in.has_value() == sin_in.has_value(), "give both of cos and sin, or none");
  const OnDevice device(qkv_in);
  const Tensor qkv = with_aligned_rows(qkv_in);
  const Optional weights = table(weights_in, {2, size}, "weights");
  const Optional cos = table(cos_in, {frames, size / 2}, "cos"), sin = table(sin_in, {frames, size / 2}, "sin");

  TemporalArguments words{};
  words.batch = qkv.size(0), words.frames = frames, words.places = qkv.size(2), words.heads = qkv.size(4), words.size = size;
  Tensor out = torch::stable::new_empty(qkv, {words.batch, frames * words.places, words.heads * size});
  if (out.numel() == 0) return out;
  words.qkv = qkv.const_data_ptr();
  words.out = out.mutable_data_ptr();
  words.weights = floats(weights), words.cos = floats(cos), words.sin = floats(sin);
  words.stride_b = qkv.stride(0), words.stride_t = qkv.stride(1), words.stride_s = qkv.stride(2);
  words.stride_part = qkv.stride(3), words.stride_h = qkv.stride(4);
  words.is_bf16 = qkv.scalar_type() == ScalarType::BFloat16;
  words.eps = eps;
  check_launch(javis_cuda_temporal_attention(&words, device.stream()), "temporal_attention");
  return out;
}

}  // namespace javis::cuda
