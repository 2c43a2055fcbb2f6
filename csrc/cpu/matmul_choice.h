// The kernel that a product takes here, and why: no op, but the answer to `quantlib info --matmul`.
#pragma once
#include "../problem.h"
#include "kernels.h"

namespace quantlib {

struct MatmulQuestion {
  int64_t M;
  Grid grid;  // of the weight
  Type format;
  bool is_affine;
  Type x_type;
  bool batch_invariant;
  const char **kernel, **why;  // the answer: two strings
};
struct DequantMatmulChoice : MatmulQuestion {};
struct ScaledMatmulChoice : MatmulQuestion {};

// Stands for the zero points of a weight that has some, where no kernel reads them.
inline constexpr int32_t kSomeZeroPoint = 0;

}  // namespace quantlib
