// RMS norm of the heads of q and k and rotation on CPU: checks, memory, threads. The arithmetic is in qk_norm_rope_rows.cpp.
//
// q, k: float32 or bfloat16 [N1, N2, L, H, D] of any strides, the results dense [N1 * N2, L, H, D]: the layout that attention
// libraries take as it is. weights: float32 [2, D] (of q, of k) or none; cos, sin: float32 [L, D / 2] or none.

#include "qk_norm_rope.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "head_arguments.h"
#include "qk_norm_rope_rows.h"
#include "row_isa.h"

namespace javis::cpu {
namespace {

// Tokens of a task: a fixed number, so that results do not depend on how many threads there are.
constexpr int64_t kTokens = 64;
// Heads whose gradients of the weights are summed in float32 before the sums go on in float64.
constexpr int64_t kHeads = 64;

const QkNormRopeKernels& kernels() {
#if defined(__x86_64__)
  static const QkNormRopeKernels& chosen =
      choose_isa(qk_norm_rope_rows_baseline, qk_norm_rope_rows_avx2, qk_norm_rope_rows_avx512);
#else
  static const QkNormRopeKernels& chosen = choose_isa(qk_norm_rope_rows_baseline);
#endif
  return chosen;
}

struct Sizes {
  int64_t outer, inner, length, heads, size;
  int64_t tokens() const { return outer * inner * length; }
};

struct Tables {
  const float *weights, *cos, *sin;  // null: none
};

Sizes check_inputs(
    const Tensor& q, const Tensor& k, const std::optional<Tensor>& weights, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin) {
  STD_TORCH_CHECK(q.dim() == 5, "q has ", q.dim(), " dimensions, expected 5: [N1, N2, L, H, D]");
  STD_TORCH_CHECK(
      q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16, "q must be float32 or bfloat16");
  const Sizes sizes{q.size(0), q.size(1), q.size(2), q.size(3), q.size(4)};
  STD_TORCH_CHECK(sizes.size > 0 && sizes.size <= kMaxHead, "heads of ", sizes.size, " values, expected 1 to ", kMaxHead);
  check_shape(k, {sizes.outer, sizes.inner, sizes.length, sizes.heads, sizes.size}, "k");
  check_dtype(k, q.scalar_type(), "k");
  check_norm_and_rotation(weights, cos, sin, sizes.length, sizes.size);
  return sizes;
}

Tables tables(const std::optional<Tensor>& weights, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  return {floats(weights), floats(cos), floats(sin)};
}

// What the loops need of token i of x (part 0: q, 1: k), whose result starts at y.
template <typename T>
TokenForward<T> token_of(const Tensor& x, T* y, int64_t part, int64_t i, const Sizes& sizes, const Tables& tables, float eps) {
  const int64_t place = i % sizes.length, row = i / sizes.length, half = sizes.size / 2;
  const int64_t offset = row / sizes.inner * x.stride(0) + row % sizes.inner * x.stride(1) + place * x.stride(2);
  return {static_cast<const T*>(x.const_data_ptr()) + offset, x.stride(3), y + i * sizes.heads * sizes.size,
          tables.weights == nullptr ? nullptr : tables.weights + part * sizes.size,
          tables.cos == nullptr ? nullptr : tables.cos + place * half,
          tables.sin == nullptr ? nullptr : tables.sin + place * half, sizes.heads, sizes.size, eps};
}

template <typename T>
void forward(const Tensor& q, const Tensor& k, Tensor& q_out, Tensor& k_out, const Sizes& sizes, const Tables& tables,
             float eps, void (*kernel)(const TokenForward<T>&)) {
  T* out[2] = {static_cast<T*>(q_out.mutable_data_ptr()), static_cast<T*>(k_out.mutable_data_ptr())};
  const Tensor* in[2] = {&q, &k};
  torch::stable::parallel_for(0, sizes.tokens(), kTokens, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int part = 0; part < 2; ++part) kernel(token_of<T>(*in[part], out[part], part, i, sizes, tables, eps));
  });
}

