// dx[m, k] = sum over n of dy[m, n] * w[n, k], w = dequantize(codes)
#include "matmul.cuh"

namespace quantlib {
namespace cuda {

void dequant_matmul_backward(const DequantMatmulBackward& p, Stream stream) {
  const Grid& g = p.weight.grid;
  product<true>("dequant_matmul_backward",
                {p.M, g.K, g.M, p.dy, p.dy_type, Values(p.weight), {nullptr, Activation::none}, p.dx, 0}, stream);
}

}  // namespace cuda
}  // namespace quantlib
