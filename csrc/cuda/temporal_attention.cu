// Attention over the frames of a place, with RMS norm and rotation of q and k. Sequences of 1 to 128 frames, heads of a
// multiple of 8 up to 128 values, bf16 or fp16, sums in float32. The formulas: docs/kernels/factorized_attention.md.
//
// A warp owns 16 frames of one head of one place. The products are mma.m16n8k16, whose fragments are filled straight from
// memory, because both products allow their inner and outer columns in any order:
//   - q k': lane t of a row (four lanes share it) reads 8 neighbouring columns, 16 bytes, and calls them the columns 2t,
//     2t + 1, 2t + 8, 2t + 9 of two steps. q and k agree, so their product does not notice. The two values of a rotation
//     and, but for two shuffles, the mean square of a row are within one thread.
//   - p v: lane g of a column reads columns 8g ... 8g + 7 of four frames and calls value e of them column g of tile e. The
//     sums of a thread are then 16 neighbouring columns of the output: two stores of 16 bytes.
// So up to 16 frames need no shared memory and no barrier. Beyond that the warps of a sequence hand each other their
// fragments of k and v, as registers lie, through shared memory.

#include "temporal_attention.h"

#include "device.cuh"

namespace javis::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// Of a head padded to DP columns, and sequences of up to TILES * 16 frames.
template <int DP, int TILES>
struct Shape {
  static constexpr int kBlocks = DP / 32;           // of 32 columns in q k': 16 bytes of each lane
  static constexpr int kRest = DP % 32 / 8;         // 1: another 8 columns, 4 bytes of each lane
  static constexpr int kWords = 4 * kBlocks + kRest;  // of a row in a lane
  static constexpr int kSteps = 2 * kBlocks;        // of 16 columns, without the rest
  static constexpr int kWide = DP / 64;             // blocks of 64 columns in p v
  static constexpr int kNarrow = DP % 64 / 8;       // 1: another 8 columns
  static constexpr int kColumns = 8 * kWide + kNarrow;  // tiles of 8
  static constexpr int kWarps = TILES == 8 ? 8 : 4;
  static constexpr int kGroups = kWarps / TILES;    // sequences of a block
  // In shared memory: 16 bytes of each lane, as many times.
  static constexpr int kKeyVectors = kSteps + kRest;
  static constexpr int kValueVectors = (kColumns + 1) / 2;
  static constexpr bool kTakeTurns = DP > 72;       // values overwrite the keys, so that 48 KiB suffice
  static constexpr int kVectors =
      kTakeTurns ? (kKeyVectors > kValueVectors ? kKeyVectors : kValueVectors) : kKeyVectors + kValueVectors;
  static constexpr int kShared = TILES == 1 ? 0 : kWarps * kVectors * kWarp;
  static_assert(kRest <= 1 && kNarrow <= 1 && kShared * 16 <= 48 * 1024);
};

// The row that starts at `row` as words, zeros if it is not there or beyond `size` columns.
template <typename T, int DP>
__device__ __forceinline__ void load_row(const T* row, bool there, int size, int t,
                                         uint32_t (&words)[Shape<DP, 1>::kWords]) {
  using S = Shape<DP, 1>;
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
    const int column = 32 * block + 8 * t;
    Vec16 v{};
    if (there && column < size) v = load16(row + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * block + i] = v.word[i];
  }
  if constexpr (S::kRest == 1) {
    const int column = 32 * S::kBlocks + 2 * t;
    words[4 * S::kBlocks] = there && column < size ? load4(row + column) : 0u;
  }
}

// Two values and their angle: x * inverse * weight, then (x, y) -> (x cos - y sin, y cos + x sin).
template <typename T>
__device__ __forceinline__ uint32_t turned(uint32_t word, float inverse, uint32_t weight_x, uint32_t weight_y, bool turn,
                                           uint32_t cosine, uint32_t sine) {
  const float2 pair = unpack2<T>(word);
  const float x = pair.x * (inverse * float_of(weight_x)), y = pair.y * (inverse * float_of(weight_y));
  if (!turn) return pack2<T>(x, y);  // not an angle of 0: 0 times infinity is NaN
  const float c = float_of(cosine), s = float_of(sine);
  return pack2<T>(x * c - y * s, y * c + x * s);
}

