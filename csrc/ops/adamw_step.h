// parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits
#pragma once
#include "../problem.h"

namespace quantlib {

constexpr int kConstants = 9;  // of a step: decay, l2, beta1, rest1, beta2, rest2, rate, correction, eps
constexpr int64_t kLeastBlock = 32, kMostBlock = 1024;  // columns of a row that share a scale: a power of two

// Codes of 8 bits whose values are squares: q |q|. scale_max is that of contract C4.
struct MCodes {  // of m: -127..127
  static constexpr bool is_signed = true;
  static constexpr int most = 127;
  static constexpr float scale_max = 0x1p114f;
};
struct VCodes {  // of sqrt(v): 0..255
  static constexpr bool is_signed = false;
  static constexpr int most = 255;
  static constexpr float scale_max = 0x1p112f;
};

// Each result may be what is read in its place: an element is read before it is written.
struct AdamwStep {
  int64_t M, K, block;               // block: columns that share a scale; 0: m and v are float32, and have none
  const void *parameter, *gradient;  // [M, K] of x_type
  Type x_type;
  const void *m, *v;               // [M, K] int8 and uint8, or float32
  const float *m_scale, *v_scale;  // [M, ceil(K / block)]
  const float* constants;          // [kConstants]
  const int32_t* key;              // [2], or null: round a bfloat16 to nearest
  int64_t row, column;             // of the whole parameter, where the matrix begins
  void *parameter_out, *m_out, *v_out;
  float *m_scale_out, *v_scale_out;
};

}  // namespace quantlib
