// The machine instructions of the matmuls that C++ has no words for, each with a meaning of its own: under g++ the same
// functions come from the header that stands in for CUDA's, tests/cuda_on_cpu/intrinsics.h.
#pragma once
#include "vector.cuh"

namespace quantlib {
namespace cuda {

QL_DEVICE int at_most(int64_t n, int most) { return n < most ? int(n) : most; }

#ifdef __CUDACC__

// Four bytes of those of a (0 to 3) and b (4 to 7), the lowest nibble of `selector` naming the lowest; 8 more and the
// byte is filled with its own highest bit.
QL_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// a * b + c of two 16-bit floats in a register; subnormals count.
QL_DEVICE uint32_t fma2(float16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
QL_DEVICE uint32_t fma2(bfloat16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// c[16, 8] += a[16, 16] * b[8, 16]^T. Lane 4 g + t holds of c rows g and g + 8 and columns 2 t and 2 t + 1; of a those
// rows and, two to a register, columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9; of b row g and those columns.
#define QL_MMA(TYPES)                                                                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
QL_DEVICE void mma(float16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { QL_MMA("f16.f16"); }
QL_DEVICE void mma(bfloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { QL_MMA("bf16.bf16"); }
#undef QL_MMA

// c[16, 8] += a[16, 32] * b[8, 32]^T of int8, exact modulo 2^32. As above, but four columns to a register: 4 t and the
// next three, and 16 further.
QL_DEVICE void mma(int8, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes that nobody reads again.
QL_DEVICE Vector<uint32_t, 4> load_once(const uint8_t* p) {
  Vector<uint32_t, 4> v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

#else
#include <intrinsics.h>
#endif

}  // namespace cuda
}  // namespace quantlib
