// Dense attention of one head, for files that are compiled for one instruction set (anonymous namespace: see row_values.h).
//
// Everything is transposed: a row holds one key (or one value of a head) for 64 queries, so that all of the softmax is
// arithmetic between vectors and no row is ever summed across its lanes. For a block of queries and a block of keys
//
//     S' = K Q'        M = max(M, columns of S')        P' = exp(S' - M)        O' = exp(M_before - M) O' + V' P'
//
// and at the end O' is divided by the columns' sums of P' and transposed. Both products are `products` below: 6 rows of
// four vectors in registers, one value of the left side broadcast at a time. They differ between the copies by what a
// `Units` says a 32-bit unit is: one float32, or two bfloat16 that are neighbours along the summed axis.

#pragma once

#include <cstring>

#include "dense_attention_rows.h"
#include "row_values.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace javis::cpu {
namespace {

typedef float vec __attribute__((vector_size(64), aligned(4)));  // one register with AVX-512, two with AVX2, four with SSE
typedef int32_t veci __attribute__((vector_size(64), aligned(4)));

// Rows and vectors of a product held in registers.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 3, kVectors = 2;
#else
constexpr int kRows = 2, kVectors = 1;
#endif
static_assert(kKeyBlock % 6 == 0 && kKeyBlock % 2 == 0 && 6 % kRows == 0 && 4 % kVectors == 0);

inline vec& at(float* p) { return *reinterpret_cast<vec*>(p); }
inline const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec larger(vec a, vec b) { return a > b ? a : b; }  // b where a is NaN

// 2^x for x <= 0 to about one unit in the last place; 0 below -126; NaN stays NaN.
inline vec exp2_of(vec x) {
  const veci low = x < -126.f;  // false for NaN
  x = low ? vec{} - 126.f : x;
  const vec shifted = x + 12582912.f;  // 1.5 * 2^23: the nearest integer lands in the low bits
  const vec f = x - (shifted - 12582912.f);
  vec p = f * 1.54035304e-4f + 1.33335581e-3f;  // ln(2)^i / i!: the next term is below 1.2e-7 for |f| <= 1/2
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.f;
  veci bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  vec power;
  std::memcpy(&power, &bits, sizeof power);
  return low ? vec{} : p * power;
}

// A unit is one float32 value.
struct Floats {
  static constexpr int kValues = 1;
  static void step(vec& sum, const float* left, vec right) { sum += *left * right; }
  template <typename T>
  static void row(const T* x, int64_t size, float* units) {
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) units[c] = load(x + c);
  }
  template <typename T>
  static void values(const T* x, const T*, int64_t size, float* units) {
    row(x, size, units);
  }
  static void put(float* units, vec first, vec) { at(units) = first; }
};

// c [rows, 16 N] from a [rows, inner] and b [inner, 16 N], rows of b and c kQueryBlock apart. Scores: c = a b, and `column`
// grows to the largest of each column. Otherwise: c = column c + a b.
template <class Units, bool scores, int N>
inline void tiles(const float* a, int64_t a_row, int64_t a_column, const float* b, float* c, float* column, int64_t rows,
                  int64_t inner) {
  for (int64_t m = 0; m < rows; m += kRows, a += kRows * a_row, c += kRows * kQueryBlock) {
    vec sum[kRows][N];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[i][n] = scores ? vec{} : at(c + i * kQueryBlock + 16 * n) * at(column + 16 * n);
    for (int64_t k = 0; k < inner; ++k) {
      const float* left = a + k * a_column;
      vec right[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) right[n] = at(b + k * kQueryBlock + 16 * n);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) Units::step(sum[i][n], left + i * a_row, right[n]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      vec most = at(column + 16 * n);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        at(c + i * kQueryBlock + 16 * n) = sum[i][n];
        most = larger(sum[i][n], most);
      }
      if (scores) at(column + 16 * n) = most;
    }
  }
}

