// y[i, j] = c * scale[i / br, j / bk], c the code of x[i, j] less its zero point
#pragma once
#include "../problem.h"

namespace quantlib {

struct FakeQuantize {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  const float* scale;       // [ceil(M / br), ceil(K / bk)]
  const float* zero_point;  // the same shape, or null: symmetric
  int32_t qmin, qmax;       // the codes of an integer format
  void* y;                  // [M, K] of x_type
};

}  // namespace quantlib
