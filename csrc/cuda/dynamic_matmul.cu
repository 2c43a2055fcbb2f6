// x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)
#include "../ops/dynamic_matmul.h"
#include "../ops/quantize_dynamic.h"
#include "../ops/scaled_matmul.h"
#include "launch.cuh"

namespace quantlib {
namespace cuda {

void quantize_dynamic(const QuantizeDynamic&, Stream);
void scaled_matmul(const ScaledMatmul&, Stream);

void dynamic_matmul(const DynamicMatmul& p, Stream stream) {
  const int64_t M = p.M, K = p.weight.grid.K;
  if (K) quantize_dynamic({{M, K, 1, K}, p.x, p.x_type, Type::int8, p.x_codes, p.x_scale, nullptr}, stream);
  else clear("dynamic_matmul", p.x_scale, M, stream);  // any finite scale will do
  scaled_matmul({M, p.x_codes, Type::int8, p.x_scale, nullptr, true, p.weight, p.epilogue, p.y, p.x_type}, stream);
}

}  // namespace cuda
}  // namespace quantlib