// partial: [blocks, 2, D], zero before, or empty.
template <typename T>
void backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k, Tensor& dq, Tensor& dk,
              std::vector<double>& partial, const Sizes& sizes, const Tables& tables, float eps,
              void (*kernel)(const TokenBackward<T>&)) {
  T* to[2] = {static_cast<T*>(dq.mutable_data_ptr()), static_cast<T*>(dk.mutable_data_ptr())};
  const T* from[2] = {static_cast<const T*>(dq_out.const_data_ptr()), static_cast<const T*>(dk_out.const_data_ptr())};
  const Tensor* in[2] = {&q, &k};
  const int64_t blocks = (sizes.tokens() + kTokens - 1) / kTokens, width = sizes.heads * sizes.size;
  const int64_t columns = 2 * sizes.size, step = std::max<int64_t>(1, kHeads / std::max<int64_t>(1, sizes.heads));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(columns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(sizes.tokens(), (block + 1) * kTokens);
      for (int64_t first = block * kTokens; first < last; first += step) {
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t i = first; i < std::min(last, first + step); ++i)
          for (int part = 0; part < 2; ++part)
            kernel({token_of<T>(*in[part], to[part], part, i, sizes, tables, eps), from[part] + i * width,
                    sums.data() + part * sizes.size});
        if (!partial.empty())
          for (int64_t c = 0; c < columns; ++c) partial[block * columns + c] += static_cast<double>(sums[c]);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> qk_norm_rope(
    const Tensor& q_in, const Tensor& k_in, const std::optional<Tensor>& weights, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, double eps) {
  const Sizes sizes = check_inputs(q_in, k_in, weights, cos, sin);
  const Tensor q = with_dense_values(q_in), k = with_dense_values(k_in);
  const auto make = [&] {
    return torch::stable::new_empty(q, {sizes.outer * sizes.inner, sizes.length, sizes.heads, sizes.size});
  };
  Tensor q_out = make(), k_out = make();
  const Tables given = tables(weights, cos, sin);
  const float small = static_cast<float>(eps);
  if (q.scalar_type() == ScalarType::Float)
    forward<float>(q, k, q_out, k_out, sizes, given, small, kernels().forward_float);
  else
    forward<bf16>(q, k, q_out, k_out, sizes, given, small, kernels().forward_bf16);
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& dq_in, const Tensor& dk_in, const Tensor& q_in, const Tensor& k_in, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps) {
  const Sizes sizes = check_inputs(q_in, k_in, weights, cos, sin);
  const auto dense = [&](const Tensor& tensor, const char* name) {
    check_shape(tensor, {sizes.outer * sizes.inner, sizes.length, sizes.heads, sizes.size}, name);
    check_dtype(tensor, q_in.scalar_type(), name);
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  const Tensor dq_out = dense(dq_in, "dq"), dk_out = dense(dk_in, "dk");
  const Tensor q = with_dense_values(q_in), k = with_dense_values(k_in);
  const auto make = [&] {
    return torch::stable::new_empty(q, {sizes.outer, sizes.inner, sizes.length, sizes.heads, sizes.size});
  };
  Tensor dq = make(), dk = make();
  Tensor dweights = torch::stable::new_empty(q, {2, sizes.size}, ScalarType::Float);
  const int64_t blocks = weights.has_value() ? (sizes.tokens() + kTokens - 1) / kTokens : 0, columns = 2 * sizes.size;
  std::vector<double> partial(blocks * columns, 0.0);
  const Tables given = tables(weights, cos, sin);
  const float small = static_cast<float>(eps);
  if (q.scalar_type() == ScalarType::Float)
    backward<float>(dq_out, dk_out, q, k, dq, dk, partial, sizes, given, small, kernels().backward_float);
  else
    backward<bf16>(dq_out, dk_out, q, k, dq, dk, partial, sizes, given, small, kernels().backward_bf16);

  // Second stage: the blocks, in order, in float64.
  float* total = static_cast<float*>(dweights.mutable_data_ptr());
  std::vector<double> sum(columns, 0.0);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t c = 0; c < columns; ++c) sum[c] += partial[block * columns + c];
  for (int64_t c = 0; c < columns; ++c) total[c] = static_cast<float>(sum[c]);
  return {dq, dk, dweights};
}

}  // namespace javis::cpu
