// What device.cuh promises, as PTX for sm_80 and later. Fragment layouts are those of the PTX ISA, section "Matrix
// Fragments for mma.m16n8k16": lane = 4 * group + t,
//   A 16x16: a[0] rows group, columns 2t, 2t+1; a[1] rows group + 8; a[2], a[3] the same with columns + 8
//   B 16x8:  b[0] rows (k) 2t, 2t+1, column group; b[1] the same with rows + 8
//   D 16x8:  d[0], d[1] row group, columns 2t, 2t+1; d[2], d[3] row group + 8
// (m16n8k8: the first half of each.) The emulator has the same layouts in plain C++.

#pragma once

#include <cuda_runtime.h>

namespace javis::cuda {

#define JAVIS_ENTRY extern "C" const char*
#define JAVIS_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define JAVIS_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// --- values ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint16_t bf16_bits(float value) { return static_cast<uint16_t>(pack2<bf16>(value, 0.f)); }
__device__ __forceinline__ uint16_t fp16_bits(float value) { return static_cast<uint16_t>(pack2<fp16>(value, 0.f)); }
__device__ __forceinline__ float fp16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
__device__ __forceinline__ uint32_t pack2_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

// 2^x and 1/x, about 2 units in the last place; 2^-inf is 0.
__device__ __forceinline__ float fast_exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ float fast_reciprocal(float value) { return __frcp_rn(value); }
__device__ __forceinline__ float reciprocal_root(float value) { return __frsqrt_rn(value); }

// --- memory ------------------------------------------------------------------------------------------------------------

// All of these need addresses divisible by the size of what is moved.
__device__ __forceinline__ Vec16 load16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
// Global memory that this kernel does not write and reads once: past the first-level cache.
__device__ __forceinline__ Vec16 load16_once(const void* from) {
  Vec16 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(__cvta_generic_to_global(from)));
  return v;
}
__device__ __forceinline__ void store16(void* to, const Vec16& v) {
  *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
__device__ __forceinline__ Vec8 load8(const void* from) {
  const uint2 v = *static_cast<const uint2*>(from);
  return {{v.x, v.y}};
}
__device__ __forceinline__ void store8(void* to, const Vec8& v) {
  *static_cast<uint2*>(to) = make_uint2(v.word[0], v.word[1]);
}
__device__ __forceinline__ uint32_t load4(const void* from) { return *static_cast<const uint32_t*>(from); }
__device__ __forceinline__ void store4(void* to, uint32_t v) { *static_cast<uint32_t*>(to) = v; }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory without passing through registers. They are there for this thread after
// cp_async_commit() and cp_async_wait<N>() (all groups but the N youngest), for the block after __syncthreads() as well.
__device__ __forceinline__ void cp_async_16(void* to_shared, const void* from_global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from_global))
               : "memory");
}
// The same, or 16 bytes of zero if not `valid`; from_global is then not read.
__device__ __forceinline__ void cp_async_16_or_zero(void* to_shared, const void* from_global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)),
               "l"(__cvta_generic_to_global(from_global)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- warps -------------------------------------------------------------------------------------------------------------

template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}
template <typename V>
__device__ __forceinline__ V shuffle_from(V value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename V>
__device__ __forceinline__ V shuffle_down(V value, int lanes) {  // the last lanes keep theirs
  return __shfl_down_sync(kAllLanes, value, lanes);
}
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(kAllLanes, value) != 0; }

// --- tensor cores --------------------------------------------------------------------------------------------------------

// d += A B, float32 sums. Whole warp.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);
template <>
__device__ __forceinline__ void mma_m16n8k8<bf16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
__device__ __forceinline__ void mma_m16n8k8<fp16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Loads COUNT (1, 2, 4) matrices of 8x8 16-bit values from shared memory. Lane 8 i + r gives the address of row r of
// matrix i (16 bytes, aligned; lanes from 8 COUNT on are ignored but must give some address). Register i of lane l gets
// row l / 4, columns 2 (l % 4) and the next, of matrix i; with `trans`, of matrix i transposed. Whole warp.
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(out[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&out)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&out)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(out[0])
               : "r"(shared_address(row))
               : "memory");
}

// --- launching -----------------------------------------------------------------------------------------------------------

// The kernels of this library, for attributes.cu: all that are launched as launch<kernel>(...).
struct KernelEntry;
inline const KernelEntry*& kernel_list() {
  static const KernelEntry* first = nullptr;
  return first;
}
struct KernelEntry {
  const char* name;
  const void* kernel;
  const KernelEntry* next;
  KernelEntry(const char* name_, const void* kernel_) : name(name_), kernel(kernel_), next(kernel_list()) {
    kernel_list() = this;
  }
};
template <auto KERNEL>
struct Listed {
  static const char* name() { return __PRETTY_FUNCTION__; }
  static inline const KernelEntry entry{name(), reinterpret_cast<const void*>(KERNEL)};
};

// Runs the kernel on the stream; null, or why it could not be started. An empty grid is not launched.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, void* stream,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (dynamic_shared > 48 * 1024) {  // beyond what every kernel may have without asking
    const cudaError_t asked = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared));
    if (asked != cudaSuccess) {
      cudaGetLastError();  // else the next launch would report this one
      return cudaGetErrorString(asked);
    }
  }
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t started = cudaGetLastError();
  return started == cudaSuccess ? nullptr : cudaGetErrorString(started);
}

// The same for a kernel that is to be in the list.
template <auto KERNEL, typename... Arguments>
const char* launch(dim3 grid, dim3 block, size_t dynamic_shared, void* stream, const Arguments&... arguments) {
  (void)&Listed<KERNEL>::entry;
  return launch(KERNEL, grid, block, dynamic_shared, stream, arguments...);
}

}  // namespace javis::cuda
