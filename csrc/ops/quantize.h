// codes[i, j] = encode(x[i, j] / scale[i / br, j / bk])
#pragma once
#include "../problem.h"

namespace quantlib {

struct Quantize {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  const float* scale;         // [ceil(M / br), ceil(K / bk)]
  const int32_t* zero_point;  // the same shape, or null: symmetric
  void* codes;                // [M, K], or [M, ceil(K / 2)] bytes where the format is packed
};

}  // namespace quantlib
