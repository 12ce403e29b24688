// Inner loops of dense attention on processors with AVX512_BF16 (AMD since Zen 4, Intel since Cooper Lake): vdpbf16ps
// multiplies 32 bfloat16 by 32 and adds neighbours up in float32, twice the work of a float32 instruction. It takes
// denormal values for zero and rounds once per pair.
//
// Compiled with -mavx512bf16 (see setup.py), run only where dense_attention.cpp has found the instruction.

#if defined(__x86_64__)

#include "dense_attention_tiles.h"

namespace javis::cpu {
namespace {

// A unit is two bfloat16 values that are neighbours along the summed axis: of a head, or of two keys.
struct Pairs {
  static constexpr int kValues = 2;
  static void step(vec& sum, const float* left, vec right) {
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(*left), (__m512bh)(__m512)right);
  }
  static void row(const bf16* x, int64_t size, float* units) {
    if (size % 2 != 0) units[size / 2] = 0.f;
    std::memcpy(units, x, size * sizeof *x);
  }
  static void values(const bf16* x, const bf16* partner, int64_t size, float* units) {
    for (int64_t c = 0; c < size; ++c) {
      const uint32_t bits = x[c].bits | (partner == nullptr ? 0u : static_cast<uint32_t>(partner[c].bits) << 16);
      std::memcpy(units + c, &bits, sizeof bits);
    }
  }
  static void put(float* units, vec first, vec second) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    at(units) = (vec)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
  }
};

}  // namespace

extern const DenseFunctions<bf16> dense_attention_avx512bf16 = {&pack<Pairs, bf16>, &attend<Pairs, bf16>};

}  // namespace javis::cpu

#endif
