// dx[t, k] = sum over n of dy[t, n] * w[e, n, k], e the expert that row t belongs to
#include "../ops/grouped_dequant_matmul_backward.h"
#include "grouped.h"

namespace quantlib {
namespace QL_ISA {

void dequant_matmul_backward(const DequantMatmulBackward&, ParallelFor);

void grouped_dequant_matmul_backward(const GroupedDequantMatmulBackward& p, ParallelFor run) {
  constexpr int64_t kHigh = 2 * kXRows;  // rows of dy that share what is decoded of a weight
  const DequantMatmulBackward& f = p.first;
  const Grid& g = f.weight.grid;
  int64_t high = 1;
  for (int64_t e = 0; e < p.groups.E; ++e) high = most(high, p.groups.ends[e] - (e ? p.groups.ends[e - 1] : 0));
  clear_rest(p.groups, f.dx, g.K * row_of(f.dy_type).bits / 8);
  each_task(run, p.groups, (high + kHigh - 1) / kHigh, least(high, kHigh) * g.M * g.K,
            [&](int64_t e, int64_t t0, int64_t t1, int64_t piece) {
              const int64_t t = t0 + piece * kHigh, count = least(kHigh, t1 - t);
              if (count <= 0) return;
              const void* dy = row_at(f.dy, f.dy_type, g.M, t);
              void* dx = const_cast<void*>(row_at(f.dx, f.dy_type, g.K, t));
              const Weight weight = part_of_expert(f.weight, e, 0, g.M);
              dequant_matmul_backward({count, dy, f.dy_type, weight, dx}, on_this_thread);
            });
}

}  // namespace QL_ISA
}  // namespace quantlib
