// Inner loops of group_softmax_. JAVIS_ISA names the instruction set this copy is compiled for.
//
//   s = scores + bias,   scores = exp(s - max over the group) / sum over the group

#include "group_softmax_rows.h"
#include "row_exp.h"
#include "row_values.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

// KEYS: the size of a group where it is known when this is compiled, which unrolls the loops; else 0.
template <typename T, int KEYS>
void softmax(const GroupSoftmaxRows<T>& rows) {
  const int64_t keys = KEYS > 0 ? KEYS : rows.keys;
  const int64_t width = rows.groups * keys;
  float values[KEYS > 0 ? KEYS : kMaxGroup];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t group = 0; group < rows.groups; ++group) {
      T* scores = rows.scores + row * width + group * keys;
      const float* bias = rows.bias + group * keys;
      float top = -__builtin_inff();  // NaN never gets here, but into the sum below
#pragma omp simd reduction(max : top)
      for (int64_t m = 0; m < keys; ++m) {
        const float value = load(scores + m) + bias[m];
        values[m] = value;
        top = value > top ? value : top;
      }
      if (top == -__builtin_inff()) top = 0.f;  // all keys removed: all weights 0
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t m = 0; m < keys; ++m) {
        const float value = exp_of(values[m] - top);
        values[m] = value;
        sum += value;
      }
      const float share = sum == 0.f ? 0.f : 1.f / sum;
#pragma omp simd
      for (int64_t m = 0; m < keys; ++m) store(scores + m, values[m] * share);
    }
  }
}

template <typename T>
void run(const GroupSoftmaxRows<T>& rows) {
  switch (rows.keys) {
    case 8: return softmax<T, 8>(rows);
    case 16: return softmax<T, 16>(rows);
    case 32: return softmax<T, 32>(rows);
    case 64: return softmax<T, 64>(rows);
    default: return softmax<T, 0>(rows);
  }
}

}  // namespace

extern const GroupSoftmaxKernels JAVIS_JOIN(group_softmax_rows_, JAVIS_ISA) = {&run<float>, &run<bf16>};

}  // namespace javis::cpu
