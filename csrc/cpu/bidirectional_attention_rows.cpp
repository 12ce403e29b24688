// Inner loops of bidirectional_attention. JAVIS_ISA names the instruction set this copy is compiled for.
//
// Forward:   rows     p = exp2(s - max over the row) / sum          (finished here)
//            columns  p = exp2(s - max over the column so far)      (the caller rescales what came before by keep)
// Backward:  ds = gradient * (p_row * (d_row - delta_row) + p_column * (d_column - delta_column))

#include "bidirectional_attention_rows.h"
#include "row_values.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

// 2^x to one unit in the last place or two: x = n + f with |f| <= 1/2, a polynomial for 2^f, and n added to the exponent.
// Below -126 the result is 0, above 127 infinite; NaN stays NaN. No branch, so that loops over it are vectorised.
inline float exp2_fast(float x) {
  const float inside = x < -126.f ? -126.f : (x > 127.f ? 127.f : x);  // false for NaN, which goes on
  const float shifted = inside + 12582912.f;                           // 1.5 * 2^23: rounds to whole numbers
  const float f = inside - (shifted - 12582912.f);
  // Taylor series of 2^f up to f^7: the next term is at most 2^-8 * ln(2)^8 / 8! = 5e-9.
  float p = 1.5252734e-5f;
  p = p * f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  uint32_t bits, exponent;
  __builtin_memcpy(&exponent, &shifted, sizeof exponent);
  __builtin_memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;  // the low bits of shifted are n
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  value = x < -126.f ? 0.f : value;
  value = x > 127.f ? kInfinity : value;
  return x == x ? value : x;
}

// What to subtract from scores of this maximum: 0 while all are -inf, because -inf - -inf is NaN.
inline float finite(float maximum) { return maximum == -kInfinity ? 0.f : maximum; }

// Rows whose column sums are added up before they join the sums so far: errors grow with the length of a sum.
constexpr int64_t kRowsPerSum = 32;

template <typename T>
void softmaxes(const TwoSoftmaxes<T>& a) {
  const int64_t columns = a.columns;
  const float scale = a.scale;
  float* const top = a.scratch;  // the new maximum of each column; NaN is skipped here and comes back from exp2
  float* const sums = a.scratch + columns;
  float* const exponentials = a.scratch + 2 * columns;
  float* const column_sum = a.column_sum;
  for (int64_t j = 0; j < columns; ++j) top[j] = a.column_max[j];
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* row = a.scores + i * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const float s = row[j] * scale;
      top[j] = s > top[j] ? s : top[j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    const float keep = exp2_fast(a.column_max[j] - finite(top[j]));
    a.keep[j] = keep;
    column_sum[j] *= keep;
    a.column_max[j] = top[j];
    top[j] = finite(top[j]);
    sums[j] = 0.f;
  }

  for (int64_t i = 0; i < a.rows; ++i) {
    const float* row = a.scores + i * columns;
    T* across_part = a.rows_part + i * columns;
    T* part = a.columns_part + i * columns;
    float most = -kInfinity;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; ++j) {
      const float s = row[j] * scale;
      most = s > most ? s : most;
    }
    const float shift = finite(most);
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) {
      const float s = row[j] * scale;
      const float down = exp2_fast(s - top[j]), across = exp2_fast(s - shift);
      sums[j] += down;
      sum += across;
      store(part + j, down);
      exponentials[j] = across;
    }
    const float inverse = 1.f / sum;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) store(across_part + j, exponentials[j] * inverse);
    a.row_lse[i] = most + __builtin_log2f(sum);
    if ((i + 1) % kRowsPerSum == 0 || i + 1 == a.rows) {
      for (int64_t j = 0; j < columns; ++j) {
        column_sum[j] += sums[j];
        sums[j] = 0.f;
      }
    }
  }
}

template <typename T>
void gradient(const ScoreGradient<T>& a) {
  const int64_t columns = a.columns;
  const float scale = a.scale, factor = a.gradient;
  const float* const column_lse = a.column_lse;
  const float* const column_delta = a.column_delta;
  for (int64_t i = 0; i < a.rows; ++i) {
    const float* score = a.scores + i * columns;
    T* d_score = a.d_scores + i * columns;
    T* d_row = a.d_row + i * columns;
    T* d_column = a.d_column + i * columns;
    const float lse = a.row_lse[i], delta = a.row_delta[i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const float s = score[j] * scale;
      const float p = exp2_fast(s - lse), q = exp2_fast(s - column_lse[j]);
      store(d_score + j, factor * (p * (load(d_row + j) - delta) + q * (load(d_column + j) - column_delta[j])));
      store(d_row + j, p);
      store(d_column + j, q);
    }
  }
}

}  // namespace

extern const BidirectionalKernels JAVIS_JOIN(bidirectional_attention_rows_, JAVIS_ISA) = {
    &softmaxes<float>, &softmaxes<bf16>, &gradient<float>, &gradient<bf16>};

}  // namespace javis::cpu
