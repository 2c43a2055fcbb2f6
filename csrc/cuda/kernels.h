// The ops of this folder: each puts its kernels on `stream` and returns. Nothing allocates and nothing waits, so a call
// can be captured in a CUDA graph. Neither torch nor the CUDA runtime is needed to read this.
#pragma once
#include "../problem.h"

struct CUstream_st;  // what cudaStream_t points to

namespace quantlib {
namespace cuda {

using Stream = CUstream_st*;

void cast(const Cast&, Stream);
void compute_scale(const ComputeScale&, Stream);
void quantize(const Quantize&, Stream);
void dequantize(const Dequantize&, Stream);
void quantize_dynamic(const QuantizeDynamic&, Stream);
void fake_quantize(const FakeQuantize&, Stream);
void fake_quantize_backward(const FakeQuantizeBackward&, Stream);
void dequant_matmul(const DequantMatmul&, Stream);
void dequant_matmul_backward(const DequantMatmulBackward&, Stream);
void scaled_matmul(const ScaledMatmul&, Stream);

}  // namespace cuda
}  // namespace quantlib