template <class Units, bool scores>
void products(const float* a, int64_t a_row, int64_t a_column, const float* b, float* c, float* column, int64_t rows,
              int64_t inner, int64_t vectors) {
  for (int64_t n = 0; n < vectors; n += kVectors, b += 16 * kVectors, c += 16 * kVectors, column += 16 * kVectors) {
    const int64_t left = vectors - n;
    if (left >= kVectors)
      tiles<Units, scores, kVectors>(a, a_row, a_column, b, c, column, rows, inner);
    else if (left == 3)
      tiles<Units, scores, kVectors < 3 ? kVectors : 3>(a, a_row, a_column, b, c, column, rows, inner);
    else if (left == 2)
      tiles<Units, scores, kVectors < 2 ? kVectors : 2>(a, a_row, a_column, b, c, column, rows, inner);
    else
      tiles<Units, scores, 1>(a, a_row, a_column, b, c, column, rows, inner);
  }
}

void transpose(const float* x, int64_t x_stride, float* y, int64_t y_stride, int64_t rows) {
  // y[i, j] = x[j, i] for 16 j and the first rows i, 16 at most
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(x + i * x_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto pairs = [](__m512 a, __m512 b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 4; ++j) r[i + j] = pairs(t[i + j / 2], t[i + j / 2 + 2], j % 2);
  for (int i = 0; i < 4; ++i) {  // r[4 g + i]: in its quarter L, rows 4 g to 4 g + 3 of column 4 L + i
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x44), b = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x44), d = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xee);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i)
    if (i < rows) _mm512_storeu_ps(y + i * y_stride, t[i]);
#else
  for (int64_t i = 0; i < (rows < 16 ? rows : 16); ++i)
    for (int64_t j = 0; j < 16; ++j) std::memcpy(y + i * y_stride + j, x + j * x_stride + i, sizeof *y);
#endif
}

template <class Units>
struct Layout {
  int64_t units, columns, values;  // of a key; of a pair of values (or one); where the values begin
  Layout(int64_t keys, int64_t size)
      : units((size + Units::kValues - 1) / Units::kValues), columns(round_up(size, 6)), values(round_up(keys, 6) * units) {}
};

template <class Units, typename T>
int64_t pack(const DenseHead<T>& head) {
  const Layout<Units> layout(head.keys, head.size);
  float* keys = head.packed;
  float* values = head.packed + layout.values;
  int64_t count = 0;
  const T* waiting = nullptr;  // for its partner
  for (int64_t j = 0; j < head.keys; ++j) {
    if (head.mask != nullptr && !head.mask[j]) continue;
    Units::row(head.k + j * head.k_stride, head.size, keys + count++ * layout.units);
    const T* value = head.v + j * head.v_stride;
    if (Units::kValues == 1 || waiting != nullptr) {
      float* to = values + (count - 1) / Units::kValues * layout.columns;
      Units::values(waiting == nullptr ? value : waiting, value, head.size, to);
      for (int64_t c = head.size; c < layout.columns; ++c) to[c] = 0.f;
      waiting = nullptr;
    } else {
      waiting = value;
    }
  }
  if (waiting != nullptr) {
    float* to = values + count / Units::kValues * layout.columns;
    Units::values(waiting, static_cast<const T*>(nullptr), head.size, to);
    for (int64_t c = head.size; c < layout.columns; ++c) to[c] = 0.f;
  }
  // Copies of the last key fill its group of rows: their scores change no maximum.
  for (int64_t j = count; count > 0 && j < round_up(count, 6); ++j)
    std::memcpy(keys + j * layout.units, keys + (count - 1) * layout.units, layout.units * sizeof(float));
  return count;
}

