// codes[i, j] = encode(x[i, j] / scale[i / br, j / bk])
#include "../ops/quantize.h"
#include "vector.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kUnroll = 2;  // chunks a thread has in flight

template <class X, class F>
struct QuantizeArgs {
  const Unit<X>* x;           // [M, K]
  const float* scale;         // [M / br, K / bk]
  const int32_t* zero_point;  // the same shape, or null
  Unit<F>* codes;             // [M, K], or [M, ceil(K / 2)] bytes
  Blocks blocks;
  Chunks chunks;
  bool vector_x, vector_codes;
};

template <class X, class F, bool AFFINE>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const QuantizeArgs<X, F> a) {
  constexpr int V = kElements<X>;
  Chunk at[kUnroll];
  Vector<Unit<X>, V> x[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    at[k] = a.chunks.template at<V>((int64_t(blockIdx.x) * kUnroll + k) * kThreads + threadIdx.x);
    x[k] = load<V>(a.x + at[k].i * a.blocks.K + at[k].j, 0, at[k].last, a.vector_x);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const auto [i, j, first, last] = at[k];
    uint32_t codes[V] = {};
    for (Run run(a.blocks, i, j); run.first < last; run.next(a.blocks)) {
      const Encoder<F, AFFINE> encode(a.scale[run.block], AFFINE ? a.zero_point[run.block] : 0);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const uint32_t code = encode(decode<X>(x[k][e]));
        codes[e] = e < run.first ? codes[e] : code;  // past the run's end the next one overwrites it
      }
    }
    store_codes<F>(a.codes + offset<F>(a.blocks.K, i, j), codes, 0, last, a.vector_codes);
  }
}

}  // namespace

void quantize(const Quantize& p, Stream stream) {
  visit_x(p.x_type, [&](auto x_row) {
    visit_format(p.format, p.zero_point, [&](auto row, auto affine) {
      using X = decltype(x_row);
      using F = decltype(row);
      constexpr int V = kElements<X>;
      if (p.grid.M * p.grid.K == 0) return;
      const Grid g = collapse(p.grid, F::per_byte);
      const QuantizeArgs<X, F> args{static_cast<const Unit<X>*>(p.x),
                                    p.scale,
                                    p.zero_point,
                                    static_cast<Unit<F>*>(p.codes),
                                    Blocks(g),
                                    Chunks(g, V),
                                    is_vector(p.x, kWidth, g, V),
                                    is_vector(p.codes, int(bytes_of<F>(V)), g, V)};
      launch("quantize", quantize_kernel<X, F, affine.value>, ceil_div(args.chunks.count, kThreads * kUnroll), kThreads,
             stream, args);
    });
  });
}

}  // namespace cuda
}  // namespace quantlib
