// y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), e the expert that row t belongs to
#include "../ops/grouped_dequant_matmul.h"
#include "grouped.h"

namespace quantlib {
namespace QL_ISA {

void dequant_matmul(const DequantMatmul&, ParallelFor);

void grouped_dequant_matmul(const GroupedDequantMatmul& p, ParallelFor run) {
  const DequantMatmul& f = p.first;
  multiply_groups(run, f.weight, f.epilogue, p.groups, f.x_type, f.y,
                  [&](const Weight& weight, const Epilogue& epilogue, int64_t t0, int64_t t1, void* y) {
                    const void* x = row_at(f.x, f.x_type, f.weight.grid.K, t0);
                    dequant_matmul({t1 - t0, x, f.x_type, weight, epilogue, f.batch_invariant, y}, on_this_thread);
                  });
}

}  // namespace QL_ISA
}  // namespace quantlib
