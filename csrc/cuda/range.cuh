// The range of a block, found by the lanes that share it: integer maxima, exact in any order (C4).
#pragma once
#include "vector.cuh"

namespace quantlib {
namespace cuda {

// The chunks of each block of a matrix. A block's first chunk may begin before it and its last end behind it.
struct BlockChunks {
  int64_t M, K, br, bk, count;  // count: of blocks
  Divisor columns, per_row;     // blocks a row of blocks; chunks a row of a block
  int64_t per_block;

  BlockChunks(const Grid& g, int V)
      : M(g.M),
        K(g.K),
        br(g.br),
        bk(g.bk),
        count(g.scale_rows() * g.scale_cols()),
        columns(g.scale_cols()),
        per_row(ceil_div(g.bk % V == 0 || g.bk == g.K ? g.bk : g.bk + V - 1, V)),
        per_block(per_row.d * g.br) {}
};

// Rows [top, bottom) and columns [left, right) of a matrix.
struct Block {
  int64_t top, bottom, left, right;

  QL_DEVICE Block(const BlockChunks& b, int64_t index) {
    const int64_t I = b.M == 1 ? 0 : b.columns.divide(index), J = index - I * b.columns.d;
    top = I * b.br, bottom = top + b.br < b.M ? top + b.br : b.M;
    left = J * b.bk, right = left + b.bk < b.K ? left + b.bk : b.K;
    if (index >= b.count) bottom = top;  // nothing
  }
  template <int V>
  QL_DEVICE Chunk at(const BlockChunks& b, int64_t c) const {
    const int64_t r = b.br == 1 ? 0 : b.per_row.divide(c);
    const int64_t i = top + r, j = left / V * V + (c - r * b.per_row.d) * V;
    const bool inside = i < bottom && j < right && c < b.per_block;
    return {i, j, left > j ? int(left - j) : 0, !inside ? 0 : right - j < V ? int(right - j) : V};
  }
};

// Threads share blocks: `lanes` of them (a power of two) have a block, or one of `slices` of a large one.
struct Sharing {
  int lanes, threads;
  int64_t slices, thread_blocks;
};

// A lane that holds `chunks` of a block in registers, if so many are enough; as many as it takes otherwise.
inline Sharing share(const BlockChunks& b, int most_threads, int chunks) {
  int lanes = 1;
  while (lanes < 32 && lanes < b.per_block) lanes *= 2;
  if (b.per_block <= 32) return {lanes, kThreads, 1, ceil_div(b.count, kThreads / lanes)};
  for (lanes = 64; lanes < most_threads && int64_t(lanes) * chunks < b.per_block;) lanes *= 2;
  return {lanes, lanes, 1, b.count};
}

struct Lane {
  int64_t block, slice;
  int lane;

  QL_DEVICE Lane(const Sharing& s) : slice(0), lane(int(threadIdx.x) & (s.lanes - 1)) {
    block = int64_t(blockIdx.x) * (s.threads / s.lanes) + int(threadIdx.x) / s.lanes;
    if (s.slices > 1) {
      slice = blockIdx.x % unsigned(s.slices);
      block = blockIdx.x / unsigned(s.slices);
    }
  }
};

// The sign-extended bits of an X <-> an integer that orders like its value.
template <class X>
QL_DEVICE int32_t ordered(int32_t bits) {
  return bits ^ ((bits >> 31) & int32_t((1u << (X::bits - 1)) - 1));
}

// Extremes of a block, as integers that order like the values, NaN above all: magnitudes, and `low` unused, where there
// is no zero point. Zero is in every range, so this is also the range of nothing.
template <bool AFFINE>
struct Range {
  int32_t high = 0, low = 0;

  template <class X>
  QL_DEVICE void add(uint32_t unit) {
    constexpr int32_t largest = int32_t((1u << (X::bits - 1)) - 1);
    const int32_t a = int32_t(unit) & largest;
    const int32_t bits = int32_t(unit << (32 - X::bits)) >> (32 - X::bits);
    const int32_t value = is_nan<X>(a) ? largest : ordered<X>(bits);
    if constexpr (AFFINE) merge({value, value});
    else merge({a, 0});
  }
  QL_DEVICE void merge(const Range& other) {
    high = other.high > high ? other.high : high;
    if constexpr (AFFINE) low = other.low < low ? other.low : low;
  }
  QL_DEVICE Range shuffle(int distance) const {
    Range other;
    other.high = __shfl_xor_sync(0xffffffffu, high, distance);
    if constexpr (AFFINE) other.low = __shfl_xor_sync(0xffffffffu, low, distance);
    return other;
  }
  // A range of X as one of float32: its two ends are decoded, not every element.
  template <class X>
  QL_DEVICE Range widen() const {
    const auto wide = [](int32_t v) { return ordered<float32>(int32_t(bits_of(decode<X>(Unit<X>(ordered<X>(v)))))); };
    return {wide(high), wide(low)};
  }
  // The scale of format F for a range of float32, and the zero point where there is one.
  template <class F>
  QL_DEVICE Affine scale() const {
    const float highest = float_of(uint32_t(high)), lowest = float_of(uint32_t(ordered<float32>(low)));
    if constexpr (AFFINE) return affine_scale<F>(is_nan<float32>(high) ? highest : lowest, highest);
    else return {symmetric_scale<F>(uint32_t(high)), 0};
  }

 private:
  template <class X>
  QL_DEVICE static bool is_nan(int32_t magnitude) {
    if constexpr (X::bits == 32) return magnitude > int32_t(kInfinity);
    else return magnitude > int32_t(X::overflow_code);
  }
};

// The range of all that `lanes` neighbouring threads added, told to each of them. At most once a kernel.
template <bool AFFINE>
QL_DEVICE Range<AFFINE> reduce(Range<AFFINE> range, int lanes) {
  for (int distance = (lanes < 32 ? lanes : 32) / 2; distance > 0; distance /= 2) range.merge(range.shuffle(distance));
  if (lanes <= 32) return range;
  __shared__ int32_t high[32], low[32];  // of each warp
  if (threadIdx.x % 32 == 0) {
    high[threadIdx.x / 32] = range.high;
    low[threadIdx.x / 32] = range.low;
  }
  __syncthreads();
  for (int warp = 0; warp < lanes / 32; ++warp) range.merge({high[warp], low[warp]});
  return range;
}

}  // namespace cuda
}  // namespace quantlib
