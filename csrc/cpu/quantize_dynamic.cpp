// scale = compute_scale(x), codes = quantize(x, scale), x still in the cache
#include "../ops/quantize_dynamic.h"
#include "lanes.h"
#include "quantize.h"
#include "range.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kStride = 256;  // elements that are read between one fetch and the next

// The ranges of blocks J0 .. J1 of one long row, while memory fetches `next.bytes` for each of their elements.
void ranges_and_fetch(const RangeRows& rows, int64_t J0, int64_t J1, Fetched next, Range* out) {
  const Grid& g = rows.grid;
  for (int64_t J = J0; J < J1; ++J) {
    Range range = {0, 0};
    for (int64_t j = J * g.bk, end = least(j + g.bk, g.K); j < end; j += kStride) {
      const int64_t n = least(kStride, end - j);
      const char* behind = next.first + n * next.bytes;
      for (; next.first < behind; next.first += 64) __builtin_prefetch(next.first, 0, 2);
      range = merge(range, rows.row(0, j, n));
    }
    out[J - J0] = range;
  }
}

}  // namespace

void quantize_dynamic(const QuantizeDynamic& p, ParallelFor run) {
  const ComputeScale scale_of = {p.grid, p.x, p.x_type, p.format, p.scale, p.zero_point};
  const Quantize codes_of = {p.grid, p.x, p.x_type, p.format, p.scale, p.zero_point, p.codes};
  QuantizeRows codes(codes_of);
  const RangeRows ranges{scale_of, codes.grid};
  const Grid& g = codes.grid;
  // Memory fetches the blocks that come next: half of them while ranges are looked for, the other half while codes are
  // made; all then where these take longer than memory does, as those of short blocks with AVX2.
  const bool fetches = g.M == 1 && g.bk <= kFetched, halves = fetches && (kLanes == 16 || g.bk > kStride);
  if (fetches && !halves) codes.ahead = most(kResident, g.bk);
  if (shared_blocks(g)) {
    compute_scale(scale_of, run);
    if (g.M > 1) return quantize(codes_of, run);
    // The second reading begins with what the thread read last, which is in its caches.
    const int64_t pieces = (g.K + kGrain - 1) / kGrain;
    return parallel(run, pieces, 1, [&](int64_t begin, int64_t end) {
      while (end-- > begin) codes(0, 1, end * kGrain, least((end + 1) * kGrain, g.K));
    });
  }
  parallel_blocks(run, g, codes.format.per_byte, [&](int64_t I, int64_t J0, int64_t J1) {
    Range range[kBlocks];
    const int64_t i0 = I * g.br, i1 = least(i0 + g.br, g.M), j0 = J0 * g.bk, j1 = least(J1 * g.bk, g.K);
    Fetched next;
    if (halves) {
      next = {static_cast<const char*>(p.x) + j1 * codes.x_row.bytes, codes.x_row.bytes / 2};
      ranges_and_fetch(ranges, J0, J1, next, range);
      next.first += (j1 - j0) * next.bytes;
    } else {
      ranges.blocks(i0, i1, J0, J1, range);
    }
    ranges.finish(I, J0, J1, range);
    codes(i0, i1, j0, j1, next);
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
