// dx[m, k] = sum over n of dy[m, n] * w[n, k], w = dequantize(codes)
#include "matmul.cuh"
#include "slab.h"

namespace quantlib {
namespace cuda {

void dequant_matmul_backward(const DequantMatmulBackward& p, Stream stream) {
  if (takes_slabs(p)) return multiply_slabs(p, stream);
  const Grid& g = p.weight.grid;
  product<true>("dequant_matmul_backward",
                {p.M, g.K, g.M, p.dy, p.dy_type, Values(p.weight), {nullptr, Activation::none}, p.dx, 0}, stream);
}

}  // namespace cuda
}  // namespace quantlib
