// scale[I, J] = clamp(max |x[i, j]| of block (I, J) / Q), or scale and zero_point of the block's range
#include "../ops/compute_scale.h"
#include "range.cuh"

namespace quantlib {
namespace cuda {
namespace {

constexpr int kUnroll = 4;           // chunks a thread has in flight
constexpr int kThreadBlocks = 1024;  // enough for every GPU, and the same on each

template <class X>
struct ScaleArgs {
  const Unit<X>* x;  // [M, K]
  Type format;
  float* scale;         // [M / br, K / bk]
  int32_t* zero_point;  // the same shape, or null
  BlockChunks chunks;
  Sharing sharing;
  bool vector;
};

template <bool AFFINE>
QL_DEVICE void write(float* scale, int32_t* zero_point, Type format, const Range<AFFINE>& range) {
  Affine s{0.0f, 0};
  switch (format) {
#define QL_CASE(NAME, ...)                                   \
  case Type::NAME:                                           \
    if constexpr (!AFFINE) s = range.template scale<NAME>(); \
    break;
    QL_FLOATS(QL_CASE)
#undef QL_CASE
#define QL_CASE(NAME, ...)            \
  case Type::NAME:                    \
    s = range.template scale<NAME>(); \
    break;
    QL_INTS(QL_CASE)
#undef QL_CASE
    default:
      break;
  }
  *scale = s.scale;
  if constexpr (AFFINE) *zero_point = s.zero_point;
}

// One block to `lanes` threads; a sliced one leaves its range in the place of its scale, for finish_kernel.
template <class X, bool AFFINE>
__global__ void __launch_bounds__(kThreads) compute_scale_kernel(const ScaleArgs<X> a) {
  constexpr int V = kElements<X>;
  const Lane my(a.sharing);
  const Block block(a.chunks, my.block);
  const int64_t step = a.sharing.lanes * a.sharing.slices;
  Range<AFFINE> range;
  for (int64_t c = my.slice * a.sharing.lanes + my.lane; c < a.chunks.per_block; c += step * kUnroll) {
    Vector<Unit<X>, V> x[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const auto [i, j, first, last] = block.at<V>(a.chunks, c + k * step);
      x[k] = load<V>(a.x + i * a.chunks.K + j, first, last, a.vector);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
#pragma unroll
      for (int e = 0; e < V; ++e) range.template add<X>(x[k][e]);
  }
  range = reduce(range.template widen<X>(), a.sharing.lanes);
  if (my.lane != 0 || my.block >= a.chunks.count) return;
  if (a.sharing.slices == 1) return write(a.scale + my.block, a.zero_point + my.block, a.format, range);
  atomicMax(reinterpret_cast<int32_t*>(a.scale + my.block), range.high);
  if constexpr (AFFINE) atomicMin(a.zero_point + my.block, range.low);
}

struct FinishArgs {
  Type format;
  float* scale;
  int32_t* zero_point;
  int64_t count;
};

template <bool AFFINE>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishArgs a) {
  const int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= a.count) return;
  const Range<AFFINE> range{int32_t(bits_of(a.scale[block])), AFFINE ? a.zero_point[block] : 0};
  write(a.scale + block, a.zero_point + block, a.format, range);
}

}  // namespace

void compute_scale(const ComputeScale& p, Stream stream) {
  visit_x(p.x_type, [&](auto x_row) {
    const auto run = [&](auto affine) {
      using X = decltype(x_row);
      constexpr bool AFFINE = affine.value;
      constexpr int V = kElements<X>;
      if (p.grid.M * p.grid.K == 0) return;
      const Grid g = collapse(p.grid);
      ScaleArgs<X> args{static_cast<const Unit<X>*>(p.x), p.format, p.scale, p.zero_point, BlockChunks(g, V), {},
                        is_vector(p.x, kWidth, g, V)};
      Sharing& s = args.sharing = share(args.chunks, kThreads, kUnroll);
      // A few large blocks: as many slices as keep a GPU busy, but none so small that it is not worth its start.
      const int64_t worth = args.chunks.per_block / (s.lanes * kUnroll), room = kThreadBlocks / args.chunks.count;
      s.slices = worth < room ? worth : room;
      if (s.slices <= 1) s.slices = 1;
      s.thread_blocks *= s.slices;
      if (s.slices > 1) {
        clear("compute_scale", p.scale, args.chunks.count, stream);
        if (AFFINE) clear("compute_scale", p.zero_point, args.chunks.count, stream);
      }
      launch("compute_scale", compute_scale_kernel<X, AFFINE>, s.thread_blocks, s.threads, stream, args);
      if (s.slices > 1) {
        const FinishArgs finish{p.format, p.scale, p.zero_point, args.chunks.count};
        launch("compute_scale", finish_kernel<AFFINE>, ceil_div(finish.count, kThreads), kThreads, stream, finish);
      }
    };
    return p.zero_point ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace cuda
}  // namespace quantlib
