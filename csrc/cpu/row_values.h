// Loads, stores and rounding of the values in a row, for *_rows.cpp files only.
//
// Everything is in an anonymous namespace: each copy of the loops is compiled for its own instruction set, and an inline
// function with external linkage could be the copy that the linker keeps for machines that do not have it.

#pragma once

#include "ada_layer_norm_rows.h"

namespace javis::cpu {
namespace {

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* p, float value) { *p = value; }
inline void store(bf16* p, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t nan = (bits >> 16) | 0x40u;                              // rounding could carry a NaN into infinity
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

}  // namespace
}  // namespace javis::cpu
