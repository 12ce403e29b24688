// The backward kernels of both norms: gradients of the tokens with the sums of their rows, then the sums of the sums.
//
// A block goes through some rows of one frame, each thread with one chunk of 8 values of every row, so that its part of
// dshift, dscale and dgate stays in registers (16 to 24 floats; a warp with a whole row would need 120) and is written
// once. Of 16-bit values the next row is asked for before the present one is reduced over the block. The second kernel adds the partial
// sums of a sample in a fixed order: no atomics, the same input gives the same bits.

#pragma once

#include "norm_forward.cuh"

namespace javis::cuda {

constexpr int kBackwardThreads = kMaxNormWidth / kChunk;  // at most; C = 1152 takes 160

template <typename T>
struct RawChunk {  // 8 values as they lie in memory
  Vec16 part[sizeof(T) / 2];
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (size_t i = 0; i < sizeof(T) / 2; ++i) part[i] = load16_once(from + i * Pack<T>::kValues);
  }
  __device__ __forceinline__ void unpack(float (&out)[kChunk]) const {
#pragma unroll
    for (size_t i = 0; i < sizeof(T) / 2; ++i) {
      float values[Pack<T>::kValues];
      Pack<T>::unpack(part[i], values);
#pragma unroll
      for (int j = 0; j < Pack<T>::kValues; ++j) out[i * Pack<T>::kValues + j] = values[j];
    }
  }
};

template <typename T, bool HAS_H, bool HAS_GATE>
struct BackwardRow {
  RawChunk<T> dy, r, dr, h;
  float mean, rstd;
  __device__ __forceinline__ void load(const NormBackward& p, int64_t b, int64_t n, int chunk, bool inside) {
    mean = p.mean[b * p.tokens + n];
    rstd = p.rstd[b * p.tokens + n];
    if (!inside) return;
    const int column = kChunk * chunk;
    dy.load(static_cast<const T*>(p.dy) + b * p.dy_b + n * p.dy_n + column);
    r.load(static_cast<const T*>(p.r) + b * p.r_b + n * p.r_n + column);
    if constexpr (HAS_H) dr.load(static_cast<const T*>(p.dr) + b * p.dr_b + n * p.dr_n + column);
    if constexpr (HAS_GATE) h.load(static_cast<const T*>(p.h) + b * p.h_b + n * p.h_n + column);
  }
};

template <typename T, bool HAS_H, bool HAS_GATE>
__global__ void __launch_bounds__(kBackwardThreads) norm_backward(const NormBackward p) {
  static_assert(HAS_H || !HAS_GATE, "a gate needs a residual");
  constexpr int kSums = HAS_GATE ? 3 : 2;
  JAVIS_SHARED(float, parts, 2 * 2 * (kBackwardThreads / kWarp));  // [row odd or even][warp][2 sums]
  const int chunk = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  const bool inside = chunk < static_cast<int>(p.width) / kChunk;
  const uint32_t frame = blockIdx.x / static_cast<uint32_t>(p.parts), part = blockIdx.x - frame * static_cast<uint32_t>(p.parts);
  const uint32_t frames = static_cast<uint32_t>(p.frames), b = frame / frames;
  const int64_t places = p.tokens / p.frames;
  const int64_t first = (frame - b * frames) * places + part * p.rows_per_part;
  const int64_t left = places - part * p.rows_per_part;
  const int rows = static_cast<int>(left < p.rows_per_part ? left : p.rows_per_part);
  const bool on = p.frame_mask == nullptr || p.frame_mask[frame] != 0;
  const bool is_float = p.float_modulation != 0;
  const float inverse_width = 1.f / static_cast<float>(p.width);

  const ModulationRow<T> gates = modulation_row<T>(on ? p.gate : p.gate0, on ? p.gate_b : p.gate0_b, b, is_float);
  float gain[kChunk] = {};
  if (inside) modulation_row<T>(on ? p.scale : p.scale0, on ? p.scale_b : p.scale0_b, b, is_float).load(chunk, gain);
  float dshift[kChunk] = {}, dscale[kChunk] = {}, dgate[kChunk] = {};

  constexpr bool kAhead = sizeof(T) == 2;  // a float32 row has as many bytes as two others, and twice their registers
  BackwardRow<T, HAS_H, HAS_GATE> row, next;
  if constexpr (kAhead) next.load(p, b, first, chunk, inside);
  for (int i = 0; i < rows; ++i) {
    const int64_t n = first + i;
    if constexpr (kAhead) {
      row = next;
      if (i + 1 < rows) next.load(p, b, n + 1, chunk, inside);
    } else {
      row.load(p, b, n, chunk, inside);
    }

    float dx[kChunk] = {}, xhat[kChunk] = {};  // dx: first g
    float sum_g = 0.f, sum_gx = 0.f;
    if (inside) {
      float dy[kChunk];
      row.dy.unpack(dy);
      row.r.unpack(xhat);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        xhat[j] = (xhat[j] - row.mean) * row.rstd;
        dx[j] = dy[j] * (1.f + gain[j]);
        dshift[j] += dy[j];
        dscale[j] += dy[j] * xhat[j];
        sum_g += dx[j];
        sum_gx += dx[j] * xhat[j];
      }
    }
    // One barrier a row: the next row uses the other half of the memory, and the one after it comes behind that barrier.
    float* here = parts + (i % 2) * 2 * warps;
    sum_g = lanes_sum(sum_g);
    sum_gx = lanes_sum(sum_gx);
    if (lane_id() == 0) {
      here[2 * warp_id()] = sum_g;
      here[2 * warp_id() + 1] = sum_gx;
    }
    __syncthreads();
    sum_g = sum_gx = 0.f;
    for (int w = 0; w < warps; ++w) {
      sum_g += here[2 * w];
      sum_gx += here[2 * w + 1];
    }
    if (!inside) continue;
    const float mean_g = sum_g * inverse_width, mean_gx = sum_gx * inverse_width;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) dx[j] = row.rstd * (dx[j] - mean_g - xhat[j] * mean_gx);

    const int64_t out = (b * p.tokens + n) * p.width + kChunk * chunk;
    if constexpr (HAS_H) {
      float dr[kChunk];
      row.dr.unpack(dr);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) dx[j] += dr[j];
    }
    if constexpr (HAS_GATE) {
      float dh[kChunk], gate[kChunk];
      row.h.unpack(dh);
      gates.load(chunk, gate);  // from cache each time: 8 registers less over the loop
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        dgate[j] += dx[j] * dh[j];
        dh[j] = gate[j] * dx[j];
      }
      store_chunk(static_cast<T*>(p.dh) + out, dh);
    }
    store_chunk(static_cast<T*>(p.dx) + out, dx);
  }
  if (!inside) return;
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * kSums * p.width + kChunk * chunk;
  store_chunk(partial, dshift);
  store_chunk(partial + p.width, dscale);
  if constexpr (HAS_GATE) store_chunk(partial + 2 * p.width, dgate);
}

