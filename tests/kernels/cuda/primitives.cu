// Kernels that do one thing of csrc/cuda/device.cuh each, so that tests can compare it with what it should be: in the
// emulator everywhere, and as compiled by nvcc on a GPU.

#include "../../../csrc/cuda/device.cuh"

using namespace javis::cuda;

namespace {

template <typename T>
__global__ void mma_k16(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = lane_id();
  uint32_t left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) sum[i] = d[4 * lane + i];
  mma_m16n8k16<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}

template <typename T>
__global__ void mma_k8(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = lane_id();
  const uint32_t left[2] = {a[2 * lane], a[2 * lane + 1]};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[4 * lane + i];
  mma_m16n8k8<T>(sum, left, b[lane]);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}

// 32 rows of 8 values through shared memory by cp.async, then ldmatrix: out [32 lanes][4].
template <int COUNT, bool TRANSPOSED>
__global__ void load_matrices(const uint16_t* rows, uint32_t* out) {
  JAVIS_SHARED(uint16_t, tile, 32 * 8);
  const int lane = lane_id();
  cp_async_16(tile + 8 * lane, rows + 8 * lane);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t got[COUNT];
  if constexpr (TRANSPOSED)
    ldmatrix_trans(got, tile + 8 * lane);
  else
    ldmatrix(got, tile + 8 * lane);
  for (int i = 0; i < COUNT; ++i) out[COUNT * lane + i] = got[i];
}

__global__ void shuffles(const float* in, float* out) {
  const int lane = lane_id();
  const float value = in[lane];
  const float results[] = {shuffle_xor(value, 5), shuffle_from(value, (3 * lane) % 32), shuffle_down(value, 4),
                           lanes_sum(value),      lanes_sum<4>(value),                  lanes_max<8>(value),
                           lanes_nan_max(value),  any_lane(value > 1e6f) ? 1.f : 0.f};
  for (int i = 0; i < 8; ++i) out[32 * i + lane] = results[i];
}

// float -> bf16, fp16, e4m3 and the 16-bit ones back.
__global__ void conversions(const float* in, uint16_t* as_bf16, uint16_t* as_fp16, uint8_t* as_e4m3, float* from_fp16, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  as_bf16[i] = from_float<bf16>(in[i]).bits;
  as_fp16[i] = from_float<fp16>(in[i]).bits;
  as_e4m3[i] = to_e4m3(in[i]);
  from_fp16[i] = to_float(from_float<fp16>(in[i]));
}

// Reverses a block's values in shared memory. wait = 0 forgets the barrier in between.
__global__ void reverse(const float* in, float* out, int wait) {
  JAVIS_DYNAMIC_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = in[threadIdx.x];
  if (wait) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// Things that must be reported. kind: 0 lanes in different functions, 1 a thread that leaves, 2 unaligned, 3 outside,
// 4 a copy that nobody waited for (no error: the values show it).
__global__ void mistakes(const float* in, float* out, int kind) {
  JAVIS_SHARED(float, tile, 128);
  const int lane = lane_id();
  if (kind == 0) out[lane] = lane < 16 ? shuffle_xor(in[lane], 1) : shuffle_down(in[lane], 1);
  if (kind == 1) {
    if (lane == 7) return;
    __syncthreads();
    out[lane] = in[lane];
  }
  if (kind == 2 || kind == 3) {
    const Vec16 got = load16(in + (kind == 2 ? 1 : 4 * lane));
    out[lane] = float_of(got.word[0]);
  }
  if (kind == 4) {
    cp_async_16(tile + 4 * lane, in + 4 * (lane % 8));
    cp_async_commit();
    cp_async_wait<1>();
    out[lane] = tile[4 * lane];
  }
}

}  // namespace

JAVIS_ENTRY javis_test_mma(const uint32_t* a, const uint32_t* b, float* d, int k, int is_bf16, void* stream) {
  if (k == 16) return is_bf16 ? launch(mma_k16<bf16>, 1, 32, 0, stream, a, b, d) : launch(mma_k16<fp16>, 1, 32, 0, stream, a, b, d);
  return is_bf16 ? launch(mma_k8<bf16>, 1, 32, 0, stream, a, b, d) : launch(mma_k8<fp16>, 1, 32, 0, stream, a, b, d);
}

JAVIS_ENTRY javis_test_ldmatrix(const uint16_t* rows, uint32_t* out, int count, int transposed, void* stream) {
  if (count == 4)
    return transposed ? launch(load_matrices<4, true>, 1, 32, 0, stream, rows, out) : launch(load_matrices<4, false>, 1, 32, 0, stream, rows, out);
  if (count == 2)
    return transposed ? launch(load_matrices<2, true>, 1, 32, 0, stream, rows, out) : launch(load_matrices<2, false>, 1, 32, 0, stream, rows, out);
  return transposed ? launch(load_matrices<1, true>, 1, 32, 0, stream, rows, out) : launch(load_matrices<1, false>, 1, 32, 0, stream, rows, out);
}

JAVIS_ENTRY javis_test_shuffles(const float* in, float* out, void* stream) { return launch(shuffles, 1, 32, 0, stream, in, out); }

JAVIS_ENTRY javis_test_conversions(const float* in, uint16_t* as_bf16, uint16_t* as_fp16, uint8_t* as_e4m3, float* from_fp16, int count, void* stream) {
  return launch(conversions, (count + 63) / 64, 64, 0, stream, in, as_bf16, as_fp16, as_e4m3, from_fp16, count);
}

JAVIS_ENTRY javis_test_reverse(const float* in, float* out, int threads, int wait, void* stream) {
  return launch(reverse, 1, threads, threads * sizeof(float), stream, in, out, wait);
}

JAVIS_ENTRY javis_test_mistakes(const float* in, float* out, int kind, void* stream) {
  return launch(mistakes, 1, 32, 0, stream, in, out, kind);
}
