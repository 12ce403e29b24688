// Inner loops of temporal attention. JAVIS_ISA names the instruction set this copy is compiled for.
//
// The T x D tiles of one head of one place fit the first-level cache (4.6 kB each at T = 15, D = 72), so each is gathered,
// normalised and rotated once, and everything after that is small matrix products between tiles padded with zeros to
// multiples of 16: no loop has a remainder.
//
// Forward:   S = Q K' / sqrt(D),  P = softmax(S),  O = P V
// Backward:  dV = P' dO,  dP = dO V',  dS = P (dP - rowsum(P dP)) / sqrt(D),  dQ = dS K,  dK = dS' Q, and back through
//            rotation (its inverse) and norm: dx = inverse (g - xhat mean(g xhat)) with g = dn * weight.

#include "temporal_attention_rows.h"

#include "row_values.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {
namespace {

typedef float vec __attribute__((vector_size(64), aligned(4)));  // one register with AVX-512, two with AVX2, four with SSE
typedef int32_t veci __attribute__((vector_size(64), aligned(4)));

// Rows of a product held in registers at once: eight sums hide the latency of a fused multiply-add on two units.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif

// c [rows, columns] = a @ b. a[m, k] = a[m * a_row + k * a_column]; b and c have dense rows; rows and columns are
// multiples of 16. b's row k holds `columns` values.
void product(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row,
             int64_t rows, int64_t columns, int64_t inner) {
  for (int64_t n = 0; n < columns; n += 16) {
    for (int64_t m = 0; m < rows; m += kRows) {
      vec sum[kRows] = {};
      const float* from = a + m * a_row;
      for (int64_t k = 0; k < inner; ++k) {
        const vec right = *reinterpret_cast<const vec*>(b + k * b_row + n);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) sum[i] += from[i * a_row + k * a_column] * right;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) *reinterpret_cast<vec*>(c + (m + i) * c_row + n) = sum[i];
    }
  }
}

// exp of values <= 0, to about one unit in the last place; below -87 it stays at 1e-38. NaN comes through.
inline vec exp_of(vec x) {
  const vec lowest = vec{} - 87.f;
  x = x < lowest ? lowest : x;  // false for NaN
  const vec shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the nearest integer lands in the low bits
  const vec n = shifted - 12582912.f;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vec p = r * (1.f / 5040) + 1.f / 720;  // Taylor: the next term is below 6e-9 for |r| <= ln(2) / 2
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  veci bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  vec power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

void transpose(const float* x, float* y, int64_t rows, int64_t columns) {  // x [rows, columns] -> y [columns, rows]
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) y[c * rows + r] = x[r * columns + c];
}

// Tiles of one head: rows are frames. Rows from `frames` on and columns from `size` on stay zero.
struct Shape {
  int64_t frames, size, t, d;  // t, d: padded
};

template <typename T>
void gather(const T* x, int64_t stride, const Shape& s, float* y) {
  for (int64_t i = 0; i < s.frames; ++i) {
    const T* from = x + i * stride;
    float* to = y + i * s.d;
#pragma omp simd
    for (int64_t c = 0; c < s.size; ++c) to[c] = load(from + c);
  }
}

template <typename T>
void scatter(const float* y, const Shape& s, T* x, int64_t stride) {
  for (int64_t i = 0; i < s.frames; ++i) {
    const float* from = y + i * s.d;
    T* to = x + i * stride;
#pragma omp simd
    for (int64_t c = 0; c < s.size; ++c) store(to + c, from[c]);
  }
}

// Rotate every row by `sign` times its angles.
void rotate(float* y, const Shape& s, const float* cos, const float* sin, float sign) {
  const int64_t half = s.size / 2;
  for (int64_t i = 0; i < s.frames; ++i) {
    float* row = y + i * s.d;
    const float* c = cos + i * half;
    const float* z = sin + i * half;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const float even = row[2 * j], odd = row[2 * j + 1], turn = sign * z[j];
      row[2 * j] = even * c[j] - odd * turn;
      row[2 * j + 1] = odd * c[j] + even * turn;
    }
  }
}

