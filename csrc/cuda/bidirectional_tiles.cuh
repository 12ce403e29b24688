// The pieces of bidirectional_attention.cu, which says what for: sizes, tiles in shared memory, and what a warp computes.

#pragma once

#include "bidirectional_attention.h"
#include "device.cuh"

namespace javis::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr int kTile = kBidirectionalTile;
constexpr int kPitchP = kTile + 8;  // values of a row of probabilities: 8 rows start in different banks

// Of a head padded to DP columns.
template <int DP>
struct Plan {
  static constexpr int kAudio = bidirectional_audio(DP);
  static constexpr int kWarps = kAudio / 16;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kPitch = DP % 64 == 8 ? DP : DP + 8;  // values of a row in shared memory
  static constexpr int kSteps = DP / 16;             // of 16 columns in S
  static constexpr int kRest = DP % 16 / 8;          // 1: another 8
  static constexpr int kColumns = DP / 8;            // tiles of 8 columns of the results
  static constexpr int kGroups = bidirectional_column_groups(DP);
  static constexpr int kGroup = (kColumns + kGroups - 1) / kGroups;  // tiles of 8 of a job
  static constexpr int kJobs = kTile / 16 * kGroups;
  // Shared memory, in bytes.
  static constexpr int kVideo = kTile * kPitch * 2;  // a tile of q or v
  static constexpr int kAtQueries = 4 * kVideo;      // q, v of two tiles, then q_audio, v_audio
  static constexpr int kAtValues = kAtQueries + kAudio * kPitch * 2;
  static constexpr int kAtP = kAtValues + kAudio * kPitch * 2;
  static constexpr int kAtMaxima = kAtP + kAudio * kPitchP * 2;
  static constexpr int kAtRows = kAtMaxima + kWarps * kTile * 4;
  static constexpr int kShared = kAtRows + kTile * 4;
  static_assert(kAudio % 16 == 0 && kPitch % 8 == 0 && DP % 8 == 0);
};

// What to subtract from scores of this maximum: 0 while all are -inf, because -inf - -inf is NaN.
__device__ __forceinline__ float finite(float maximum) { return maximum == kMinusInfinity ? 0.f : maximum; }

// `rows` tokens from `first` into rows of kPitch values; zeros beyond `count` tokens and `size` values. Not waited for.
template <typename T, int DP>
__device__ __forceinline__ void fetch(T* to, const T* from, int64_t stride, int first, int rows, int count, int size) {
  constexpr int kVectors = DP / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kVectors; i += Plan<DP>::kThreads) {
    const int row = i / kVectors, column = 8 * (i % kVectors);
    const bool there = first + row < count && column < size;
    cp_async_16_or_zero(to + row * Plan<DP>::kPitch + column, there ? from + (first + row) * stride + column : from, there);
  }
}

// v[n][e] of all lanes of a column (they differ in lane / 4) -> the largest: lane 4 n + t keeps those of n, in v[0].
__device__ __forceinline__ void largest_of_columns(float (&v)[8][2]) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & (4 * half)) != 0;  // keeps the upper half of its values, sends the lower
#pragma unroll
    for (int i = 0; i < half; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float kept = upper ? v[i + half][e] : v[i][e], sent = upper ? v[i][e] : v[i + half][e];
        v[i][e] = fmaxf(kept, shuffle_xor(sent, 4 * half));
      }
    }
  }
}

// The softmax over the video, so far, of the 16 audio tokens of a warp. Index 0, 1: rows lane / 4, + 8.
template <int DP>
struct Audio {
  float maximum[2], total[2], sums[Plan<DP>::kColumns][4];  // total: of this lane's video tokens
};

// S' of 16 audio and 64 video tokens: s[n] has video tokens 8 n ... 8 n + 7.
template <typename T, int DP>
__device__ __forceinline__ void scores_of(const T* audio, const T* video, float (&s)[8][4]) {
  using P = Plan<DP>;
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
  const T* from_audio = audio + (lane & 15) * P::kPitch;
  const T* from_video = video + ((lane & 7) + 8 * (lane / 16)) * P::kPitch;  // matrices: two of columns, two of tokens
#pragma unroll
  for (int i = 0; i < P::kSteps; ++i) {
    uint32_t left[4], b[4];
    ldmatrix(left, from_audio + 16 * i + 8 * (lane / 16));
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      ldmatrix(b, from_video + 8 * n * P::kPitch + 16 * i + 8 * (lane / 8 % 2));
      mma_m16n8k16<T>(s[n], left, {b[0], b[1]});
      mma_m16n8k16<T>(s[n + 1], left, {b[2], b[3]});
    }
  }
  if constexpr (P::kRest == 1) {
    uint32_t left[2], b[4];
    ldmatrix(left, from_audio + 16 * P::kSteps);
    const T* from = video + lane * P::kPitch + 16 * P::kSteps;  // four tiles of tokens
#pragma unroll
    for (int n = 0; n < 8; n += 4) {
      ldmatrix(b, from + 8 * n * P::kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_m16n8k8<T>(s[n + i], left, b[i]);
    }
  }
}

