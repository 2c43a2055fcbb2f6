// What serves an op that this was not linked with.
#pragma once
#include <stdexcept>

#include "cuda/slab.h"
#include "ops/adamw_step.h"
#include "ops/cast.h"
#include "ops/compute_scale.h"
#include "ops/dequantize.h"
#include "ops/dynamic_matmul.h"
#include "ops/fake_quantize.h"
#include "ops/fake_quantize_backward.h"
#include "ops/grouped_dequant_matmul.h"
#include "ops/quantize.h"
#include "ops/quantize_dynamic.h"
#include "ops/scaled_matmul.h"

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
ABSENT(dynamic_matmul, DynamicMatmul)
ABSENT(grouped_dequant_matmul, GroupedDequantMatmul)
ABSENT(adamw_step, AdamwStep)
#undef ABSENT
__attribute__((weak)) bool takes_slabs(const DequantMatmul&) { return false; }
__attribute__((weak)) bool takes_slabs(const DequantMatmulBackward&) { return false; }
__attribute__((weak)) void multiply_slabs(const DequantMatmul&, Stream) {}
__attribute__((weak)) void multiply_slabs(const DequantMatmulBackward&, Stream) {}
}  // namespace cuda
}  // namespace quantlib