// y: rows as gathered -> normalised, weighted, rotated. For the backward pass xhat and the inverse norms are kept.
template <typename T>
void prepare(const PlaceForward<T>& place, const float* weight, const Shape& s, float* y, float* xhat, float* inverse) {
  if (weight != nullptr) {
    for (int64_t i = 0; i < s.frames; ++i) {
      float* row = y + i * s.d;
      float squares = 0.f;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < s.size; ++c) squares += row[c] * row[c];
      const float scale = 1.f / __builtin_sqrtf(squares / static_cast<float>(s.size) + place.eps);
      if (xhat != nullptr) {
        inverse[i] = scale;
#pragma omp simd
        for (int64_t c = 0; c < s.size; ++c) xhat[i * s.d + c] = row[c] * scale;
      }
#pragma omp simd
      for (int64_t c = 0; c < s.size; ++c) row[c] = row[c] * scale * weight[c];
    }
  }
  if (place.cos != nullptr) rotate(y, s, place.cos, place.sin, 1.f);
}

// Gradient of the prepared rows -> gradient of the rows as gathered, in place; adds to dweight.
template <typename T>
void prepare_backward(const PlaceForward<T>& place, const float* weight, const Shape& s, float* dy, const float* xhat,
                      const float* inverse, float* dweight) {
  if (place.cos != nullptr) rotate(dy, s, place.cos, place.sin, -1.f);
  if (weight == nullptr) return;
  for (int64_t i = 0; i < s.frames; ++i) {
    float* row = dy + i * s.d;
    const float* x = xhat + i * s.d;
    float dot = 0.f;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < s.size; ++c) {
      dweight[c] += row[c] * x[c];
      dot += row[c] * weight[c] * x[c];
    }
    const float mean = dot / static_cast<float>(s.size), scale = inverse[i];
#pragma omp simd
    for (int64_t c = 0; c < s.size; ++c) row[c] = scale * (row[c] * weight[c] - x[c] * mean);
  }
}

// scores [t, t] -> probabilities; columns from `frames` on become zero.
void softmax(float* scores, const Shape& s, float scale) {
  for (int64_t i = 0; i < s.frames; ++i) {
    float* row = scores + i * s.t;
    float top = row[0];
#pragma omp simd reduction(max : top)
    for (int64_t j = 1; j < s.frames; ++j) top = row[j] > top ? row[j] : top;
    for (int64_t j = 0; j < s.t; j += 16) {
      vec* at = reinterpret_cast<vec*>(row + j);
      *at = exp_of((*at - top) * scale);
    }
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < s.frames; ++j) sum += row[j];
    const float inverse = 1.f / sum;
#pragma omp simd
    for (int64_t j = 0; j < s.frames; ++j) row[j] *= inverse;
    for (int64_t j = s.frames; j < s.t; ++j) row[j] = 0.f;
  }
}

void clear(float* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = 0.f;
}

template <typename T>
Shape shape_of(const PlaceForward<T>& place) {
  return {place.frames, place.size, padded(place.frames), padded(place.size)};
}

