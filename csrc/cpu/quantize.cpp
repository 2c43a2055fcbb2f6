// codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])
#include "quantize.h"

namespace quantlib {
namespace QL_ISA {

void quantize(const Quantize& p, ParallelFor run) {
  QuantizeRows rows(p);
  // A flat problem in pieces of one row, a matrix in pieces that reuse the
  // scales of a chunk from row to row.
  const bool flat = rows.grid.M == 1;
  if (!flat) rows.ahead = rows.grid.K;  // hardware looks ahead along a row only
  parallel_pieces(run, rows.grid, flat ? 1 : 64, flat ? kGrain : kChunk,
                  [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) { rows(i0, i1, j0, j1); });
}

}  // namespace QL_ISA
}  // namespace quantlib
