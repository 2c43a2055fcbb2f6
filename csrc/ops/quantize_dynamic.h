// scale = compute_scale(x), codes = quantize(x, scale), in one pass over x
#pragma once
#include "../problem.h"

namespace quantlib {

struct QuantizeDynamic {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  void* codes;          // [M, K], or [M, ceil(K / 2)] bytes where the format is packed
  float* scale;         // [ceil(M / br), ceil(K / bk)]
  int32_t* zero_point;  // the same shape, or null: symmetric
};

}  // namespace quantlib
