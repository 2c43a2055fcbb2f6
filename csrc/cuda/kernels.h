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

// dequant_matmul of many rows of x in parts: the vendor's product lies between the two, see slab.h.
bool takes_slabs(const DequantMatmul&);
// Rows [first, end) of the weight in x's type; the first is at the address that it gives, mostly `slab`. `first` is a
// multiple of 16.
const void* decode_slab(const DequantMatmul&, int64_t first, int64_t end, void* slab, Stream);
// y[:, first .. end) of total [M, end - first], the sums
void finish_slab(const DequantMatmul&, int64_t first, int64_t end, const float* total, Stream);

}  // namespace cuda
}  // namespace quantlib
