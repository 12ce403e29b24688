// The arguments of bidirectional_attention.cu, for those that call it.

#pragma once

#include <cstdint>

namespace javis::cuda {

// What the launches split the work by; part of the contract, because results depend on it to rounding.
constexpr int kBidirectionalTile = 64;  // video tokens
constexpr int kBidirectionalMinimum = 8, kBidirectionalMaximum = 128;  // head sizes, in steps of 8

// Audio tokens whose sums a block of threads holds at once; beyond that it passes over its video again.
constexpr int bidirectional_audio(int size) { return size <= 72 ? 224 : 128; }
// Parts of the columns of a head that each write their own row statistics.
constexpr int bidirectional_column_groups(int size) { return size <= 72 ? 3 : 2; }

// Every field is one word of 64 bits, which tests fill in through ctypes.
// q, v: [B, N, H * D] in 16-bit values, dense within a token, 16-byte aligned as is every stride.
struct BidirectionalArguments {
  const void *q_video, *q_audio, *v_video, *v_audio;
  void *to_video, *to_audio;                        // dense
  float *lse_video, *lse_audio;                     // dense [B, H, N]: logarithms (base 2) of the softmax' denominators
  float *part_sums, *part_maxima, *part_totals;     // [B * H, splits, Na, D], twice [B * H, splits, Na]
  float *row_sums, *row_statistics;                 // [B * H, Nv, D], [B * H, groups, Nv, 2]: beyond one pass
  int64_t qv_b, qv_n, qa_b, qa_n, vv_b, vv_n, va_b, va_n;  // strides of samples and tokens, in values
  int64_t batch, heads, size, n_video, n_audio;     // size: D
  int64_t tiles_per_split, splits;                  // of the video
  int64_t is_bf16;                                  // else fp16
};

extern "C" const char* javis_cuda_bidirectional_attention(const BidirectionalArguments* arguments, void* stream);

}  // namespace javis::cuda
