// Attention over the time axis on CPU: checks, memory, threads. The arithmetic is in temporal_attention_rows.cpp.
//
// qkv: float32 or bfloat16 [B, T, S, 3, H, D], the values of a head dense, any other strides; out: [B, T * S, H * D].
// weights: float32 [2, D] (of q, of k) or none; cos, sin: float32 [T, D / 2] or none. Work is shared by places (b, s), so
// that the result does not depend on the number of threads.

#include "temporal_attention.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "head_arguments.h"
#include "row_isa.h"
#include "temporal_attention_rows.h"

namespace javis::cpu {
namespace {

const TemporalKernels& kernels() {
#if defined(__x86_64__)
  static const TemporalKernels& chosen =
      choose_isa(temporal_attention_rows_baseline, temporal_attention_rows_avx2, temporal_attention_rows_avx512);
#else
  static const TemporalKernels& chosen = choose_isa(temporal_attention_rows_baseline);
#endif
  return chosen;
}

struct Sizes {
  int64_t batch, frames, places, heads, size;
};

Sizes check_inputs(
    const Tensor& qkv, const std::optional<Tensor>& weights, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  STD_TORCH_CHECK(
      qkv.dim() == 6 && qkv.size(3) == 3, "qkv must be [B, T, S, 3, H, D], got ", qkv.dim(), " dimensions or no 3");
  STD_TORCH_CHECK(
      qkv.scalar_type() == ScalarType::Float || qkv.scalar_type() == ScalarType::BFloat16, "qkv must be float32 or bfloat16");
  const Sizes sizes{qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4), qkv.size(5)};
  STD_TORCH_CHECK(sizes.heads > 0 && sizes.size > 0, "qkv has no heads or heads of no values");
  check_norm_and_rotation(weights, cos, sin, sizes.frames, sizes.size);
  return sizes;
}

template <typename T>
PlaceForward<T> first_place(
    const Tensor& qkv, const Sizes& sizes, const std::optional<Tensor>& weights, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, double eps) {
  return {static_cast<const T*>(qkv.const_data_ptr()), qkv.stride(1), qkv.stride(3), qkv.stride(4), nullptr, 0,
          floats(weights), floats(cos), floats(sin), nullptr, sizes.frames, sizes.heads, sizes.size,
          static_cast<float>(eps)};
}

template <typename T>
void forward(const Tensor& qkv, Tensor& out, PlaceForward<T> first, const Sizes& sizes, void (*kernel)(const PlaceForward<T>&)) {
  T* out_data = static_cast<T*>(out.mutable_data_ptr());
  const int64_t width = sizes.heads * sizes.size, stride_b = qkv.stride(0), stride_s = qkv.stride(2);
  first.out_stride_t = sizes.places * width;
  torch::stable::parallel_for(0, sizes.batch * sizes.places, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> work(work_floats(sizes.frames, sizes.size));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / sizes.places, s = i - b * sizes.places;
      PlaceForward<T> place = first;
      place.qkv += b * stride_b + s * stride_s;
      place.out = out_data + (b * sizes.frames * sizes.places + s) * width;
      place.work = work.data();
      kernel(place);
    }
  });
}

template <typename T>
void backward(const Tensor& dout, const Tensor& qkv, Tensor& dqkv, float* partial, const PlaceForward<T>& first, const Sizes& sizes,
              void (*kernel)(const PlaceBackward<T>&)) {
  const T* dout_data = static_cast<const T*>(dout.const_data_ptr());
  T* d_data = static_cast<T*>(dqkv.mutable_data_ptr());
  const int64_t width = sizes.heads * sizes.size, stride_b = qkv.stride(0), stride_s = qkv.stride(2);
  const int64_t dout_b = dout.stride(0), dout_n = dout.stride(1);
  torch::stable::parallel_for(0, sizes.batch * sizes.places, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> work(work_floats(sizes.frames, sizes.size));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / sizes.places, s = i - b * sizes.places;
      PlaceBackward<T> place{first, dout_data + b * dout_b + s * dout_n, sizes.places * dout_n,
                             d_data + (b * sizes.frames * sizes.places + s) * 3 * width, sizes.places * 3 * width, width,
                             partial == nullptr ? nullptr : partial + i * 2 * sizes.size};
      place.forward.qkv += b * stride_b + s * stride_s;
      place.forward.work = work.data();
      kernel(place);
    }
  });
}

}  // namespace

Tensor temporal_attention(
    const Tensor& qkv_in, const std::optional<Tensor>& weights, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, double eps) {
  const Sizes sizes = check_inputs(qkv_in, weights, cos, sin);
  const Tensor qkv = with_dense_values(qkv_in);
  Tensor out = torch::stable::new_empty(qkv, {sizes.batch, sizes.frames * sizes.places, sizes.heads * sizes.size});
  if (qkv.scalar_type() == ScalarType::Float)
    forward<float>(qkv, out, first_place<float>(qkv, sizes, weights, cos, sin, eps), sizes, kernels().forward_float);
  else
    forward<bf16>(qkv, out, first_place<bf16>(qkv, sizes, weights, cos, sin, eps), sizes, kernels().forward_bf16);
  return out;
}

std::tuple<Tensor, Tensor> temporal_attention_backward(
    const Tensor& dout_in, const Tensor& qkv_in, const std::optional<Tensor>& weights, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, double eps) {
  const Sizes sizes = check_inputs(qkv_in, weights, cos, sin);
  check_shape(dout_in, {sizes.batch, sizes.frames * sizes.places, sizes.heads * sizes.size}, "dout");
  check_dtype(dout_in, qkv_in.scalar_type(), "dout");
  const Tensor qkv = with_dense_values(qkv_in), dout = with_dense_values(dout_in);
  Tensor dqkv = torch::stable::new_empty(qkv, {sizes.batch, sizes.frames, sizes.places, 3, sizes.heads, sizes.size});
  Tensor dweights = torch::stable::new_empty(qkv, {2, sizes.size}, ScalarType::Float);
  const int64_t blocks = sizes.frames > 0 ? sizes.batch * sizes.places : 0;
  Tensor partial = torch::stable::new_empty(qkv, {weights.has_value() ? blocks : 0, 2, sizes.size}, ScalarType::Float);
  float* sums = weights.has_value() ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  if (qkv.scalar_type() == ScalarType::Float)
    backward<float>(dout, qkv, dqkv, sums, first_place<float>(qkv, sizes, weights, cos, sin, eps), sizes, kernels().backward_float);
  else
    backward<bf16>(dout, qkv, dqkv, sums, first_place<bf16>(qkv, sizes, weights, cos, sin, eps), sizes, kernels().backward_bf16);

  // Second stage: the places, in order, in float64.
  float* total = static_cast<float*>(dweights.mutable_data_ptr());
  const int64_t columns = 2 * sizes.size, count = weights.has_value() ? blocks : 0;
  std::vector<double> sum(columns, 0.0);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < columns; ++c) sum[c] += static_cast<double>(sums[i * columns + c]);
  for (int64_t c = 0; c < columns; ++c) total[c] = static_cast<float>(sum[c]);
  return {dqkv, dweights};
}

}  // namespace javis::cpu
