// dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? c - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)
#include "../ops/fake_quantize_backward.h"
#include "fake_quantize.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kUnroll = 2;  // chunks of x and of dy that a thread has in flight

// The gradients of one scale and one zero point, or a part of them.
struct Sums {
  float scale = 0.0f, zero_point = 0.0f;

  QL_DEVICE void merge(const Sums& other) {
    scale = add(scale, other.scale);
    zero_point = add(zero_point, other.zero_point);
  }
  // Add the sums of neighbouring lanes, a power of two of them, in the order of a tree; each lane gets the result.
  QL_DEVICE void merge_lanes(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      merge({shuffled(scale, distance), shuffled(zero_point, distance)});
  }

 private:
  QL_DEVICE static float shuffled(float sum, int distance) {
    return float_of(uint32_t(__shfl_xor_sync(0xffffffffu, int32_t(bits_of(sum)), distance)));
  }
};

struct Results {
  float *dscale, *dzero_point;  // [M / br, K / bk]; the latter, or null
  float factor;

  QL_DEVICE void write(int64_t block, const Sums& sums) const {
    dscale[block] = canonical(mul(sums.scale, factor));
    if (dzero_point) dzero_point[block] = canonical(mul(sums.zero_point, factor));
  }
};

template <class X>
struct BackwardArgs {
  const Unit<X>*dy, *x;  // [M, K]
  Scales scales;
  Unit<X>* dx;  // [M, K]
  Results results;
  float* partial;  // [2, blocks, slices]
  BlockChunks chunks;
  Sharing sharing;
  bool vector;
};

// The sums of all that `lanes` neighbouring threads added, told to each of them. At most once a kernel.
QL_DEVICE Sums reduce(Sums sums, int lanes) {
  sums.merge_lanes(lanes < 32 ? lanes : 32);
  if (lanes <= 32) return sums;
  __shared__ float scale[32], zero_point[32];  // of each warp
  if (threadIdx.x % 32 == 0) {
    scale[threadIdx.x / 32] = sums.scale;
    zero_point[threadIdx.x / 32] = sums.zero_point;
  }
  __syncthreads();
  Sums all;
  for (int warp = 0; warp < lanes / 32; ++warp) all.merge({scale[warp], zero_point[warp]});
  return all;
}

// One block to `lanes` threads, or to as many slices of it; those leave their part for finish_kernel.
template <class X, class F, bool AFFINE, bool LSQ>
__global__ void __launch_bounds__(kThreads) fake_quantize_backward_kernel(const BackwardArgs<X> a) {
  constexpr int V = kElements<X>;
  const Lane my(a.sharing);
  const Block block(a.chunks, my.block);
  const bool exists = my.block < a.chunks.count;
  const Shared<float> of = a.scales.template at<AFFINE, true>(exists ? my.block : 0);
  const int64_t step = a.sharing.lanes * a.sharing.slices;
  Sums sums;
  for (int64_t c = my.slice * a.sharing.lanes + my.lane; c < a.chunks.per_block; c += step * kUnroll) {
    Vector<Unit<X>, V> dy[kUnroll], x[kUnroll];
    Chunk at[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      at[k] = block.at<V>(a.chunks, c + k * step);
      const int64_t first = at[k].i * a.chunks.K + at[k].j;
      dy[k] = load<V>(a.dy + first, at[k].first, at[k].last, a.vector);
      x[k] = load<V>(a.x + first, at[k].first, at[k].last, a.vector);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      auto dx = Vector<Unit<X>, V>::zero();
#pragma unroll
      for (int e = 0; e < V; ++e) {  // outside of the block x and dy are zero, and so is what they add
        const Gradients<float> g = gradients<F, LSQ>(decode<X>(dy[k][e]), decode<X>(x[k][e]), of, a.scales.q);
        dx.put(e, g.inside ? dy[k][e] : 0);
        sums.scale = add(sums.scale, g.scale);
        if constexpr (AFFINE) sums.zero_point = add(sums.zero_point, g.zero_point);
      }
      store(a.dx + at[k].i * a.chunks.K + at[k].j, dx, at[k].first, at[k].last, a.vector);
    }
  }
  sums = reduce(sums, a.sharing.lanes);
  if (my.lane != 0 || !exists) return;
  if (a.sharing.slices == 1) return a.results.write(my.block, sums);
  float* part = a.partial + my.block * a.sharing.slices + my.slice;
  part[0] = sums.scale;
  part[a.chunks.count * a.sharing.slices] = sums.zero_point;
}

struct FinishArgs {
  const float* partial;  // [2, count, slices]
  Results results;
  int64_t count, slices;
};

// The parts of one block to one warp.
__global__ void __launch_bounds__(32) finish_kernel(const FinishArgs a) {
  const int64_t block = blockIdx.x;
  const float* part = a.partial + block * a.slices;
  Sums sums;
  for (int64_t slice = threadIdx.x; slice < a.slices; slice += 32)
    sums.merge({part[slice], part[a.count * a.slices + slice]});
  sums.merge_lanes(32);
  if (threadIdx.x == 0) a.results.write(block, sums);
}

}  // namespace

void fake_quantize_backward(const FakeQuantizeBackward& p, Stream stream) {
  const char* op = "fake_quantize_backward";
  visit_x(p.x_type, [&](auto x_row) {
    visit_codes(p.format, p.zero_point, [&](auto row, auto affine) {
      using X = decltype(x_row);
      using F = decltype(row);
      constexpr int V = kElements<X>;
      constexpr bool AFFINE = affine.value;
      if (p.grid.M * p.grid.K == 0) return;
      const Grid g = collapse(p.grid);
      BackwardArgs<X> args{static_cast<const Unit<X>*>(p.dy),
                           static_cast<const Unit<X>*>(p.x),
                           Scales(p),
                           static_cast<Unit<X>*>(p.dx),
                           {p.dscale, p.dzero_point, p.grad_factor},
                           p.partial,
                           BlockChunks(g, V),
                           {},
                           is_vector(p.x, kWidth, g, V) && is_aligned(p.dy, kWidth) && is_aligned(p.dx, kWidth)};
      Sharing& s = args.sharing = share(args.chunks, kThreads, kUnroll);
      // A few large blocks: slices, but none so small that it is not worth its start. Their number is of no device.
      const int64_t worth = args.chunks.per_block / (s.lanes * kUnroll), room = kPartials / args.chunks.count;
      s.slices = worth < room ? worth : room;
      if (s.slices <= 1) s.slices = 1;
      s.thread_blocks *= s.slices;
      const auto kernel = p.lsq_mask ? fake_quantize_backward_kernel<X, F, AFFINE, true>
                                     : fake_quantize_backward_kernel<X, F, AFFINE, false>;
      launch(op, kernel, s.thread_blocks, s.threads, stream, args);
      if (s.slices == 1) return;
      const FinishArgs finish{p.partial, args.results, args.chunks.count, s.slices};
      launch(op, finish_kernel, finish.count, 32, stream, finish);
    });
  });
}

}  // namespace cuda
}  // namespace quantlib
