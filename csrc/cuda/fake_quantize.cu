// y[i, j] = c[i, j] * scale[i // br, j // bk], c the value of x's code in units of the scale
#include "../ops/fake_quantize.h"
#include "fake_quantize.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kUnroll = 2;  // chunks a thread has in flight

template <class X>
struct FakeQuantizeArgs {
  const Unit<X>* x;  // [M, K]
  Scales scales;
  Unit<X>* y;  // [M, K]
  Blocks blocks;
  Chunks chunks;
  bool vector_x, vector_y;
};

template <class X, class F, bool AFFINE>
__global__ void __launch_bounds__(kThreads) fake_quantize_kernel(const FakeQuantizeArgs<X> a) {
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
    uint32_t y[V] = {};
    for (Run run(a.blocks, i, j); run.first < last; run.next(a.blocks)) {
      const Shared<float> of = a.scales.template at<AFFINE>(run.block);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const uint32_t unit = encode<X>(fake_quantized<F>(decode<X>(x[k][e]), of, a.scales.q), false);
        y[e] = e < run.first ? y[e] : unit;  // past the run's end the next one overwrites it
      }
    }
    store_codes<X>(a.y + i * a.blocks.K + j, y, 0, last, a.vector_y);
  }
}

}  // namespace

void fake_quantize(const FakeQuantize& p, Stream stream) {
  visit_x(p.x_type, [&](auto x_row) {
    visit_codes(p.format, p.zero_point, [&](auto row, auto affine) {
      using X = decltype(x_row);
      constexpr int V = kElements<X>;
      if (p.grid.M * p.grid.K == 0) return;
      const Grid g = collapse(p.grid);
      const FakeQuantizeArgs<X> args{static_cast<const Unit<X>*>(p.x),
                                     Scales(p),
                                     static_cast<Unit<X>*>(p.y),
                                     Blocks(g),
                                     Chunks(g, V),
                                     is_vector(p.x, kWidth, g, V),
                                     is_vector(p.y, kWidth, g, V)};
      launch("fake_quantize", fake_quantize_kernel<X, decltype(row), affine.value>,
             ceil_div(args.chunks.count, kThreads * kUnroll), kThreads, stream, args);
    });
  });
}

}  // namespace cuda
}  // namespace quantlib
