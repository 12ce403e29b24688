// The only header that CUDA kernels of javis include for device things.
//
// The same kernel source is compiled twice: by nvcc, where these functions are PTX instructions (hardware.cuh), and by
// g++ with -DJAVIS_EMULATE, where they are plain C++ that runs the threads of a block one after another (emulator.h).
// The second is how the numerics of the kernels are tested on machines without a GPU; docs/cuda.md says what that proves.
//
// Rules for kernels, so that both can compile them:
//   - shared memory by JAVIS_SHARED and JAVIS_DYNAMIC_SHARED, kernels launched by launch();
//   - values of 16 bits are bf16 or fp16 below, never the types of cuda_bf16.h;
//   - all 32 lanes of a warp reach every function that says "whole warp", and all threads of a block reach __syncthreads().
//
// An entry point of a .cu file is a C function JAVIS_ENTRY name(const Arguments*, void* stream). It returns null, or what
// went wrong in words, so that both torch's bindings and a test through ctypes can call it.

#pragma once

#include <cstddef>
#include <cstdint>

namespace javis::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 16 bytes, the widest access to memory: 4 floats, or 8 values of 16 bits.
struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

}  // namespace javis::cuda

#ifdef JAVIS_EMULATE
#include "emulator_ops.h"
#else
#include "hardware.cuh"
#endif

namespace javis::cuda {

// --- values ------------------------------------------------------------------------------------------------------------
// hardware.cuh and emulator_ops.h have: bits_of(float), float_of(uint32_t), bf16_bits(float), fp16_bits(float),
// pack2<T>(low, high) -> uint32_t, fp16_to_float(uint16_t).

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 value) { return fp16_to_float(value.bits); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return {bf16_bits(value)};
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return {fp16_bits(value)};
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);  // x: the low half
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair) {
  return {float_of(pair << 16), float_of(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack2<fp16>(uint32_t pair) {
  return {fp16_to_float(static_cast<uint16_t>(pair)), fp16_to_float(static_cast<uint16_t>(pair >> 16))};
}

// 16 bytes as floats and back: 4 values of float, 8 of bf16 or fp16.
template <typename T>
struct Pack {
  static constexpr int kValues = 8;
  static __device__ __forceinline__ void unpack(const Vec16& in, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(in.word[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
  static __device__ __forceinline__ Vec16 pack(const float (&in)[8]) {
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.word[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
    return out;
  }
};
template <>
struct Pack<float> {
  static constexpr int kValues = 4;
  static __device__ __forceinline__ void unpack(const Vec16& in, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = float_of(in.word[i]);
  }
  static __device__ __forceinline__ Vec16 pack(const float (&in)[4]) {
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.word[i] = bits_of(in[i]);
    return out;
  }
};

// --- float8 e4m3 ---------------------------------------------------------------------------------------------------------

// To nearest, ties to even; beyond +-448 and infinities: +-448; NaN: NaN. For chips before sm_89, and the emulator.
__device__ __forceinline__ uint32_t e4m3_bits_portable(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fu;               // NaN
  if (magnitude >= 0x43e00000u) return sign | 0x7eu;       // 448 and more
  if (magnitude < 0x3c800000u) {                           // below 2^-6: steps of 2^-9, rounded by adding 2^14
    const float shifted = float_of(magnitude) + 16384.f;
    return sign | (bits_of(shifted) - 0x46800000u);
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return sign | ((rounded >> 20) - (120u << 3));           // exponent bias 127 -> 7
}

// Four values, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack4_e4m3(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return pack2_e4m3(a, b) | (pack2_e4m3(c, d) << 16);
#else
  return e4m3_bits_portable(a) | (e4m3_bits_portable(b) << 8) | (e4m3_bits_portable(c) << 16) |
         (e4m3_bits_portable(d) << 24);
#endif
}

__device__ __forceinline__ uint8_t to_e4m3(float value) {
  return static_cast<uint8_t>(pack4_e4m3(value, 0.f, 0.f, 0.f) & 0xffu);
}

// --- reductions ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }  // 1-D blocks
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Sum or maximum over groups of WIDTH neighbouring lanes (a power of two); every lane gets it. Whole warp.
// WIDTH = 4: over the lanes that share a row of an mma accumulator.
template <int WIDTH = kWarp>
__device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}
template <int WIDTH = kWarp>
__device__ __forceinline__ float lanes_max(float value) {  // a NaN may be lost: see nan_max
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) value = fmaxf(value, shuffle_xor(value, step));
  return value;
}

// The larger one; NaN if either is NaN (fmaxf drops a NaN).
__device__ __forceinline__ float nan_max(float a, float b) { return (a > b || a != a) ? a : b; }

template <int WIDTH = kWarp>
__device__ __forceinline__ float lanes_nan_max(float value) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) value = nan_max(value, shuffle_xor(value, step));
  return value;
}

}  // namespace javis::cuda
