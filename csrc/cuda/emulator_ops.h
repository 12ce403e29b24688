// What device.cuh promises, in plain C++: the counterpart of hardware.cuh for the emulator.

#pragma once

#include "emulator.h"

namespace javis::cuda {

#define JAVIS_ENTRY extern "C" __attribute__((visibility("default"))) const char*
#define JAVIS_SHARED(type, name, count)                                                                         \
  static const char name##_place = 0;                                                                           \
  type(&name)[count] =                                                                                          \
      *static_cast<type(*)[count]>(::javis::emulator::shared_memory(&name##_place, sizeof(type) * (count), #name))
#define JAVIS_DYNAMIC_SHARED(name) \
  unsigned char* const name = reinterpret_cast<unsigned char*>(const_cast<char*>(::javis::emulator::machine.dynamic.begin))

// --- values ------------------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even; NaN as the hardware gives it.
inline uint16_t bf16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t fp16_bits(float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65520 or more: infinity
  if (magnitude < 0x38800000u)  // below 2^-14: steps of 2^-24, rounded by adding 1/2
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
inline float fp16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

template <typename T>
inline uint32_t pack2(float low, float high);
template <>
inline uint32_t pack2<bf16>(float low, float high) {
  return bf16_bits(low) | (static_cast<uint32_t>(bf16_bits(high)) << 16);
}
template <>
inline uint32_t pack2<fp16>(float low, float high) {
  return fp16_bits(low) | (static_cast<uint32_t>(fp16_bits(high)) << 16);
}

inline float fast_exp2(float value) { return std::exp2(value); }
inline float fast_reciprocal(float value) { return 1.f / value; }
inline float reciprocal_root(float value) { return 1.f / std::sqrt(value); }

// --- memory ------------------------------------------------------------------------------------------------------------

namespace detail {
template <typename V>
inline V load_checked(const void* from, const char* what) {
  emulator::check_any(from, sizeof(V), what);
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename V>
inline void store_checked(void* to, const V& value, const char* what) {
  emulator::check_any(to, sizeof(V), what);
  std::memcpy(to, &value, sizeof value);
}
}  // namespace detail

inline Vec16 load16(const void* from) { return detail::load_checked<Vec16>(from, "load16"); }
inline Vec16 load16_once(const void* from) {
  emulator::check_global(from, 16, "load16_once");
  return detail::load_checked<Vec16>(from, "load16_once");
}
inline void store16(void* to, const Vec16& value) { detail::store_checked(to, value, "store16"); }
inline Vec8 load8(const void* from) { return detail::load_checked<Vec8>(from, "load8"); }
inline void store8(void* to, const Vec8& value) { detail::store_checked(to, value, "store8"); }
inline uint32_t load4(const void* from) { return detail::load_checked<uint32_t>(from, "load4"); }
inline void store4(void* to, uint32_t value) { detail::store_checked(to, value, "store4"); }

inline void cp_async_16_or_zero(void* to_shared, const void* from_global, bool valid) {
  emulator::check_shared(to_shared, 16, "cp_async_16");
  if (valid) emulator::check_global(from_global, 16, "cp_async_16");
  emulator::machine.running->open_copies.push_back({to_shared, valid ? from_global : nullptr});
}
inline void cp_async_16(void* to_shared, const void* from_global) { cp_async_16_or_zero(to_shared, from_global, true); }
inline void cp_async_commit() {
  emulator::Fiber& self = *emulator::machine.running;
  self.groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}
template <int N>
inline void cp_async_wait() {
  auto& groups = emulator::machine.running->groups;
  while (groups.size() > N) {
    for (const emulator::Copy& copy : groups.front()) {
      if (copy.from != nullptr)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// --- warps -------------------------------------------------------------------------------------------------------------

namespace detail {
template <typename V>
struct Sent {
  V value;
  int lane;  // whose value is wanted
};

template <typename V>
inline V shuffle(const char* what, V value, int from) {
  const Sent<V> in{value, from};
  V out{};
  emulator::meet<Sent<V>, V>(what, kAllLanes, in, out, [](const Sent<V>* const (&ins)[32], V* const (&outs)[32], unsigned) {
    V results[32];
    for (int lane = 0; lane < 32; ++lane) results[lane] = ins[ins[lane]->lane]->value;
    for (int lane = 0; lane < 32; ++lane) *outs[lane] = results[lane];
  });
  return out;
}
inline int own_lane() { return static_cast<int>(emulator::machine.running->number % 32); }
}  // namespace detail

template <typename V>
inline V shuffle_xor(V value, int lanes) {
  return detail::shuffle("shuffle_xor", value, (detail::own_lane() ^ lanes) & 31);
}
template <typename V>
inline V shuffle_from(V value, int lane) {
  return detail::shuffle("shuffle_from", value, lane & 31);
}
template <typename V>
inline V shuffle_down(V value, int lanes) {
  const int lane = detail::own_lane();
  return detail::shuffle("shuffle_down", value, lane + lanes < 32 ? lane + lanes : lane);
}
inline bool any_lane(bool value) {
  bool out = false;
  emulator::meet<bool, bool>("any_lane", kAllLanes, value, out, [](const bool* const (&ins)[32], bool* const (&outs)[32], unsigned) {
    bool any = false;
    for (const bool* in : ins) any = any || *in;
    for (bool* result : outs) *result = any;
  });
  return out;
}

// --- tensor cores --------------------------------------------------------------------------------------------------------

namespace detail {
template <typename T>
inline float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which == 0 ? pair : pair >> 16);
  if constexpr (std::is_same_v<T, bf16>) return float_of(static_cast<uint32_t>(bits) << 16);
  return fp16_to_float(bits);
}

template <int K>
struct Fragments {
  uint32_t a[K / 4], b[K / 8];
  float d[4];
};

// The lanes' fragments to matrices, the product with float32 sums, and back: layouts of the PTX ISA, see hardware.cuh.
template <typename T, int K>
inline void multiply(const Fragments<K>* const (&ins)[32], float (*const (&outs)[32])[4], unsigned) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < K / 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[group + 8 * (i % 2)][8 * (i / 2) + 2 * t + half] = half_of<T>(ins[lane]->a[i], half);
    for (int i = 0; i < K / 8; ++i)
      for (int half = 0; half < 2; ++half) b[8 * i + 2 * t + half][group] = half_of<T>(ins[lane]->b[i], half);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = ins[lane]->d[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      (*outs[lane])[i] = sum;
    }
  }
}
}  // namespace detail

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const detail::Fragments<16> in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  emulator::meet<detail::Fragments<16>, float[4]>("mma_m16n8k16", kAllLanes, in, d, &detail::multiply<T, 16>);
}
template <typename T>
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  const detail::Fragments<8> in{{a[0], a[1]}, {b}, {d[0], d[1], d[2], d[3]}};
  emulator::meet<detail::Fragments<8>, float[4]>("mma_m16n8k8", kAllLanes, in, d, &detail::multiply<T, 8>);
}

namespace detail {
template <int COUNT, bool TRANSPOSED>
inline void load_matrices(uint32_t (&out)[COUNT], const void* row) {
  if (own_lane() < 8 * COUNT) emulator::check_shared(row, 16, "ldmatrix");
  emulator::meet<const void*, uint32_t[COUNT]>(
      TRANSPOSED ? "ldmatrix_trans" : "ldmatrix", kAllLanes, row, out,
      [](const void* const* const (&rows)[32], uint32_t (*const (&outs)[32])[COUNT], unsigned) {
        for (int matrix = 0; matrix < COUNT; ++matrix) {
          const auto value = [&](int r, int c) -> uint32_t {
            uint16_t bits;
            std::memcpy(&bits, static_cast<const char*>(*rows[8 * matrix + r]) + 2 * c, sizeof bits);
            return bits;
          };
          for (int lane = 0; lane < 32; ++lane) {
            const int r = lane / 4, c = 2 * (lane % 4);
            (*outs[lane])[matrix] =
                TRANSPOSED ? value(c, r) | (value(c + 1, r) << 16) : value(r, c) | (value(r, c + 1) << 16);
          }
        }
      });
}
}  // namespace detail

template <int COUNT>
inline void ldmatrix(uint32_t (&out)[COUNT], const void* row) {
  detail::load_matrices<COUNT, false>(out, row);
}
template <int COUNT>
inline void ldmatrix_trans(uint32_t (&out)[COUNT], const void* row) {
  detail::load_matrices<COUNT, true>(out, row);
}

// --- launching -----------------------------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, void*,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  return emulator::run(grid, block, dynamic_shared, [&] { kernel(arguments...); });
}
template <auto KERNEL, typename... Arguments>
const char* launch(dim3 grid, dim3 block, size_t dynamic_shared, void* stream, const Arguments&... arguments) {
  return launch(KERNEL, grid, block, dynamic_shared, stream, arguments...);
}

}  // namespace javis::cuda
