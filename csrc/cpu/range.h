// The range of x over blocks and the scale that follows from it, for compute_scale and quantize_dynamic.
#pragma once
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

// Magnitudes order like their bits: as signed integers the largest bits belong to the highest value, as unsigned ones
// to the lowest. Integer maxima are exact, order-free, and leave a NaN visible in one of the two (C4).
struct Range {
  int32_t highest;  // bits of the highest x, 0 where none is positive
  uint32_t lowest;  // bits of the lowest x, without the sign bit where none is negative
};

QL_FN Range widen(Range a, Range b) {
  return {a.highest > b.highest ? a.highest : b.highest, a.lowest > b.lowest ? a.lowest : b.lowest};
}

struct RangeRows {
  const ComputeScale& p;
  const Grid grid;

  // The range of columns j .. j + n of row i.
  Range row(int64_t i, int64_t j, int64_t n) const;
  // out[J - J0] = the range of block (I, J) within rows i0 .. i1, for J0 <= J < J1.
  void blocks(int64_t i0, int64_t i1, int64_t J0, int64_t J1, Range* out) const;
  // scale[I, J] and zero_point[I, J] from the range of block (I, J), for J0 <= J < J1.
  void finish(int64_t I, int64_t J0, int64_t J1, const Range* range) const;
};

constexpr int64_t kResident = 4096;  // elements of x that stay in the first-level cache
constexpr int64_t kFetched = 65536;  // elements that a second-level cache holds beside others
constexpr int64_t kBlocks = 1024;    // blocks handled together, at most

// Blocks so few and so large that threads have to share one.
static inline bool shared_blocks(const Grid& g) {
  return g.scale_rows() * g.scale_cols() < 64 && g.br * g.bk > 8 * kGrain;
}

// body(I, J0, J1) for every block, several together while what is read of a row stays in the first-level cache. Where
// J0 * bk has to be even, because two codes share a byte, so is J0.
template <class Body>
static inline void parallel_blocks(ParallelFor run, const Grid& g, bool packed, const Body& body) {
  const int64_t cols = g.scale_cols(), unit = packed ? 2 : 1;
  const int64_t fitting = g.br > 1 ? kChunk / g.bk : kResident / g.bk;  // many rows: long pieces of each
  const int64_t step = most(unit, least(kBlocks, fitting) / unit * unit), across = (cols + step - 1) / step;
  const int64_t elements = g.br * least(step * g.bk, g.K);
  parallel(run, g.scale_rows() * across, most(1, kGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t J = piece % across * step;
      body(piece / across, J, least(J + step, cols));
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
