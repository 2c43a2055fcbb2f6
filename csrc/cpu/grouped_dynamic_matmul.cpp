// y[t, n] = dynamic_matmul(x[t], codes[e], scale[e])[n], e the expert that row t belongs to
#include "../ops/grouped_dynamic_matmul.h"

#include "../ops/quantize_dynamic.h"
#include "../ops/scaled_matmul.h"
#include "grouped.h"

namespace quantlib {
namespace QL_ISA {

void quantize_dynamic(const QuantizeDynamic&, ParallelFor);
void scaled_matmul(const ScaledMatmul&, ParallelFor);

void grouped_dynamic_matmul(const GroupedDynamicMatmul& p, ParallelFor run) {
  const DynamicMatmul& f = p.first;
  const int64_t M = f.M, K = f.weight.grid.K;
  if (K) quantize_dynamic({{M, K, 1, K}, f.x, f.x_type, Type::int8, f.x_codes, f.x_scale, nullptr}, run);
  else __builtin_memset(f.x_scale, 0, uint64_t(M) * sizeof(float));  // any finite scale will do
  multiply_groups(run, f.weight, f.epilogue, p.groups, f.x_type, f.y,
                  [&](const Weight& weight, const Epilogue& epilogue, int64_t t0, int64_t t1, void* y) {
                    const void* codes = row_at(f.x_codes, Type::int8, K, t0);
                    scaled_matmul(
                        {t1 - t0, codes, Type::int8, f.x_scale + t0, nullptr, true, weight, epilogue, y, f.x_type},
                        on_this_thread);
                  });
}

}  // namespace QL_ISA
}  // namespace quantlib