template <typename T>
void forward(const PlaceForward<T>& place) {
  const Shape s = shape_of(place);
  const int64_t tile = s.t * s.d;
  float* q = place.work;
  float* k = q + tile;
  float* v = k + tile;
  float* other = v + tile;  // k transposed, then the output
  float* p = other + tile;
  clear(place.work, 3 * tile);  // the padding; gathering and preparing leave it alone
  const float* k_weight = place.weights == nullptr ? nullptr : place.weights + s.size;
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(s.size));
  for (int64_t h = 0; h < place.heads; ++h) {
    const T* from = place.qkv + h * place.stride_h;
    gather(from, place.stride_t, s, q);
    gather(from + place.stride_part, place.stride_t, s, k);
    gather(from + 2 * place.stride_part, place.stride_t, s, v);
    prepare(place, place.weights, s, q, nullptr, nullptr);
    prepare(place, k_weight, s, k, nullptr, nullptr);
    transpose(k, other, s.t, s.d);
    product(q, s.d, 1, other, s.t, p, s.t, s.t, s.t, s.size);
    softmax(p, s, scale);
    product(p, s.t, 1, v, s.d, other, s.d, s.t, s.d, s.frames);
    scatter(other, s, place.out + h * s.size, place.out_stride_t);
  }
}

template <typename T>
void backward(const PlaceBackward<T>& all) {
  const PlaceForward<T>& place = all.forward;
  const Shape s = shape_of(place);
  const int64_t tile = s.t * s.d;
  float* q = place.work;
  float* k = q + tile;
  float* v = k + tile;
  float* g = v + tile;
  float* q_hat = g + tile;
  float* k_hat = q_hat + tile;
  float* other = k_hat + tile;  // k transposed, then v transposed
  float* d = other + tile;
  float* p = d + tile;
  float* ds = p + s.t * s.t;
  float* q_inverse = ds + s.t * s.t;
  float* k_inverse = q_inverse + s.t;
  clear(place.work, 8 * tile);
  if (all.dweights != nullptr) clear(all.dweights, 2 * s.size);
  const float* k_weight = place.weights == nullptr ? nullptr : place.weights + s.size;
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(s.size));
  for (int64_t h = 0; h < place.heads; ++h) {
    const T* from = place.qkv + h * place.stride_h;
    T* to = all.dqkv + h * s.size;
    gather(from, place.stride_t, s, q);
    gather(from + place.stride_part, place.stride_t, s, k);
    gather(from + 2 * place.stride_part, place.stride_t, s, v);
    gather(all.dout + h * s.size, all.dout_stride_t, s, g);
    prepare(place, place.weights, s, q, q_hat, q_inverse);
    prepare(place, k_weight, s, k, k_hat, k_inverse);
    transpose(k, other, s.t, s.d);
    product(q, s.d, 1, other, s.t, p, s.t, s.t, s.t, s.size);
    softmax(p, s, scale);
    // Rows of padding: their probabilities are raw scores, which are zero as q is there.
    product(p, 1, s.t, g, s.d, d, s.d, s.t, s.d, s.frames);
    scatter(d, s, to + 2 * all.d_stride_part, all.d_stride_t);
    transpose(v, other, s.t, s.d);
    product(g, s.d, 1, other, s.t, ds, s.t, s.t, s.t, s.size);
    for (int64_t i = 0; i < s.t; ++i) {
      const float* prob = p + i * s.t;
      float* row = ds + i * s.t;
      float mean = 0.f;
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < s.t; ++j) mean += prob[j] * row[j];
#pragma omp simd
      for (int64_t j = 0; j < s.t; ++j) row[j] = prob[j] * (row[j] - mean) * scale;
    }
    product(ds, s.t, 1, k, s.d, d, s.d, s.t, s.d, s.frames);
    prepare_backward(place, place.weights, s, d, q_hat, q_inverse, all.dweights);
    scatter(d, s, to, all.d_stride_t);
    product(ds, 1, s.t, q, s.d, d, s.d, s.t, s.d, s.frames);
    prepare_backward(place, k_weight, s, d, k_hat, k_inverse,
                     all.dweights == nullptr ? nullptr : all.dweights + s.size);
    scatter(d, s, to + all.d_stride_part, all.d_stride_t);
  }
}

}  // namespace

extern const TemporalKernels JAVIS_JOIN(temporal_attention_rows_, JAVIS_ISA) = {
    &forward<float>, &forward<bf16>, &backward<float>, &backward<bf16>};

}  // namespace javis::cpu
