// scale[I, J] = range of block (I, J) of x; codes[i, j] = encode(x[i, j] / scale[i / br, j / bk]): x is read once
#include "../ops/compute_scale.h"
#include "../ops/quantize.h"
#include "../ops/quantize_dynamic.h"
#include "range.cuh"

namespace quantlib {
namespace cuda {

void compute_scale(const ComputeScale&, Stream);
void quantize(const Quantize&, Stream);

namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostChunks = 4;  // of x in a thread's registers

template <class X, class F>
struct DynamicArgs {
  const Unit<X>* x;     // [M, K]
  Unit<F>* codes;       // [M, K], or [M, ceil(K / 2)] bytes
  float* scale;         // [M / br, K / bk]
  int32_t* zero_point;  // the same shape, or null
  BlockChunks chunks;
  Sharing sharing;
  bool vector_x, vector_codes;
};

template <class X, class F, bool AFFINE, int CHUNKS>
__global__ void __launch_bounds__(CHUNKS == 1 ? kThreads : kMostThreads)
    quantize_dynamic_kernel(const DynamicArgs<X, F> a) {
  constexpr int V = kElements<X>;
  const Lane my(a.sharing);
  const Block block(a.chunks, my.block);
  Vector<Unit<X>, V> x[CHUNKS];
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    const auto [i, j, first, last] = block.at<V>(a.chunks, my.lane + k * a.sharing.lanes);
    x[k] = load<V>(a.x + i * a.chunks.K + j, first, last, a.vector_x);
  }
  Range<AFFINE> range;
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k)
#pragma unroll
    for (int e = 0; e < V; ++e) range.template add<X>(x[k][e]);
  const Affine s = reduce(range.template widen<X>(), a.sharing.lanes).template scale<F>();
  if (my.lane == 0 && my.block < a.chunks.count) {
    a.scale[my.block] = s.scale;
    if constexpr (AFFINE) a.zero_point[my.block] = s.zero_point;
  }
  const Encoder<F, AFFINE> encode(s.scale, s.zero_point);
#pragma unroll
  for (int k = 0; k < CHUNKS; ++k) {
    const auto [i, j, first, last] = block.at<V>(a.chunks, my.lane + k * a.sharing.lanes);
    uint32_t codes[V];
#pragma unroll
    for (int e = 0; e < V; ++e) codes[e] = encode(decode<X>(x[k][e]));
    if (first < last) store_codes<F>(a.codes + offset<F>(a.chunks.K, i, j), codes, first, last, a.vector_codes);
  }
}

}  // namespace

void quantize_dynamic(const QuantizeDynamic& p, Stream stream) {
  visit_x(p.x_type, [&](auto x_row) {
    visit_format(p.format, p.zero_point, [&](auto row, auto affine) {
      using X = decltype(x_row);
      using F = decltype(row);
      constexpr int V = kElements<X>;
      if (p.grid.M * p.grid.K == 0) return;
      const Grid g = collapse(p.grid, F::per_byte);
      const BlockChunks chunks(g, V);
      // Too large for registers, or blocks that share a byte: the scale first, then the codes.
      if (chunks.per_block > kMostThreads * kMostChunks || (g.bk % F::per_byte && g.bk < g.K)) {
        compute_scale({p.grid, p.x, p.x_type, p.format, p.scale, p.zero_point}, stream);
        return quantize({p.grid, p.x, p.x_type, p.format, p.scale, p.zero_point, p.codes}, stream);
      }
      const Sharing sharing = share(chunks, kMostThreads, kMostChunks);
      const DynamicArgs<X, F> args{static_cast<const Unit<X>*>(p.x),
                                   static_cast<Unit<F>*>(p.codes),
                                   p.scale,
                                   p.zero_point,
                                   chunks,
                                   sharing,
                                   is_vector(p.x, kWidth, g, V),
                                   is_vector(p.codes, int(bytes_of<F>(V)), g, V)};
      const auto kernel = sharing.lanes <= 32 ? quantize_dynamic_kernel<X, F, affine.value, 1>
                                              : quantize_dynamic_kernel<X, F, affine.value, kMostChunks>;
      launch("quantize_dynamic", kernel, sharing.thread_blocks, sharing.threads, stream, args);
    });
  });
}

}  // namespace cuda
}  // namespace quantlib
