// Parts of the problems of csrc/ops. A problem is one call of an op in plain pointers and sizes: the glue fills
// it in, the kernels of csrc/cpu and csrc/cuda read it.
#pragma once
#include <cstdint>

#include "formats.h"

namespace quantlib {

// x is [M, K]; element (i, j) uses scale[i / br, j / bk] of a [ceil(M / br), ceil(K / bk)] scale.
struct Grid {
  int64_t M, K, br, bk;
  // Always inlined: a file compiled for AVX-512 must not lend its copy to one compiled without.
  __attribute__((always_inline)) int64_t scale_rows() const { return M / br + (M % br != 0); }
  __attribute__((always_inline)) int64_t scale_cols() const { return K / bk + (K % bk != 0); }
};

// The float32 numbers that a scale may be kept as.
enum class NarrowScale : uint8_t { bfloat16, float16, e8m0 };

// The weight of a matmul: values w[n, k] = (decode(codes[n, k]) - zero_point[n / br, k / bk]) * scale[n / br, k /
// bk]
struct Weight {
  Grid grid;          // M is N here: [N, K]
  const void* codes;  // [N, K], or [N, ceil(K / 2)] bytes where the format is packed
  Type format;
  const float* scale;         // [ceil(N / br), ceil(K / bk)]; null where there are narrow scales
  const int32_t* zero_point;  // the same shape; null where there are zero codes, or none: symmetric
  // The same scales and zero points in fewer bits, for the kernels of CPUs that multiply floats; else null
  const void* narrow_scale = nullptr;
  NarrowScale narrow_type = NarrowScale::bfloat16;
  const uint8_t* zero_codes = nullptr;  // codes of the format, packed where it is packed

  // Always inlined, as above.
  __attribute__((always_inline)) bool is_affine() const { return zero_point || zero_codes; }
};

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

// The steps after a sum in FP32: y = activation(sum + bias[n]), rounded to y's type
struct Epilogue {
  const float* bias;  // [N], or null
  Activation activation;
};

}  // namespace quantlib
