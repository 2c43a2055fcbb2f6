// The range of x over blocks and the scale that follows from it, for compute_scale and quantize_dynamic.
#pragma once
#include "../ops/compute_scale.h"
#include "blocks.h"

namespace quantlib {
namespace QL_ISA {

void compute_scale(const ComputeScale&, ParallelFor);

// Magnitudes order like their bits: as signed integers the largest bits belong to the highest value, as unsigned ones
// to the lowest. Integer maxima are exact, order-free, and leave a NaN visible in one of the two (C4).
struct Range {
  int32_t highest;  // bits of the highest x, 0 where none is positive
  uint32_t lowest;  // bits of the lowest x, without the sign bit where none is negative
};

QL_FN Range merge(Range a, Range b) {
  return {a.highest > b.highest ? a.highest : b.highest, a.lowest > b.lowest ? a.lowest : b.lowest};
}

struct RangeRows {
  using Partial = Range;
  const ComputeScale& p;
  const Grid grid;

  // reduce_blocks asks for these: ranges, and from them scale[I, J] and zero_point[I, J].
  Range row(int64_t i, int64_t j, int64_t n) const;
  void blocks(int64_t i0, int64_t i1, int64_t J0, int64_t J1, Range* out) const;
  void finish(int64_t I, int64_t J0, int64_t J1, const Range* range) const;
};

}  // namespace QL_ISA
}  // namespace quantlib