// A row: x -> x / sqrt(mean(x^2) + eps) * weight, and the rotation by the angles of its frame. Whole warp.
template <typename T, int DP>
__device__ __forceinline__ void norm_rope(const TemporalArguments& a, const float* weight, int size, int frame, int t,
                                          uint32_t (&words)[Shape<DP, 1>::kWords]) {
  using S = Shape<DP, 1>;
  float inverse = 1.f;
  if (weight != nullptr) {
    float squares = 0.f;
#pragma unroll
    for (int w = 0; w < S::kWords; ++w) {
      const float2 x = unpack2<T>(words[w]);
      squares += x.x * x.x + x.y * x.y;
    }
    inverse = reciprocal_root(lanes_sum<4>(squares) / static_cast<float>(size) + static_cast<float>(a.eps));
  }
  const int64_t row = static_cast<int64_t>(frame < a.frames ? frame : a.frames - 1) * (size / 2);  // beyond: any
  const uint32_t one = bits_of(1.f);
  const bool turn = a.cos != nullptr;
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two words: four values, two angles
      const int column = 32 * block + 8 * t + 4 * half;
      if (column >= size) continue;
      Vec16 w{{one, one, one, one}};
      Vec8 c{}, s{};
      if (weight != nullptr) w = load16(weight + column);
      if (turn) {
        c = load8(a.cos + row + column / 2);
        s = load8(a.sin + row + column / 2);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t& word = words[4 * block + 2 * half + j];
        word = turned<T>(word, inverse, w.word[2 * j], w.word[2 * j + 1], turn, c.word[j], s.word[j]);
      }
    }
  }
  if constexpr (S::kRest == 1) {
    const int column = 32 * S::kBlocks + 2 * t;
    Vec8 w{{one, one}};
    uint32_t c = 0u, s = 0u;
    if (weight != nullptr) w = load8(weight + column);
    if (turn) {
      c = load4(a.cos + row + column / 2);
      s = load4(a.sin + row + column / 2);
    }
    uint32_t& word = words[S::kWords - 1];
    word = turned<T>(word, inverse, w.word[0], w.word[1], turn, c, s);
  }
}

// Frames first + {2t, 2t + 1, 2t + 8, 2t + 9} of the values as fragments of p v; columns as the head of this file says.
template <typename T, int DP>
__device__ __forceinline__ void load_values(const T* values, int64_t stride_t, int first, int frames, int size, int g, int t,
                                            uint32_t (&v)[Shape<DP, 1>::kColumns][2]) {
  using S = Shape<DP, 1>;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {  // frames 2t, 2t + 1; frames 2t + 8, 2t + 9
    const int frame = first + 8 * pair + 2 * t;
    const T* row = values + frame * stride_t;
    const bool low = frame < frames, high = frame + 1 < frames;
#pragma unroll
    for (int block = 0; block < S::kWide; ++block) {
      const int column = 64 * block + 8 * g;
      Vec16 x{}, y{};
      if (low && column < size) x = load16(row + column);
      if (high && column < size) y = load16(row + stride_t + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[8 * block + 2 * i][pair] = (x.word[i] & 0xffffu) | (y.word[i] << 16);
        v[8 * block + 2 * i + 1][pair] = (x.word[i] >> 16) | (y.word[i] & 0xffff0000u);
      }
    }
    if constexpr (S::kNarrow == 1) {
      const int column = 64 * S::kWide + g;
      const uint32_t x = low && column < size ? row[column].bits : 0u;
      const uint32_t y = high && column < size ? row[stride_t + column].bits : 0u;
      v[8 * S::kWide][pair] = x | (y << 16);
    }
  }
}

// One row of sums, divided, to memory.
template <typename T, int DP>
__device__ __forceinline__ void store_row(T* row, const float (&o)[Shape<DP, 1>::kColumns][4], int half, float inverse,
                                          int size, int t) {
  using S = Shape<DP, 1>;
#pragma unroll
  for (int block = 0; block < S::kWide; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = o[8 * block + e][2 * half + i] * inverse;
      const int column = 64 * block + 16 * t + 8 * i;
      if (column < size) store16(row + column, Pack<T>::pack(x));
    }
  }
  if constexpr (S::kNarrow == 1) {
    const int column = 64 * S::kWide + 2 * t;
    if (column < size)
      store4(row + column, pack2<T>(o[8 * S::kWide][2 * half] * inverse, o[8 * S::kWide][2 * half + 1] * inverse));
  }
}

