// dx[m, k] = sum over n of dy[m, n] * w[n, k]
#pragma once
#include "../problem.h"

namespace quantlib {

struct DequantMatmulBackward {
  int64_t M;
  const void* dy;  // [M, N] float32, float16 or bfloat16; N may be 0
  Type dy_type;
  Weight weight;
  void* dx;  // [M, K] of dy_type
};

}  // namespace quantlib
