// Inner loops of dense attention in float32 arithmetic. JAVIS_ISA names the instruction set this copy is compiled for.

#include "dense_attention_tiles.h"

#ifndef JAVIS_ISA
#error "JAVIS_ISA must be baseline, avx2 or avx512"
#endif
#define JAVIS_JOIN2(a, b) a##b
#define JAVIS_JOIN(a, b) JAVIS_JOIN2(a, b)

namespace javis::cpu {

extern const DenseKernels JAVIS_JOIN(dense_attention_rows_, JAVIS_ISA) = {
    {&pack<Floats, float>, &attend<Floats, float>}, {&pack<Floats, bf16>, &attend<Floats, bf16>}};

}  // namespace javis::cpu