template <typename T, int DP, int TILES>
__global__ void __launch_bounds__(Shape<DP, TILES>::kWarps* kWarp)
    temporal_forward(const TemporalArguments a, const float scale) {
  using S = Shape<DP, TILES>;
  const int size = DP == 72 ? 72 : static_cast<int>(a.size);  // 72 is compiled as such
  const int length = static_cast<int>(a.frames);
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const int tiles = TILES == 1 ? 1 : (length + 15) / 16;
  const int group = warp_id() / tiles, tile = warp_id() % tiles;
  const unsigned sequence = blockIdx.x * S::kGroups + group, heads = static_cast<unsigned>(a.heads);  // below 2^31
  const unsigned place = sequence / heads, places = static_cast<unsigned>(a.places);
  const int64_t h = sequence % heads, s = place % places, b = place / places;
  const bool inside = b < a.batch;
  if (TILES == 1 && !inside) return;
  const int frames = inside ? length : 0;  // nothing is read or written where there is no sequence

  const T* q_head = static_cast<const T*>(a.qkv) + b * a.stride_b + s * a.stride_s + h * a.stride_h;
  const int row = 16 * tile + g;  // and row + 8
  uint32_t q[2][S::kWords], k[2][S::kWords], v[S::kColumns][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T* from = q_head + (row + 8 * i) * a.stride_t;
    load_row<T, DP>(from, row + 8 * i < frames, size, t, q[i]);
    load_row<T, DP>(from + a.stride_part, row + 8 * i < frames, size, t, k[i]);
  }
  load_values<T, DP>(q_head + 2 * a.stride_part, a.stride_t, 16 * tile, frames, size, g, t, v);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    norm_rope<T, DP>(a, a.weights, size, row + 8 * i, t, q[i]);
    norm_rope<T, DP>(a, a.weights == nullptr ? nullptr : a.weights + size, size, row + 8 * i, t, k[i]);
  }

  // Fragments of k and v of the whole sequence; vector i of tile j at [(j * kVectors + i) * 32 + lane].
  JAVIS_SHARED(Vec16, exchanged, S::kShared + 1);
  Vec16* const of_group = exchanged + group * tiles * S::kVectors * kWarp + lane;
  Vec16* const mine = of_group + tile * S::kVectors * kWarp;
  constexpr int kFirstValue = S::kTakeTurns ? 0 : S::kKeyVectors;
  const auto share_values = [&] {
#pragma unroll
    for (int i = 0; i < S::kValueVectors; ++i) {
      const bool both = 2 * i + 1 < S::kColumns;
      const int next = both ? 2 * i + 1 : 2 * i;
      store16(mine + (kFirstValue + i) * kWarp, {{v[2 * i][0], v[2 * i][1], v[next][0], v[next][1]}});
    }
  };
  if constexpr (TILES > 1) {
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i)
      store16(mine + i * kWarp, {{k[0][2 * i], k[0][2 * i + 1], k[1][2 * i], k[1][2 * i + 1]}});
    if constexpr (S::kRest == 1)
      store16(mine + S::kSteps * kWarp, {{k[0][S::kWords - 1], k[1][S::kWords - 1], 0u, 0u}});
    if constexpr (!S::kTakeTurns) share_values();
    __syncthreads();
  }

  // Scores of rows `row` and `row + 8` (values 0, 1 and 2, 3) with frames 16 j + 8 n + 2t and the next.
  float scores[TILES][2][4] = {};
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    if (TILES > 1 && j >= tiles) break;
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
      const uint32_t left[4] = {q[0][2 * i], q[1][2 * i], q[0][2 * i + 1], q[1][2 * i + 1]};
      Vec16 keys{{k[0][2 * i], k[0][2 * i + 1], k[1][2 * i], k[1][2 * i + 1]}};
      if constexpr (TILES > 1) keys = load16(of_group + (j * S::kVectors + i) * kWarp);
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k16<T>(scores[j][n], left, {keys.word[2 * n], keys.word[2 * n + 1]});
    }
    if constexpr (S::kRest == 1) {
      constexpr int kWord = S::kWords - 1;
      const uint32_t left[2] = {q[0][kWord], q[1][kWord]};
      Vec8 keys{{k[0][kWord], k[1][kWord]}};
      if constexpr (TILES > 1) keys = load8(of_group + (j * S::kVectors + S::kSteps) * kWarp);
#pragma unroll
      for (int n = 0; n < 2; ++n) mma_m16n8k8<T>(scores[j][n], left, keys.word[n]);
    }
  }

  // exp(score - row maximum) in place, and its sums. A NaN is skipped by the maximum and comes back as exp(NaN).
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = kMinusInfinity, sum = 0.f;
#pragma unroll
    for (int i = 0; i < TILES * 4; ++i) {
      float& score = scores[i / 4][i / 2 % 2][2 * half + i % 2];
      if (16 * (i / 4) + 8 * (i / 2 % 2) + 2 * t + i % 2 >= length) score = kMinusInfinity;
      top = fmaxf(top, score);
    }
    top = lanes_max<4>(top) * scale;
