// scale[I, J], zero_point[I, J] of the range of block (I, J)
#pragma once
#include "../problem.h"

namespace quantlib {

struct ComputeScale {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  float* scale;         // [ceil(M / br), ceil(K / bk)]
  int32_t* zero_point;  // the same shape, or null: symmetric
};

}  // namespace quantlib
