// The inner loops of bidirectional_attention, compiled once per instruction set (see setup.py) and chosen at run time.
// Includes nothing but freestanding headers, for the reason that ada_layer_norm_rows.h gives.

#pragma once

#include <cstdint>

#include "ada_layer_norm_rows.h"  // bf16

namespace javis::cpu {

// One head and some of its video rows against all audio columns; everything dense. Logarithms have base 2.
template <typename T>
struct TwoSoftmaxes {
  const float* scores;  // [rows, columns]
  T* rows_part;         // [rows, columns] out: softmax over each row
  T* columns_part;      // [rows, columns] out: exp2(score * scale - column_max), not normalised
  float* row_lse;     // [rows] out
  float* column_max;  // [columns]: of the rows so far, these included afterwards; starts at -inf
  float* column_sum;  // [columns]: likewise, of exp2(score * scale - column_max); starts at 0
  float* keep;        // [columns] out: what earlier sums over these columns must be multiplied by
  float* scratch;     // [3 * columns]
  int64_t rows, columns;
  float scale;  // with log2(e) in it
};

// In place: d_row and d_column hold the gradients of both softmaxes and become the softmaxes.
template <typename T>
struct ScoreGradient {
  const float* scores;        // [rows, columns]
  T* d_scores;                // [rows, columns] out: gradient of the scores
  T* d_row;                   // [rows, columns]
  T* d_column;                // [rows, columns]
  const float* row_lse;       // [rows]
  const float* row_delta;     // [rows]
  const float* column_lse;    // [columns]
  const float* column_delta;  // [columns]
  int64_t rows, columns;
  float scale;     // with log2(e) in it
  float gradient;  // the scores' scale without it, which the gradient is multiplied by
};

struct BidirectionalKernels {
  void (*softmaxes_float)(const TwoSoftmaxes<float>&);
  void (*softmaxes_bf16)(const TwoSoftmaxes<bf16>&);
  void (*gradient_float)(const ScoreGradient<float>&);
  void (*gradient_bf16)(const ScoreGradient<bf16>&);
};

extern const BidirectionalKernels bidirectional_attention_rows_baseline;
#if defined(__x86_64__)
extern const BidirectionalKernels bidirectional_attention_rows_avx2;
extern const BidirectionalKernels bidirectional_attention_rows_avx512;
#endif

}  // namespace javis::cpu
