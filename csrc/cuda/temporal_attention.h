// The arguments of temporal_attention.cu, for those that call it.

#pragma once

#include <cstdint>

namespace javis::cuda {

// Attention over the frames of each place: qkv [B, T, S, 3, H, D] -> out [B, T * S, H * D], in 16-bit values.
// Every field is one word of 64 bits, which tests fill in through ctypes.
struct TemporalArguments {
  const void* qkv;       // the values of a head dense, 16-byte aligned as is every stride
  void* out;             // dense
  const float* weights;  // of the RMS norms of q and k, dense [2, D]; null: no norm
  const float* cos;      // dense [T, D / 2]; null: no rotation
  const float* sin;
  int64_t stride_b, stride_t, stride_s, stride_part, stride_h;  // of qkv, in values
  int64_t batch, frames, places, heads, size;                   // size: D
  int64_t is_bf16;                                              // else fp16
  double eps;
};

extern "C" const char* javis_cuda_temporal_attention(const TemporalArguments* arguments, void* stream);

}  // namespace javis::cuda
