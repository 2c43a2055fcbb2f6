// y[r, j] = decode(codes[i, j]) * scale[i / br, j / bk], i = indices[r]
#pragma once
#include "../problem.h"

namespace quantlib {

struct DequantizeRows {
  Weight table;         // [N, K]
  int64_t R;            // rows of y
  const void* indices;  // [R] int64, or int32, each in 0 .. N - 1
  bool wide;            // int64
  void* y;              // [R, K] float32, float16 or bfloat16
  Type y_type;

  // Always inlined: a file compiled for AVX-512 must not lend its copy to one compiled without.
  __attribute__((always_inline)) int64_t index(int64_t r) const {
    return wide ? static_cast<const int64_t*>(indices)[r] : static_cast<const int32_t*>(indices)[r];
  }
};

}  // namespace quantlib
