// The forward kernel of both norms: rows in registers, statistics in float32 in two passes over them.
//
// A row of C values is C / 8 chunks of 8 values. W warps share a row, lane l takes chunks l, l + 32 W, ...: V of them. At
// C = 1152 one warp takes a row (V = 5, the last one half used): its reductions are shuffles and nobody waits for another
// warp, and all of the row is asked for before any of it is needed. Modulation is read for each row: it comes from the
// first-level cache, and keeping it in registers would cost more in rows under way than the loads do.

#pragma once

#include "device.cuh"
#include "norm.h"

namespace javis::cuda {

constexpr int kChunk = 8;  // values

// 8 values that are read once (x, h, gradients), or often (modulation).
template <typename T>
__device__ __forceinline__ void load_chunk_once(const T* from, float (&out)[kChunk]) {
  Pack<T>::unpack(load16_once(from), out);
}
template <>
__device__ __forceinline__ void load_chunk_once<float>(const float* from, float (&out)[kChunk]) {
  const Vec16 low = load16_once(from), high = load16_once(from + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = float_of(low.word[i]);
    out[4 + i] = float_of(high.word[i]);
  }
}
template <typename T>
__device__ __forceinline__ void load_chunk(const T* from, float (&out)[kChunk]) {
  Pack<T>::unpack(load16(from), out);
}
template <>
__device__ __forceinline__ void load_chunk<float>(const float* from, float (&out)[kChunk]) {
  const Vec16 low = load16(from), high = load16(from + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = float_of(low.word[i]);
    out[4 + i] = float_of(high.word[i]);
  }
}

// Rounds the values to T, in place, and stores them.
template <typename T>
__device__ __forceinline__ void store_chunk(T* to, float (&values)[kChunk]) {
  const Vec16 packed = Pack<T>::pack(values);
  store16(to, packed);
  Pack<T>::unpack(packed, values);
}
template <>
__device__ __forceinline__ void store_chunk<float>(float* to, float (&values)[kChunk]) {
  Vec16 low, high;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low.word[i] = bits_of(values[i]);
    high.word[i] = bits_of(values[4 + i]);
  }
  store16(to, low);
  store16(to + 4, high);
}

// A row of modulation that is float32 or has the dtype of the tokens: the same for the whole grid, so that the branch
// costs nothing.
template <typename T>
struct ModulationRow {
  const void* row;
  bool is_float;
  __device__ __forceinline__ void load(int chunk, float (&out)[kChunk]) const {
    if (is_float)
      load_chunk(static_cast<const float*>(row) + kChunk * chunk, out);
    else
      load_chunk(static_cast<const T*>(row) + kChunk * chunk, out);
  }
};

template <typename T>
__device__ __forceinline__ ModulationRow<T> modulation_row(const void* data, int64_t stride, uint32_t b, bool is_float) {
  const int64_t offset = static_cast<int64_t>(b) * stride * (is_float ? sizeof(float) : sizeof(T));
  return {data == nullptr ? nullptr : static_cast<const char*>(data) + offset, is_float};
}

// Sum over the W warps of a row; every lane gets it. `parts`: W floats of shared memory that nobody else uses.
template <int W>
__device__ __forceinline__ float row_sum(float value, float* parts) {
  value = lanes_sum(value);
  if constexpr (W > 1) {
    if (lane_id() == 0) parts[warp_id() % W] = value;
    __syncthreads();
    value = 0.f;
#pragma unroll
    for (int w = 0; w < W; ++w) value += parts[w];
  }
  return value;
}

constexpr int kForwardThreads = 128;