#pragma unroll
    for (int i = 0; i < TILES * 4; ++i) {
      float& score = scores[i / 4][i / 2 % 2][2 * half + i % 2];
      score = fast_exp2(score * scale - top);
      sum += score;
    }
    inverse[half] = fast_reciprocal(lanes_sum<4>(sum));
  }

  if constexpr (TILES > 1 && S::kTakeTurns) {
    __syncthreads();  // nobody needs the keys any more
    share_values();
    __syncthreads();
  }
  float o[S::kColumns][4] = {};
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    if (TILES > 1 && j >= tiles) break;
    const float(&p)[2][4] = scores[j];
    const uint32_t left[4] = {pack2<T>(p[0][0], p[0][1]), pack2<T>(p[0][2], p[0][3]), pack2<T>(p[1][0], p[1][1]),
                              pack2<T>(p[1][2], p[1][3])};
#pragma unroll
    for (int n = 0; n < S::kColumns; n += 2) {
      const bool both = n + 1 < S::kColumns;
      const int next = both ? n + 1 : n;
      Vec16 values{{v[n][0], v[n][1], v[next][0], v[next][1]}};
      if constexpr (TILES > 1) values = load16(of_group + (j * S::kVectors + kFirstValue + n / 2) * kWarp);
      mma_m16n8k16<T>(o[n], left, {values.word[0], values.word[1]});
      if (both) mma_m16n8k16<T>(o[next], left, {values.word[2], values.word[3]});
    }
  }

  const int64_t width = a.heads * size;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int frame = row + 8 * half;
    if (frame >= frames) continue;
    const int64_t token = (b * length + frame) * a.places + s;
    store_row<T, DP>(static_cast<T*>(a.out) + token * width + h * size, o, half, inverse[half], size, t);
  }
}

template <typename T, int DP, int TILES>
const char* start(const TemporalArguments& a, void* stream) {
  using S = Shape<DP, TILES>;
  const int64_t blocks = (a.batch * a.places * a.heads + S::kGroups - 1) / S::kGroups;
  const int64_t warps = TILES == 1 ? S::kWarps : S::kGroups * ((a.frames + 15) / 16);
  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(a.size));
  return launch<temporal_forward<T, DP, TILES>>(dim3(static_cast<unsigned>(blocks)),
                                                dim3(static_cast<unsigned>(warps * kWarp)), 0, stream, a, scale);
}

template <typename T, int DP>
const char* start(const TemporalArguments& a, void* stream) {
  if (a.frames <= 16) return start<T, DP, 1>(a, stream);
  if (a.frames <= 32) return start<T, DP, 2>(a, stream);
  if (a.frames <= 64) return start<T, DP, 4>(a, stream);
  return start<T, DP, 8>(a, stream);
}

template <typename T>
const char* start(const TemporalArguments& a, void* stream) {
  if (a.size == 72) return start<T, 72>(a, stream);
  return a.size <= 64 ? start<T, 64>(a, stream) : start<T, 128>(a, stream);
}

}  // namespace

JAVIS_ENTRY javis_cuda_temporal_attention(const TemporalArguments* arguments, void* stream) {
  const TemporalArguments& a = *arguments;
  if (a.frames < 1 || a.frames > 128) return "temporal_attention: sequences of 1 to 128 frames";
  if (a.size < 8 || a.size > 128 || a.size % 8 != 0) return "temporal_attention: heads of a multiple of 8 up to 128 values";
  if (a.batch * a.places * a.heads >= int64_t{1} << 31) return "temporal_attention: 2^31 sequences or more";
  return a.is_bf16 != 0 ? start<bf16>(a, stream) : start<fp16>(a, stream);
}

}  // namespace javis::cuda
