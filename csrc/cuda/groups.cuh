// The rows of x that a thread block of a grouped product takes: only the device knows how many each expert has.
#pragma once
#include "../ops/groups.h"
#include "launch.cuh"
#include "vector.cuh"

namespace quantlib {
namespace cuda {

// Blocks of `rows` rows that T rows of E experts, and those of none, may need: each of them wastes less than one.
inline int64_t slots_of(const Groups& g, int64_t rows) {
  const int64_t parts = g.E + 1 < g.T ? g.E + 1 : g.T, slots = (g.T + (rows - 1) * parts) / rows;
  return slots < g.T ? slots : g.T;
}

// Rows start .. end of x belong to expert e, or to none where e is E; a block takes some from start + m0 on. Where
// there is nothing to do, start is end.
struct Part {
  int32_t e, start, end;
  int64_t m0;
};

// The rows of block `slot`. Each warp looks for itself, at 32 experts at once. Ends outside of x count as its own:
// nothing outside of it is touched, whatever they are.
QL_DEVICE Part part_of(const Groups& g, int64_t slot, int rows) {
  constexpr uint32_t all = 0xffffffffu;
  const int lane = int(threadIdx.x) % 32, E = int(g.E), T = int(g.T);
  const auto end_of = [&](int e) {
    const int32_t end = e < 0 ? 0 : e < E ? g.ends[e] : T;
    return end < 0 ? 0 : end > T ? T : end;
  };
  int32_t before = 0;  // blocks of the experts before these 32
  for (int e0 = 0; e0 <= E; e0 += 32) {
    const int e = e0 + lane;
    const int32_t start = end_of(e - 1), end = end_of(e), count = end > start ? end - start : 0;
    const int32_t own = e <= E ? count / rows + (count % rows != 0) : 0;
    int32_t past = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t lower = __shfl_up_sync(all, past, unsigned(distance));
      past += lane >= distance ? lower : 0;
    }
    past += before;
    const uint32_t found = __ballot_sync(all, past > slot);
    if (!found) {
      before = __shfl_sync(all, past, 31);
      continue;
    }
    const int owner = __ffs(int(found)) - 1;
    const int64_t first = __shfl_sync(all, past - own, owner);
    return {e0 + owner, __shfl_sync(all, start, owner), __shfl_sync(all, end, owner), (slot - first) * rows};
  }
  return {E, 0, 0, 0};
}

// y[i0 .. i0 + rows, j0 .. j0 + columns) = +0 of a matrix [I, J]
template <class Unit>
QL_DEVICE void clear_part(Unit* y, int64_t I, int64_t J, int64_t i0, int64_t j0, int rows, int columns) {
#pragma unroll 1
  for (int at = int(threadIdx.x); at < rows * columns; at += int(blockDim.x)) {
    const int64_t i = i0 + at / columns, j = j0 + at % columns;
    if (i < I && j < J) y[i * J + j] = Unit(0);
  }
}

}  // namespace cuda
}  // namespace quantlib