template <typename T, int V, int W, bool HAS_H, bool FP8>
__global__ void __launch_bounds__(kForwardThreads) norm_forward(const NormForward p) {
  constexpr int kLanes = kWarp * W, kRows = kForwardThreads / kLanes;
  static_assert(W == 1 || kRows == 1, "several rows in a block would have to wait for each other");
  JAVIS_SHARED(float, parts, 3 * (kForwardThreads / kWarp));
  const uint32_t row = blockIdx.x * kRows + threadIdx.x / kLanes;
  const uint32_t tokens = static_cast<uint32_t>(p.tokens);
  if (row >= static_cast<uint32_t>(p.batch) * tokens) return;  // a whole warp, and only where W is 1
  const uint32_t b = row / tokens, n = row - b * tokens;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, chunks = static_cast<int>(p.width) / kChunk;
  const float inverse_width = 1.f / static_cast<float>(p.width);

  bool on = true;
  if (p.frame_mask != nullptr) {
    const uint32_t frames = static_cast<uint32_t>(p.frames);
    on = p.frame_mask[b * frames + n / (tokens / frames)] != 0;
  }

  const int64_t out = static_cast<int64_t>(row) * p.width;
  const T* x = static_cast<const T*>(p.x) + b * p.x_b + n * p.x_n;
  float v[V][kChunk];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int chunk = lane + i * kLanes;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[i][j] = 0.f;
    if (chunk < chunks) load_chunk_once(x + kChunk * chunk, v[i]);
  }
  if constexpr (HAS_H) {
    const T* h = static_cast<const T*>(p.h) + b * p.h_b + n * p.h_n;
    const ModulationRow<T> gate = modulation_row<T>(on ? p.gate : p.gate0, on ? p.gate_b : p.gate0_b, b, p.float_modulation != 0);
    float added[V][kChunk];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int chunk = lane + i * kLanes;
      if (chunk < chunks) load_chunk_once(h + kChunk * chunk, added[i]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int chunk = lane + i * kLanes;
      if (chunk >= chunks) continue;
      if (gate.row != nullptr) {
        float factor[kChunk];
        gate.load(chunk, factor);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) added[i][j] *= factor[j];
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[i][j] += added[i][j];
      store_chunk(static_cast<T*>(p.r) + out + kChunk * chunk, v[i]);  // rounds: the norm sees what later ops see
    }
  }

  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum += v[i][j];
  const float mean = row_sum<W>(sum, parts) * inverse_width;
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (lane + i * kLanes >= chunks) continue;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      v[i][j] -= mean;
      squares += v[i][j] * v[i][j];
    }
  }
  const float variance = row_sum<W>(squares, parts + W) * inverse_width;
  const float rstd = reciprocal_root(variance + static_cast<float>(p.eps));

  const bool is_float = p.float_modulation != 0;
  const ModulationRow<T> shift = modulation_row<T>(on ? p.shift : p.shift0, on ? p.shift_b : p.shift0_b, b, is_float);
  const ModulationRow<T> scale = modulation_row<T>(on ? p.scale : p.scale0, on ? p.scale_b : p.scale0_b, b, is_float);
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int chunk = lane + i * kLanes;
    if (chunk >= chunks) continue;
    float add[kChunk], gain[kChunk];
    shift.load(chunk, add);
    scale.load(chunk, gain);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      v[i][j] = v[i][j] * rstd * (1.f + gain[j]) + add[j];
      if constexpr (FP8) largest = nan_max(largest, fabsf(v[i][j]));
    }
    if constexpr (!FP8) store_chunk(static_cast<T*>(p.y) + out + kChunk * chunk, v[i]);
  }
  if constexpr (!FP8) {
    if (lane == 0) {
      p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
  } else {
    float inverse;
    if (p.fp8 == kFp8Static) {
      inverse = 1.f / *p.y_scale;
    } else {
      largest = lanes_nan_max(largest);
      if constexpr (W > 1) {
        if (lane_id() == 0) parts[2 * W + warp_id()] = largest;
        __syncthreads();
        largest = parts[2 * W];
#pragma unroll
        for (int w = 1; w < W; ++w) largest = nan_max(largest, parts[2 * W + w]);
      }
      inverse = largest == 0.f ? 1.f : 448.f / largest;
      if (lane == 0) p.row_scale[row] = largest == 0.f ? 1.f : largest / 448.f;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int chunk = lane + i * kLanes;
      if (chunk >= chunks) continue;
      Vec8 packed;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        packed.word[half] = pack4_e4m3(v[i][4 * half] * inverse, v[i][4 * half + 1] * inverse, v[i][4 * half + 2] * inverse,
                                       v[i][4 * half + 3] * inverse);
      store8(static_cast<uint8_t*>(p.y) + out + kChunk * chunk, packed);
    }
  }
}

template <typename T, int V, int W, bool HAS_H>
const char* launch_norm_forward_as(const NormForward& p, void* stream) {
  constexpr int kRows = kForwardThreads / (kWarp * W);
  const dim3 grid(static_cast<unsigned>((p.batch * p.tokens + kRows - 1) / kRows));
  if (p.fp8 == kNoFp8) return launch<norm_forward<T, V, W, HAS_H, false>>(grid, dim3(kForwardThreads), 0, stream, p);
  return launch<norm_forward<T, V, W, HAS_H, true>>(grid, dim3(kForwardThreads), 0, stream, p);
}

template <typename T, bool HAS_H>
const char* launch_norm_forward_of(const NormForward& p, void* stream) {
  if (p.width <= 256) return launch_norm_forward_as<T, 1, 1, HAS_H>(p, stream);
  if (p.width <= 1280) return launch_norm_forward_as<T, 5, 1, HAS_H>(p, stream);
  return launch_norm_forward_as<T, 4, 4, HAS_H>(p, stream);
}

inline const char* check_norm_sizes(int64_t batch, int64_t tokens, int64_t width, int64_t frames) {
  if (width <= 0 || width > kMaxNormWidth || width % kChunk != 0) return "width must be a multiple of 8, at most 4096";
  if (frames <= 0 || tokens % frames != 0) return "frames must divide tokens";
  if (batch * tokens > 0x7fffffff) return "more than 2^31 - 1 tokens";
  return nullptr;
}

template <bool HAS_H>
const char* launch_norm_forward(const NormForward& p, void* stream) {
  if (const char* problem = check_norm_sizes(p.batch, p.tokens, p.width, p.frames)) return problem;
  if (p.batch * p.tokens == 0) return nullptr;
  if (p.dtype == kFloat32) return launch_norm_forward_of<float, HAS_H>(p, stream);
  if (p.dtype == kBfloat16) return launch_norm_forward_of<bf16, HAS_H>(p, stream);
  return launch_norm_forward_of<fp16, HAS_H>(p, stream);
}

}  // namespace javis::cuda
