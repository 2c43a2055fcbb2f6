// y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), e the expert that row t belongs to
//
// One launch of the kernels that dequant_matmul has for rows that do not depend on each other: a thread block finds out
// from the offsets whose rows it takes.
#include "../ops/grouped_dequant_matmul.h"
#include "dequant_rows.cuh"
#include "groups.cuh"

namespace quantlib {
namespace cuda {
namespace {

template <class Args>
struct GroupedArgs {
  Args first;  // of all rows of x, with the weight and the bias of expert 0
  Groups groups;
  int64_t slots, expert_bytes, expert_blocks;  // of the codes and scales of an expert
};

template <class F, class X>
__global__ void __launch_bounds__(32 * kMostWarps<F, false>, 1)
    grouped_dequant_matmul_kernel(const GroupedArgs<DecodeArgs<X>> g) {
  DecodeArgs<X> a = g.first;
  const int64_t n0 = blockIdx.x / g.slots * kBandRows;
  const Part part = part_of(g.groups, blockIdx.x % g.slots, kBatch);
  a.M = part.end - part.start;
  Unit<X>* y = static_cast<Unit<X>*>(a.y) + part.start * a.N;
  if (part.e == g.groups.E) return clear_part(y, a.M, a.N, part.m0, n0, kBatch, kBandRows);
  a.y = y;
  a.x += part.start * a.K;
  a.codes += part.e * g.expert_bytes;
  a.scale += part.e * g.expert_blocks;
  if (a.zero_point) a.zero_point += part.e * g.expert_blocks;
  if (a.epilogue.bias) a.epilogue.bias += part.e * a.N;
  multiply_band<F, X, false>(a, n0, part.m0);
}

__global__ void __launch_bounds__(kThreads) grouped_product_kernel(const GroupedArgs<ProductArgs> g) {
  ProductArgs a = g.first;
  const int64_t j0 = blockIdx.x / g.slots * kSide;
  const Part part = part_of(g.groups, blockIdx.x % g.slots, kSide);
  const bool wide = a.type == Type::float32;
  const int64_t start = part.start, size = wide ? 4 : 2;
  a.I = part.end - part.start;
  a.out = static_cast<char*>(a.out) + start * a.J * size;
  if (part.e == g.groups.E)
    return wide ? clear_part(static_cast<uint32_t*>(a.out), a.I, a.J, part.m0, j0, kSide, kSide)
                : clear_part(static_cast<uint16_t*>(a.out), a.I, a.J, part.m0, j0, kSide, kSide);
  a.left = static_cast<const char*>(a.left) + start * a.L * size;
  a.w.weight.codes = static_cast<const char*>(a.w.weight.codes) + part.e * g.expert_bytes;
  a.w.weight.scale += part.e * g.expert_blocks;
  if (a.w.weight.zero_point) a.w.weight.zero_point += part.e * g.expert_blocks;
  if (a.epilogue.bias) a.epilogue.bias += part.e * a.J;
  multiply_square<false>(a, part.m0, j0);
}

template <class Args>
void run(void (*kernel)(GroupedArgs<Args>), const Args& first, const GroupedDequantMatmul& p, int rows, int64_t across,
         int threads, Stream stream) {
  const Weight& w = p.first.weight;
  const GroupedArgs<Args> a{first, p.groups, slots_of(p.groups, rows), w.grid.M * row_bytes(row_of(w.format), w.grid.K),
                            w.grid.scale_rows() * w.grid.scale_cols()};
  launch("grouped_dequant_matmul", kernel, a.slots * across, threads, stream, a);
}

template <class X>
void multiply(const GroupedDequantMatmul& p, Stream stream) {
  visit_operand<X>(p.first.weight.format, [&](auto f, const Row& format) {
    using F = decltype(f);
    const auto a = decode_args<F, X, false>(p.first, format, 0);
    run(grouped_dequant_matmul_kernel<F, X>, a, p, kBatch, ceil_div(a.N, kBandRows), 32 * a.warps, stream);
  });
}

}  // namespace

void grouped_dequant_matmul(const GroupedDequantMatmul& p, Stream stream) {
  const DequantMatmul& f = p.first;
  if (has_operands(f)) return f.x_type == Type::float16 ? multiply<float16>(p, stream) : multiply<bfloat16>(p, stream);
  const Grid& g = f.weight.grid;
  const ProductArgs a{f.M, g.M, g.K, f.x, f.x_type, Values(f.weight), f.epilogue, f.y, 0};
  run(grouped_product_kernel, a, p, kSide, ceil_div(g.M, kSide), kThreads, stream);
}

}  // namespace cuda
}  // namespace quantlib
