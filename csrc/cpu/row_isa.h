// Which copy of the row kernels runs on this machine. JAVIS_CPU_ISA in the environment overrides the choice.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace javis::cpu {

#if defined(__x86_64__)
template <typename Kernels>
const Kernels& choose_isa(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
#else
template <typename Kernels>
const Kernels& choose_isa(const Kernels& baseline) {
#endif
  const char* wanted = std::getenv("JAVIS_CPU_ISA");  // lets tests run what this machine would not choose
  const auto allows = [&](const char* isa) { return wanted == nullptr || std::strcmp(wanted, isa) == 0; };
#if defined(__x86_64__)
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return avx512;
  if (allows("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
  STD_TORCH_CHECK(
      allows("baseline"), "JAVIS_CPU_ISA=", wanted, " is not available here; expected baseline, avx2 or avx512");
  return baseline;
}

}  // namespace javis::cpu
