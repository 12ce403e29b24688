// Attention of many queries to many keys on CPU: checks, memory, threads. The arithmetic is in dense_attention_tiles.h.
//
// q: float32 or bfloat16 [N, Lq, H, D], k, v: [N, Lk, H, D], the values of a head dense, any other strides; mask: bool
// [N, Lk], false = no key, or none; out: [N, Lq, H, D]. A sample without a key gets zeros. No gradient. Work is shared by
// chunks of queries of a head, so that the result does not depend on the number of threads.

#include "dense_attention.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../checks.h"
#include "dense_attention_rows.h"
#include "row_isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace javis::cpu {
namespace {

const DenseKernels& kernels() {
#if defined(__x86_64__)
  static const DenseKernels& chosen =
      choose_isa(dense_attention_rows_baseline, dense_attention_rows_avx2, dense_attention_rows_avx512);
#else
  static const DenseKernels& chosen = choose_isa(dense_attention_rows_baseline);
#endif
  return chosen;
}

// Whether products of bfloat16 run as such. JAVIS_CPU_ISA, which names the copies without, turns them off.
bool multiplies_bf16() {
#if defined(__x86_64__)
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return std::getenv("JAVIS_CPU_ISA") == nullptr && &kernels() == &dense_attention_rows_avx512 &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 5)) != 0;  // CPUID 7.1 EAX: AVX512_BF16
  }();
  return found;
#else
  return false;
#endif
}

const DenseFunctions<float>& functions(const float*) { return kernels().of_float; }
const DenseFunctions<bf16>& functions(const bf16*) {
#if defined(__x86_64__)
  if (multiplies_bf16()) return dense_attention_avx512bf16;
#endif
  return kernels().of_bf16;
}

Tensor with_dense_values(const Tensor& tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

float* aligned(std::vector<float>& storage) {  // to 64 bytes; storage has 16 floats to spare
  const uintptr_t address = reinterpret_cast<uintptr_t>(storage.data());
  return storage.data() + (64 - address % 64) % 64 / sizeof(float);
}

template <typename T>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const uint8_t* mask, Tensor& out) {
  const int64_t samples = q.size(0), queries = q.size(1), heads = q.size(2), size = q.size(3), keys = k.size(1);
  const int64_t chunks = (queries + kQueryChunk - 1) / kQueryChunk;
  const T* q_data = static_cast<const T*>(q.const_data_ptr());
  const T* k_data = static_cast<const T*>(k.const_data_ptr());
  const T* v_data = static_cast<const T*>(v.const_data_ptr());
  T* out_data = static_cast<T*>(out.mutable_data_ptr());
  const DenseFunctions<T>& inner = functions(static_cast<const T*>(nullptr));
  const int64_t q_n = q.stride(0), q_h = q.stride(2), k_n = k.stride(0), k_h = k.stride(2), v_n = v.stride(0), v_h = v.stride(2);
  const int64_t q_t = q.stride(1), k_t = k.stride(1), v_t = v.stride(1);
  torch::stable::parallel_for(0, samples * heads * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(packed_floats(keys, size) + 16), work(dense_work_floats(size) + 16);
    int64_t packed_head = -1, count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / chunks, first = (i - head * chunks) * kQueryChunk, n = head / heads, h = head - n * heads;
      const DenseHead<T> one{
          q_data + n * q_n + h * q_h, k_data + n * k_n + h * k_h, v_data + n * v_n + h * v_h,
          out_data + (n * queries * heads + h) * size, q_t, k_t, v_t, heads * size,
          mask == nullptr ? nullptr : mask + n * keys, queries, keys, size, aligned(packed), aligned(work)};
      if (head != packed_head) count = inner.pack(one);
      packed_head = head;
      inner.attend(one, count, first, first + kQueryChunk < queries ? first + kQueryChunk : queries);
    }
  });
}

}  // namespace

Tensor dense_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(q_in.dim() == 4, "q must be [N, Lq, H, D], got ", q_in.dim(), " dimensions");
  STD_TORCH_CHECK(k_in.dim() == 4, "k must be [N, Lk, H, D], got ", k_in.dim(), " dimensions");
  const int64_t samples = q_in.size(0), heads = q_in.size(2), size = q_in.size(3), keys = k_in.size(1);
  STD_TORCH_CHECK(heads > 0 && size > 0, "q has no heads or heads of no values");
  STD_TORCH_CHECK(keys > 0, "k has no keys");
  STD_TORCH_CHECK(
      q_in.scalar_type() == ScalarType::Float || q_in.scalar_type() == ScalarType::BFloat16, "q must be float32 or bfloat16");
  check_shape(k_in, {samples, keys, heads, size}, "k");
  check_shape(v_in, {samples, keys, heads, size}, "v");
  check_dtype(k_in, q_in.scalar_type(), "k");
  check_dtype(v_in, q_in.scalar_type(), "v");
  if (mask.has_value()) {
    check_shape(*mask, {samples, keys}, "mask");
    check_dtype(*mask, ScalarType::Bool, "mask");
    check_dense(*mask, "mask");
  }
  const Tensor q = with_dense_values(q_in), k = with_dense_values(k_in), v = with_dense_values(v_in);
  Tensor out = torch::stable::new_empty(q, {samples, q.size(1), heads, size});
  const uint8_t* present = mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  if (q.scalar_type() == ScalarType::Float)
    run<float>(q, k, v, present, out);
  else
    run<bf16>(q, k, v, present, out);
  return out;
}

}  // namespace javis::cpu

// Plain C, read through ctypes by javis/kernels/native.py: whether products of bfloat16 run as such on this machine.
extern "C" __attribute__((visibility("default"))) int javis_cpu_multiplies_bf16() {
  try {
    return javis::cpu::multiplies_bf16() ? 1 : 0;
  } catch (...) {  // no exception may cross into C; a call of the op reports it in words
    return 0;
  }
}
