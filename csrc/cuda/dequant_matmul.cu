// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = dequantize(codes)
#include "dequant_rows.cuh"
#include "slab.h"

namespace quantlib {
namespace cuda {
namespace {

template <class F, class X, bool TILED>
__global__ void __launch_bounds__(32 * kMostWarps<F, TILED>, 1) dequant_matmul_kernel(const DecodeArgs<X> a) {
  multiply_band<F, X, TILED>(a, blockIdx.x / unsigned(a.chunks) * int64_t(kBandRows),
                             blockIdx.x % unsigned(a.chunks) * kBatch);
}

template <class F, class X, bool TILED>
void run(const DequantMatmul& p, const Row& format, Stream stream) {
  const auto a = decode_args<F, X, TILED>(p, format, ceil_div(p.M, kBatch));
  const auto kernel = dequant_matmul_kernel<F, X, TILED>;
  launch("dequant_matmul", kernel, ceil_div(a.N, kBandRows) * a.chunks, 32 * a.warps, stream, a);
}

template <class X>
void multiply(const DequantMatmul& p, Stream stream) {
  visit_operand<X>(p.weight.format, [&](auto f, const Row& format) {
    using F = decltype(f);
    p.tiled ? run<F, X, true>(p, format, stream) : run<F, X, false>(p, format, stream);
  });
}

// The way to multiply: the vendor's product of slabs of a decoded weight, the kernel above, or ordinary cores.
enum class Way { slabs, operands, values };

Way choose(const DequantMatmul& p) {
  if (takes_slabs(p)) return Way::slabs;
  return has_operands(p) ? Way::operands : Way::values;
}

}  // namespace

void dequant_matmul(const DequantMatmul& p, Stream stream) {
  switch (choose(p)) {
    case Way::slabs:
      return multiply_slabs(p, stream);
    case Way::operands:
      return p.x_type == Type::float16 ? multiply<float16>(p, stream) : multiply<bfloat16>(p, stream);
    case Way::values:
      const Values w(p.weight, p.tiled);
      const Grid& g = p.weight.grid;
      return product<false>("dequant_matmul", {p.M, g.M, g.K, p.x, p.x_type, w, p.epilogue, p.y, 0}, stream);
  }
}

}  // namespace cuda
}  // namespace quantlib
