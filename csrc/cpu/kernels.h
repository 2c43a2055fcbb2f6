// The ops of this folder, and the one check that reads much memory. Every <op>.cpp is compiled once per instruction
// set, with -DQL_ISA=<name> naming the namespace; register.cpp, compiled once, includes no code of theirs and chooses
// among them at run time.
#pragma once
#include "../problem.h"

namespace quantlib {

// Calls body(begin, end, context) for pieces of [begin, end) of at least `grain`, on the threads of the caller's pool.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

// X(op, what it is asked)
#define QL_KERNELS(X)                               \
  X(cast, Cast)                                     \
  X(compute_scale, ComputeScale)                    \
  X(least_scale, LeastScale)                        \
  X(quantize, Quantize)                             \
  X(dequantize, Dequantize)                         \
  X(quantize_dynamic, QuantizeDynamic)              \
  X(fake_quantize, FakeQuantize)                    \
  X(fake_quantize_backward, FakeQuantizeBackward)   \
  X(dequant_matmul, DequantMatmul)                  \
  X(dequant_matmul_backward, DequantMatmulBackward) \
  X(scaled_matmul, ScaledMatmul)

#define QL_DECLARE(OP, PROBLEM) void OP(const PROBLEM&, ParallelFor);
namespace plain {
QL_KERNELS(QL_DECLARE)
}
namespace avx2 {
QL_KERNELS(QL_DECLARE)
}
namespace avx512 {
QL_KERNELS(QL_DECLARE)
}
namespace avx512_bf16 {
QL_KERNELS(QL_DECLARE)
}
#undef QL_DECLARE

}  // namespace quantlib
