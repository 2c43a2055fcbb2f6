// x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)
#pragma once
#include "../problem.h"

namespace quantlib {

struct DynamicMatmul {
  int64_t M;
  const void* x;  // [M, K] float32, float16 or bfloat16; K may be 0
  Type x_type;
  Weight weight;  // int8, uint8 or int4
  Epilogue epilogue;
  void* x_codes;   // [M, K] int8 to work in
  float* x_scale;  // [M] to work in
  void* y;         // [M, N] of x_type
};

}  // namespace quantlib
