// found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error
#pragma once
#include "../problem.h"

namespace quantlib {

struct SearchScale {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  bool by_magnitude, is_signed;  // whether an error counts by its element's magnitude; whether both signs are tried
  Type kept;                     // what a scale is a number of: float32, float16 or bfloat16
  const float* scale;            // [ceil(M / br), ceil(K / bk)]
  const int32_t* zero_point;     // the same shape, or null: symmetric
  const float* energy;           // [K], or null: all 1
  float* found;                  // of scale's shape
};

}  // namespace quantlib
