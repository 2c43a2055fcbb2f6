// What serves an op that this was not linked with.
#pragma once
#include <stdexcept>

#include "cuda/kernels.h"

namespace quantlib {
namespace cuda {
#define ABSENT(OP, PROBLEM) \
  __attribute__((weak)) void OP(const PROBLEM&, Stream) { throw std::logic_error(#OP " is not here"); }
ABSENT(cast, Cast)
ABSENT(compute_scale, ComputeScale)
ABSENT(quantize, Quantize)
ABSENT(dequantize, Dequantize)
ABSENT(quantize_dynamic, QuantizeDynamic)
ABSENT(fake_quantize, FakeQuantize)
ABSENT(fake_quantize_backward, FakeQuantizeBackward)
ABSENT(dequant_matmul, DequantMatmul)
ABSENT(dequant_matmul_backward, DequantMatmulBackward)
ABSENT(scaled_matmul, ScaledMatmul)
#undef ABSENT
__attribute__((weak)) bool takes_slabs(const DequantMatmul&) { return false; }
__attribute__((weak)) bool takes_slabs(const DequantMatmulBackward&) { return false; }
__attribute__((weak)) const void* decode_slab(const DecodeSlab&, Stream) {
  throw std::logic_error("decode_slab is not here");
}
__attribute__((weak)) void finish_slab(const FinishSlab&, Stream) {}
}  // namespace cuda
}  // namespace quantlib
