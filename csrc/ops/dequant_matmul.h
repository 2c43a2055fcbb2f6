// y[m, n] = epilogue(sum over k of x[m, k] * w[n, k])
#pragma once
#include "../problem.h"

namespace quantlib {

struct DequantMatmul {
  int64_t M;
  const void* x;  // [M, K] float32, float16 or bfloat16; K may be 0
  Type x_type;
  Weight weight;
  Epilogue epilogue;
  bool batch_invariant;  // the bytes of a row of y depend on that row of x alone
  void* y;               // [M, N] of x_type
  bool tiled = false;    // weight.codes are the tiles of quantlib/backends/tiles.py
};

}  // namespace quantlib
