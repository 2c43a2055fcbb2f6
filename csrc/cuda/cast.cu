// y[i] = encode(decode(x[i]))
#include "../ops/cast.h"
#include "vector.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kUnroll = 2;  // chunks a thread has in flight

template <class X, class Y>
struct CastArgs {
  const Unit<X>* x;  // [n]
  Unit<Y>* y;        // [n]
  Chunks chunks;
  bool vector, saturate;
};

template <class X, class Y>
constexpr int kCastElements = X::bits > Y::bits ? kElements<X> : kElements<Y>;

template <class X, class Y>
__global__ void __launch_bounds__(kThreads) cast_kernel(const CastArgs<X, Y> a) {
  constexpr int V = kCastElements<X, Y>;
  Chunk at[kUnroll];
  Vector<Unit<X>, V> x[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    at[k] = a.chunks.template at<V>((int64_t(blockIdx.x) * kUnroll + k) * kThreads + threadIdx.x);
    x[k] = load<V>(a.x + at[k].j, at[k].first, at[k].last, a.vector);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    uint32_t y[V];
#pragma unroll
    for (int e = 0; e < V; ++e) y[e] = encode<Y>(decode<X>(x[k][e]), a.saturate);
    store_codes<Y>(a.y + at[k].j, y, at[k].first, at[k].last, a.vector);
  }
}

}  // namespace

void cast(const Cast& p, Stream stream) {
  visit_float(p.x_type, [&](auto x_row) {
    visit_float(p.y_type, [&](auto y_row) {
      using X = decltype(x_row);
      using Y = decltype(y_row);
      constexpr int V = kCastElements<X, Y>;
      if (p.n == 0) return;
      const Grid line{1, p.n, 1, p.n};
      const bool vector = is_vector(p.x, V * sizeof(Unit<X>), line, V) && is_vector(p.y, V * sizeof(Unit<Y>), line, V);
      const CastArgs<X, Y> args{static_cast<const Unit<X>*>(p.x), static_cast<Unit<Y>*>(p.y), Chunks(line, V), vector,
                                p.saturate};
      launch("cast", cast_kernel<X, Y>, ceil_div(args.chunks.count, kThreads * kUnroll), kThreads, stream, args);
    });
  });
}

}  // namespace cuda
}  // namespace quantlib