// The softmax over the video moves on by a tile.
template <typename T, int DP>
__device__ __forceinline__ void add_video(Audio<DP>& audio, const T* values, const float (&s)[8][4], float scale) {
  using P = Plan<DP>;
  const int lane = lane_id();
  float base[2], keep[2], total[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = audio.maximum[half];
#pragma unroll
    for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = lanes_max<4>(top);
    base[half] = finite(top) * scale;
    keep[half] = fast_exp2(audio.maximum[half] * scale - base[half]);
    audio.maximum[half] = top;
  }
#pragma unroll
  for (int n = 0; n < P::kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) audio.sums[n][i] *= keep[i / 2];
  const T* row = values + (lane & 15) * P::kPitch;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    uint32_t left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * k + i / 2, half = i % 2;
      const float x = fast_exp2(s[n][2 * half] * scale - base[half]), y = fast_exp2(s[n][2 * half + 1] * scale - base[half]);
      total[half] += x + y;
      left[i] = pack2<T>(x, y);
    }
    const T* from = row + 16 * k * P::kPitch;
#pragma unroll
    for (int n = 0; n + 1 < P::kColumns; n += 2) {
      uint32_t b[4];
      ldmatrix_trans(b, from + 8 * n + 8 * (lane / 16));
      mma_m16n8k16<T>(audio.sums[n], left, {b[0], b[1]});
      mma_m16n8k16<T>(audio.sums[n + 1], left, {b[2], b[3]});
    }
    if constexpr (P::kColumns % 2 == 1) {
      uint32_t b[2];
      ldmatrix_trans(b, from + 8 * (P::kColumns - 1));
      mma_m16n8k16<T>(audio.sums[P::kColumns - 1], left, b);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) audio.total[half] = audio.total[half] * keep[half] + total[half];
}

// What is left of a pass over the audio in memory, for the next: rows before their division.
struct Rows {
  float* sums;        // of this head, [Nv, D]
  float* statistics;  // of this head and group of columns, [Nv, 2]: maximum times scale, total
  bool several, first, last;  // passes; without several nothing is left
};

// Products of 16 video tokens from `row` of the tile with one group of columns of v_audio, over `tokens` / 16 warps.
template <typename T, int DP>
__device__ __forceinline__ void finish_video(const T* p, const T* values, int warps, int row, int first_column, int size,
                                             int n_rows, T* out, int64_t width, float* lse, const Rows& rows,
                                             const float* maxima, float scale) {
  using P = Plan<DP>;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  float o[P::kGroup][4] = {}, totals[4] = {};
  const uint32_t one = pack2<T>(1.f, 1.f);
  const T* from_p = p + ((lane & 7) + 8 * (lane / 16)) * kPitchP + row + 8 * (lane / 8 % 2);
  const T* from_v = values + (lane & 15) * P::kPitch + first_column;
#pragma unroll (DP == 72 ? 2 : 1)  // others would spill
  for (int k = 0; k < warps; ++k) {
    uint32_t left[4];
    ldmatrix_trans(left, from_p + 16 * k * kPitchP);
    mma_m16n8k16<T>(totals, left, {one, one});  // in every column the sum of a row of what is multiplied
#pragma unroll
    for (int n = 0; n < P::kGroup; ++n) {
      if (first_column + 8 * n >= DP) break;
      uint32_t b[2];
      ldmatrix_trans(b, from_v + 16 * k * P::kPitch + 8 * n);
      mma_m16n8k16<T>(o[n], left, b);
    }
  }
  float old[2] = {0.f, 0.f}, now[2] = {1.f, 1.f}, top[2], total[2] = {totals[0], totals[2]};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float maximum = maxima[row + g + 8 * half];
    top[half] = maximum == kMinusInfinity ? kMinusInfinity : maximum * scale;
  }
  if (rows.several) {  // the passes before weigh `old`, this one `now`
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = row + g + 8 * half;
      if (token >= n_rows || rows.first) continue;
      const float before = rows.statistics[2 * token], both = fmaxf(before, top[half]);
      old[half] = fast_exp2(before - finite(both));
      now[half] = fast_exp2(top[half] - finite(both));
      total[half] = rows.statistics[2 * token + 1] * old[half] + total[half] * now[half];
      top[half] = both;
    }
    __syncwarp();  // the four lanes of a row have read what one of them writes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = row + g + 8 * half;
      if (token >= n_rows || rows.last || t != 0) continue;
      rows.statistics[2 * token] = top[half];
      rows.statistics[2 * token + 1] = total[half];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = row + g + 8 * half;
    if (token < n_rows && t == 0 && first_column == 0 && (!rows.several || rows.last))
      lse[token] = top[half] + log2f(total[half]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = row + g + 8 * half;  // counted from out and lse
    if (token >= n_rows) continue;
    const float inverse = fast_reciprocal(total[half]);
#pragma unroll
    for (int n = 0; n < P::kGroup; ++n) {
      const int column = first_column + 8 * n + 2 * t;
      if (column >= size) break;
      float x = o[n][2 * half], y = o[n][2 * half + 1];
      if (rows.several) {
        float* const sums = rows.sums + static_cast<int64_t>(token) * size + column;
        if (!rows.first) {
          x = sums[0] * old[half] + x * now[half];
          y = sums[1] * old[half] + y * now[half];
        }
        if (!rows.last) {
          sums[0] = x;
          sums[1] = y;
        }
      }
      if (!rows.several || rows.last) store4(out + token * width + column, pack2<T>(x * inverse, y * inverse));
    }
  }
}

}  // namespace javis::cuda
