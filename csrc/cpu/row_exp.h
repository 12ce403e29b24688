// The exponential of the inner loops (*_rows.cpp), written so that compilers turn loops over it into vector code.

#pragma once

#include <cstdint>

namespace javis::cpu {
namespace {

// exp(x) to about 2 units in the last place; 0 below -87, infinity above 88.7, NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, and ln 2 in two parts so that no digits of r are lost; 2^n is put together from
// bits, and exp(r) is its Taylor polynomial of degree 7, whose remainder is below 2^-27.
inline float exp_of(float x) {
  constexpr float kLow = -87.f, kHigh = 88.7f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float inside = x < kLow ? kLow : (x > kHigh ? kHigh : x);  // comparisons with NaN are false: it stays
  const float shifted = inside * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.f / 5040.f;
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (126u << 23);  // 2^(n-1), since 2^128 is no float; the bits above those of n are shifted out
  float half;
  __builtin_memcpy(&half, &bits, sizeof half);
  const float result = p * half * 2.f;
  return x < kLow ? 0.f : (x > kHigh ? __builtin_inff() : result);
}

}  // namespace
}  // namespace javis::cpu
