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

// dequant_matmul and its gradient of many rows in parts: the vendor's product lies between the two, see slab.h.
struct DecodeSlab {
  Weight weight;
  bool tiled, scaled;          // whether values are times their scale
  Type type;                   // float16 or bfloat16
  int64_t n, n_end, k, k_end;  // rows and columns of the weight; n is a multiple of 16, k of 128, and 0 in tiles
  void* values;                // [n_end - n, k_end - k] of `type`
};
struct FinishSlab {
  int64_t M;
  const float* total;     // [M, end - first], the sums that become y[:, first .. end)
  const Weight* of_rows;  // whose scales, one a row, the sums lack; or null
  int64_t first, end, columns;
  Epilogue epilogue;
  Type type;
  void* y;  // [M, columns] of `type`
};
bool takes_slabs(const DequantMatmul&);
bool takes_slabs(const DequantMatmulBackward&);
const void* decode_slab(const DecodeSlab&, Stream);  // where the values are: the weight itself where it holds them
void finish_slab(const FinishSlab&, Stream);

}  // namespace cuda
}  // namespace quantlib
