// y[m, n] = epilogue(sum over k of (x_codes[m, k] - x_zero_point[m]) * x_scale[m] * w[n, k]), the integer sum exact
#pragma once
#include "../problem.h"

namespace quantlib {

struct ScaledMatmul {
  int64_t M;
  const void* x_codes;  // [M, K] int8 or uint8; K may be 0
  Type x_format;
  const float* x_scale;         // [M], or one for all rows
  const int32_t* x_zero_point;  // the same shape, or null: symmetric
  bool x_per_row;
  Weight weight;  // int8, uint8 or int4
  Epilogue epilogue;
  void* y;  // [M, N] float32, float16 or bfloat16
  Type y_type;
};

}  // namespace quantlib
