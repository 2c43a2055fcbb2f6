// dequant_matmul and its gradient where x has many rows: see slab.cu.
#pragma once
#include "../ops/dequant_matmul.h"
#include "../ops/dequant_matmul_backward.h"
#include "kernels.h"

namespace quantlib {
namespace cuda {

bool takes_slabs(const DequantMatmul&);
bool takes_slabs(const DequantMatmulBackward&);
void multiply_slabs(const DequantMatmul&, Stream);
void multiply_slabs(const DequantMatmulBackward&, Stream);

}  // namespace cuda
}  // namespace quantlib
