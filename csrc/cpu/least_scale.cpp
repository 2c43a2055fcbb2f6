// least = the least scale[n] that is negative, or 0
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

void least_scale(const LeastScale& p, ParallelFor run) {
  int32_t found = 0;
  parallel(run, p.n, kGrain, [&](int64_t begin, int64_t end) {
    int32_t any = 0;  // no branch in the loop: a weight has up to one scale for every few codes
    for (int64_t n = begin; n < end; ++n) any |= p.scale[n] < 0.0f;
    if (any) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
  });
  *p.least = 0.0f;
  if (!found) return;
  for (int64_t n = 0; n < p.n; ++n) *p.least = p.scale[n] < *p.least ? p.scale[n] : *p.least;
}

}  // namespace QL_ISA
}  // namespace quantlib