// partial [batch, frames * parts, sums, width] -> dmodulation [sums, batch, width]; with a mask [2 sums, batch, width], the
// frames of timestep t first. A block: 32 columns (a 128-byte line of each partial row) by 16 rows, 8 times before any is
// needed: the few blocks of this kernel wait for memory, not for arithmetic.
constexpr int kSumRows = 16, kSumAhead = 8;

template <typename T>
__global__ void __launch_bounds__(kWarp* kSumRows) norm_sum_partials(const NormBackward p) {
  JAVIS_SHARED(float, on_parts, kWarp * kSumRows);
  JAVIS_SHARED(float, off_parts, kWarp * kSumRows);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane_id();
  const int64_t which = blockIdx.y, sums = gridDim.y, b = blockIdx.z;
  const uint32_t parts = static_cast<uint32_t>(p.parts), all = static_cast<uint32_t>(p.frames) * parts;
  const float* partial = p.partial + (b * all * sums + which) * p.width + column;
  float on_sum = 0.f, off_sum = 0.f;
  for (uint32_t first = warp_id(); first < all; first += kSumRows * kSumAhead) {
    float values[kSumAhead];
#pragma unroll
    for (int i = 0; i < kSumAhead; ++i) {
      const uint32_t part = first + i * kSumRows;
      values[i] = part < all && column < p.width ? partial[part * sums * p.width] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kSumAhead; ++i) {
      const uint32_t part = first + i * kSumRows;
      const bool on = part >= all || p.frame_mask == nullptr || p.frame_mask[b * p.frames + part / parts] != 0;
      on_sum += on ? values[i] : 0.f;
      off_sum += on ? 0.f : values[i];
    }
  }
  on_parts[threadIdx.x] = on_sum;
  off_parts[threadIdx.x] = off_sum;
  __syncthreads();
  if (warp_id() != 0 || column >= p.width) return;
  for (int row = 1; row < kSumRows; ++row) {
    on_sum += on_parts[row * kWarp + lane_id()];
    off_sum += off_parts[row * kWarp + lane_id()];
  }
  T* out = static_cast<T*>(p.dmodulation) + (which * p.batch + b) * p.width + column;
  *out = from_float<T>(on_sum);
  if (p.frame_mask != nullptr) out[sums * p.batch * p.width] = from_float<T>(off_sum);
}

template <typename T, bool HAS_H, bool HAS_GATE>
const char* launch_norm_backward_as(const NormBackward& p, void* stream) {
  const unsigned threads = static_cast<unsigned>((p.width / kChunk + kWarp - 1) / kWarp * kWarp);
  const dim3 grid(static_cast<unsigned>(p.batch * p.frames * p.parts));
  if (const char* problem = launch<norm_backward<T, HAS_H, HAS_GATE>>(grid, dim3(threads), 0, stream, p)) return problem;
  const dim3 columns(static_cast<unsigned>((p.width + kWarp - 1) / kWarp), HAS_GATE ? 3 : 2, static_cast<unsigned>(p.batch));
  if (p.float_modulation != 0) return launch<norm_sum_partials<float>>(columns, dim3(kWarp * kSumRows), 0, stream, p);
  return launch<norm_sum_partials<T>>(columns, dim3(kWarp * kSumRows), 0, stream, p);
}

template <typename T, bool HAS_H>
const char* launch_norm_backward_of(const NormBackward& p, void* stream) {
  if constexpr (HAS_H) {
    if (p.gate != nullptr) return launch_norm_backward_as<T, true, true>(p, stream);
  }
  return launch_norm_backward_as<T, HAS_H, false>(p, stream);
}

// dmodulation of an empty call is not written: its sums are zero, which the caller fills in.
template <bool HAS_H>
const char* launch_norm_backward(const NormBackward& p, void* stream) {
  if (const char* problem = check_norm_sizes(p.batch, p.tokens, p.width, p.frames)) return problem;
  if (p.batch * p.tokens == 0) return nullptr;
  if (p.batch > 65535) return "more than 65535 samples";  // a dimension of the second kernel's grid
  if (p.dtype == kFloat32) return launch_norm_backward_of<float, HAS_H>(p, stream);
  if (p.dtype == kBfloat16) return launch_norm_backward_of<bf16, HAS_H>(p, stream);
  return launch_norm_backward_of<fp16, HAS_H>(p, stream);
}

}  // namespace javis::cuda
