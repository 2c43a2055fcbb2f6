// least = the least scale[n] that is negative, or 0
#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// Codes of 16 bits of numbers below 0: those above the code of -0, up to the code of -infinity
template <class F>
struct Negative {
  const uint16_t* code;
  bool operator[](int64_t n) const { return code[n] > 0x8000u && code[n] <= (0x8000u | F::overflow_code); }
  float value(int64_t n) const { return decode_float<F>(code[n]); }
};
template <>
struct Negative<float32> {
  const float* scale;
  bool operator[](int64_t n) const { return scale[n] < 0.0f; }
  float value(int64_t n) const { return scale[n]; }
};

template <class Negative>
float least_of(const Negative& is_negative, int64_t count, ParallelFor run) {
  int32_t found = 0;
  parallel(run, count, kGrain, [&](int64_t begin, int64_t end) {
    int32_t any = 0;  // no branch in the loop: a weight has up to one scale for every few codes
    for (int64_t n = begin; n < end; ++n) any |= is_negative[n];
    if (any) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
  });
  float least = 0.0f;
  if (!found) return least;
  for (int64_t n = 0; n < count; ++n)
    if (is_negative[n] && is_negative.value(n) < least) least = is_negative.value(n);
  return least;
}

}  // namespace

void least_scale(const LeastScale& p, ParallelFor run) {
  const auto* code = static_cast<const uint16_t*>(p.scale);
  if (p.type == Type::bfloat16) *p.least = least_of(Negative<bfloat16>{code}, p.n, run);
  else if (p.type == Type::float16) *p.least = least_of(Negative<float16>{code}, p.n, run);
  else *p.least = least_of(Negative<float32>{static_cast<const float*>(p.scale)}, p.n, run);
}

}  // namespace QL_ISA
}  // namespace quantlib
