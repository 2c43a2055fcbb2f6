// dx[i, j] = inside ? dy[i, j] : 0, and what each block's scale and zero point get
#pragma once
#include "../problem.h"

namespace quantlib {

constexpr int64_t kPartials = 1024;  // of a sum that a GPU makes in two stages: enough for every one, the same on each

struct FakeQuantizeBackward {
  Grid grid;
  const void* dy;  // [M, K] of x_type
  const void* x;   // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  const float* scale;       // [ceil(M / br), ceil(K / bk)]
  const float* zero_point;  // the same shape, or null: symmetric
  int32_t qmin, qmax;       // the codes of an integer format
  bool lsq_mask;            // inside by x / scale itself, not by its rounded code
  float grad_factor;
  void* dx;            // [M, K] of x_type
  float* dscale;       // [ceil(M / br), ceil(K / bk)]
  float* dzero_point;  // the same shape, or null: symmetric
  float* partial;      // [2, kPartials] to work in, on a GPU
};

}  // namespace quantlib
