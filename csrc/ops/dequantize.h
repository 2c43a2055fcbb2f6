// y[i, j] = decode(codes[i, j]) * scale[i / br, j / bk]
#pragma once
#include "../problem.h"

namespace quantlib {

struct Dequantize {
  Grid grid;
  const void* codes;  // [M, K], or [M, ceil(K / 2)] bytes where the format is packed
  Type format;
  const float* scale;         // [ceil(M / br), ceil(K / bk)]
  const int32_t* zero_point;  // the same shape, or null: symmetric
  void* y;                    // [M, K] float32, float16 or bfloat16
  Type y_type;
};

}  // namespace quantlib