// Scores [keys, 64] -> probabilities in units, in place, relative to the largest score so far.
template <class Units>
void probabilities(float* s, int64_t keys, int64_t vectors, float scale, const float* most, float* reference, float* sum,
                   float* correction) {
  for (int64_t n = 0; n < 16 * vectors; n += 16) {
    const vec now = at(most + n);
    const vec base = now == -__builtin_inff() ? vec{} : now;  // -inf - -inf would be NaN
    at(correction + n) = exp2_of((at(reference + n) - base) * scale);
    at(reference + n) = now;
    vec total = {};
    for (int64_t j = 0; j < keys; j += Units::kValues) {
      float* from = s + j * kQueryBlock + n;
      const vec first = exp2_of((at(from) - base) * scale);
      vec second = {};
      if (Units::kValues == 2 && j + 1 < keys) second = exp2_of((at(from + kQueryBlock) - base) * scale);
      total += first;
      total += second;
      Units::put(s + j / Units::kValues * kQueryBlock + n, first, second);
    }
    at(sum + n) = at(sum + n) * at(correction + n) + total;
  }
}

template <class Units, typename T>
void attend(const DenseHead<T>& head, int64_t keys, int64_t first, int64_t last) {
  const Layout<Units> layout(head.keys, head.size);
  const int64_t wide = round_up(head.size, 48);
  float* q = head.work;                       // [units, 64]
  float* o = q + wide * kQueryBlock;          // [columns, 64]
  float* s = o + wide * kQueryBlock;          // [keys of a block, 64]
  float* most = s + kKeyBlock * kQueryBlock;  // [64] each: largest score with this block, before it, sum, correction
  float *reference = most + kQueryBlock, *sum = reference + kQueryBlock, *correction = sum + kQueryBlock;
  float* gathered = correction + kQueryBlock;  // [16, wide]
  const float scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(head.size));  // for powers of two
  const int64_t blocks = (keys + kKeyBlock - 1) / kKeyBlock;
  const int64_t block = blocks > 0 ? round_up((keys + blocks - 1) / blocks, 6) : 6;

  for (int64_t begin = first; begin < last; begin += kQueryBlock) {
    const int64_t count = last - begin < kQueryBlock ? last - begin : kQueryBlock, vectors = (count + 15) / 16;
    for (int64_t n = 0; n < 16 * vectors; n += 16) {
      for (int64_t i = 0; i < 16; ++i) {  // queries beyond the last are copies of it
        const int64_t query = begin + (n + i < count ? n + i : count - 1);
        Units::row(head.q + query * head.q_stride, head.size, gathered + i * wide);
      }
      for (int64_t u = 0; u < layout.units; u += 16)
        transpose(gathered + u, wide, q + u * kQueryBlock + n, kQueryBlock, layout.units - u);
      at(most + n) = vec{} - __builtin_inff();
      at(reference + n) = vec{} - __builtin_inff();
      at(sum + n) = vec{};
    }
    std::memset(o, 0, layout.columns * kQueryBlock * sizeof(float));
    for (int64_t j = 0; j < keys; j += block) {
      const int64_t seen = keys - j < block ? keys - j : block;
      products<Units, true>(head.packed + j * layout.units, layout.units, 1, q, s, most, round_up(seen, 6), layout.units,
                            vectors);
      probabilities<Units>(s, seen, vectors, scale, most, reference, sum, correction);
      products<Units, false>(head.packed + layout.values + j / Units::kValues * layout.columns, 1, layout.columns, s, o,
                             correction, layout.columns, (seen + Units::kValues - 1) / Units::kValues, vectors);
    }
    for (int64_t n = 0; n < count; n += 16) {
      const vec inverse = keys > 0 ? 1.f / at(sum + n) : vec{};
      for (int64_t d = 0; d < head.size; ++d) at(o + d * kQueryBlock + n) *= inverse;
      for (int64_t d = 0; d < head.size; d += 16) transpose(o + d * kQueryBlock + n, kQueryBlock, gathered + d, wide, 16);
      for (int64_t i = 0; i < 16 && n + i < count; ++i) {
        const float* from = gathered + i * wide;
        T* to = head.out + (begin + n + i) * head.out_stride;
#pragma omp simd
        for (int64_t d = 0; d < head.size; ++d) store(to + d, from[d]);
      }
    }
  }
}

}  // namespace
}  // namespace javis::cpu
