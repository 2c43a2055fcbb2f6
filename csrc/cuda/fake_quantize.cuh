// Shared by fake_quantize.cu and fake_quantize_backward.cu: the scale of a block, and the formats as types.
#pragma once
#include "../fake_quantize.h"
#include "range.cuh"

namespace quantlib {
namespace cuda {

struct Scales {
  const float *scale, *zero_point;  // [M / br, K / bk]; the latter, or null
  float scale_max;
  Limits q;

  template <class Problem>
  explicit Scales(const Problem& p)
      : scale(p.scale),
        zero_point(p.zero_point),
        scale_max(cuda::scale_max(p.format)),
        q{float(p.qmin), float(p.qmax)} {}

  template <bool AFFINE, bool TIGHT = false>
  QL_DEVICE Shared<float> at(int64_t block) const {
    const float s = TIGHT ? tight_scale(scale[block], scale_max) : effective_scale(scale[block], scale_max);
    return {reciprocal(s), s, AFFINE ? code_of(zero_point[block], q) : 0.0f};
  }
};

// run(F{}, AFFINE) with what the codes of the format are: all integer formats are one.
template <class Run>
void visit_codes(Type format, bool affine, Run run) {
  visit(format, [&](auto f) {
    if constexpr (decltype(f)::is_float && decltype(f)::bits < 32) run(f, std::false_type{});
    else affine ? run(Integer{}, std::true_type{}) : run(Integer{}, std::false_type{});
  });
}

}  // namespace cuda
}  // namespace quantlib
