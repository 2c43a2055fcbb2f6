// scale = compute_scale(x), codes = quantize(x, scale), x still in the cache
#include "../ops/quantize_dynamic.h"
#include "quantize.h"
#include "range.h"

namespace quantlib {
namespace QL_ISA {

void quantize_dynamic(const QuantizeDynamic& p, ParallelFor run) {
  const ComputeScale scale_of = {p.grid, p.x, p.x_type, p.format, p.scale, p.zero_point};
  const Quantize codes_of = {p.grid, p.x, p.x_type, p.format, p.scale, p.zero_point, p.codes};
  QuantizeRows codes(codes_of);
  const RangeRows ranges{scale_of, codes.grid};
  const Grid& g = codes.grid;
  // While codes are made, memory fetches the blocks whose range is looked for next.
  if (g.M == 1 && g.bk <= kFetched) codes.ahead = most(kResident, g.bk);
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
    const int64_t i0 = I * g.br, i1 = least(i0 + g.br, g.M);
    ranges.blocks(i0, i1, J0, J1, range);
    ranges.finish(I, J0, J1, range);
    codes(i0, i1, J0 * g.bk, least(J1 * g.bk, g.K));
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
