// What one call of an op asks of a device, in plain pointers and sizes: the same structs for csrc/cpu and csrc/cuda.
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

// y[n] = encode(decode(x[n]))
struct Cast {
  const void* x;  // [n] of x_type
  Type x_type;
  void* y;  // [n] of y_type
  Type y_type;
  int64_t n;
  bool saturate;
};

// scale[I, J], zero_point[I, J] of the range of block (I, J)
struct ComputeScale {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  float* scale;         // [ceil(M / br), ceil(K / bk)]
  int32_t* zero_point;  // the same shape, or null: symmetric
};

// least = the least scale[n] that is negative, or 0
struct LeastScale {
  const float* scale;  // [n]
  int64_t n;
  float* least;
};

// codes[i, j] = encode(x[i, j] / scale[i / br, j / bk])
struct Quantize {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  const float* scale;         // [ceil(M / br), ceil(K / bk)]
  const int32_t* zero_point;  // the same shape, or null: symmetric
  void* codes;                // [M, K], or [M, ceil(K / 2)] bytes where the format is packed
};

// y[i, j] = decode(codes[i, j]) * scale[i / br, j / bk]
struct Dequantize {
  Grid grid;
  const void* codes;  // [M, K], or [M, ceil(K / 2)] bytes where the format is packed
  Type format;
  const float* scale;         // [ceil(M / br), ceil(K / bk)]
  const int32_t* zero_point;  // the same shape, or null: symmetric
  void* y;                    // [M, K] float32, float16 or bfloat16
  Type y_type;
};

// scale = compute_scale(x), codes = quantize(x, scale), in one pass over x
struct QuantizeDynamic {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  void* codes;          // [M, K], or [M, ceil(K / 2)] bytes where the format is packed
  float* scale;         // [ceil(M / br), ceil(K / bk)]
  int32_t* zero_point;  // the same shape, or null: symmetric
};

// y[i, j] = c * scale[i / br, j / bk], c the code of x[i, j] less its zero point
struct FakeQuantize {
  Grid grid;
  const void* x;  // [M, K] float32, float16 or bfloat16
  Type x_type, format;
  const float* scale;       // [ceil(M / br), ceil(K / bk)]
  const float* zero_point;  // the same shape, or null: symmetric
  int32_t qmin, qmax;       // the codes of an integer format
  void* y;                  // [M, K] of x_type
};

constexpr int64_t kPartials = 1024;  // of a sum that a GPU makes in two stages: enough for every one, the same on each

// dx[i, j] = inside ? dy[i, j] : 0, and what each block's scale and zero point get
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

// What a matmul multiplies by: values w[n, k] = (decode(codes[n, k]) - zero_point[n / br, k / bk]) * scale[n / br, k /
// bk]
struct Weight {
  Grid grid;          // M is N here: [N, K]
  const void* codes;  // [N, K], or [N, ceil(K / 2)] bytes where the format is packed
  Type format;
  const float* scale;         // [ceil(N / br), ceil(K / bk)]
  const int32_t* zero_point;  // the same shape, or null: symmetric
};

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

// What becomes of a sum in FP32: y = activation(sum + bias[n]), rounded to y's type
struct Epilogue {
  const float* bias;  // [N], or null
  Activation activation;
};

// y[m, n] = epilogue(sum over k of x[m, k] * w[n, k])
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

// dx[m, k] = sum over n of dy[m, n] * w[n, k]
struct DequantMatmulBackward {
  int64_t M;
  const void* dy;  // [M, N] float32, float16 or bfloat16; N may be 0
  Type dy_type;
  Weight weight;
  void* dx;  // [M, K] of dy_type
};

// y[m, n] = epilogue(sum over k of (x_codes[m, k] - x_zero_point[m]) * x_scale[m] * w[n, k]), the integer sum exact
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
