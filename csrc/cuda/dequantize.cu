// y[i, j] = decode(codes[i, j]) * scale[i / br, j / bk]
#include "../ops/dequantize.h"
#include "vector.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kUnroll = 2;  // chunks a thread has in flight

template <class F, class Y>
struct DequantizeArgs {
  const Unit<F>* codes;       // [M, K], or [M, ceil(K / 2)] bytes
  const float* scale;         // [M / br, K / bk]
  const int32_t* zero_point;  // the same shape, or null
  Unit<Y>* y;                 // [M, K]
  Blocks blocks;
  Chunks chunks;
  bool vector_codes, vector_y;
};

template <class F, class Y, bool AFFINE>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeArgs<F, Y> a) {
  constexpr int V = kElements<Y>, P = kPerUnit<F>;
  Chunk at[kUnroll];
  Vector<Unit<F>, V / P> codes[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    at[k] = a.chunks.template at<V>((int64_t(blockIdx.x) * kUnroll + k) * kThreads + threadIdx.x);
    codes[k] =
        load<V / P>(a.codes + offset<F>(a.blocks.K, at[k].i, at[k].j), 0, (at[k].last + P - 1) / P, a.vector_codes);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const auto [i, j, first, last] = at[k];
    uint32_t y[V] = {};
    for (Run run(a.blocks, i, j); run.first < last; run.next(a.blocks)) {
      const Decoder<F, AFFINE> decode(a.scale[run.block], AFFINE ? a.zero_point[run.block] : 0);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const uint32_t value = encode<Y>(decode(code_at<F>(codes[k], e)), false);
        y[e] = e < run.first ? y[e] : value;  // past the run's end the next one overwrites it
      }
    }
    store_codes<Y>(a.y + i * a.blocks.K + j, y, 0, last, a.vector_y);
  }
}

}  // namespace

void dequantize(const Dequantize& p, Stream stream) {
  visit_x(p.y_type, [&](auto y_row) {
    visit_format(p.format, p.zero_point, [&](auto row, auto affine) {
      using Y = decltype(y_row);
      using F = decltype(row);
      constexpr int V = kElements<Y>;
      if (p.grid.M * p.grid.K == 0) return;
      const Grid g = collapse(p.grid, F::per_byte);
      const DequantizeArgs<F, Y> args{static_cast<const Unit<F>*>(p.codes),
                                      p.scale,
                                      p.zero_point,
                                      static_cast<Unit<Y>*>(p.y),
                                      Blocks(g),
                                      Chunks(g, V),
                                      is_vector(p.codes, int(bytes_of<F>(V)), g, V),
                                      is_vector(p.y, kWidth, g, V)};
      launch("dequantize", dequantize_kernel<F, Y, affine.value>, ceil_div(args.chunks.count, kThreads * kUnroll),
             kThreads, stream, args);
    });
  });
}

}  // namespace cuda
}  // namespace quantlib
