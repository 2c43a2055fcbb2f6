// Written by `python quantlib/formats.py > csrc/formats.h`: edit that table, not this file.
#pragma once
#include <cstdint>

namespace quantlib {

// The rows of the table, in its order.
enum class Type : uint8_t { float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, float4_e2m1fn, nf4, nf4_bf16, int8, uint8, int4 };

}  // namespace quantlib

// X(name, torch's dtype of its codes, bits, codes a byte, exponent_bits, fraction_bits, bias,
//   is_book, has_inf, has_nan, has_negative_zero, max_code, overflow_code, nan_code, max, scale_max)
// The last two are the bits of an FP32 value.
#define QL_FLOATS(X) \
  X(float16, float16, 16, 1, 5, 10, 15, false, true, true, true, 0x7bff, 0x7c00, 0x7fff, 0x477fe000, 0x77800000) \
  X(bfloat16, bfloat16, 16, 1, 8, 7, 127, false, true, true, true, 0x7f7f, 0x7f80, 0x7fff, 0x7f7f0000, 0x3f800000) \
  X(float8_e4m3fn, float8_e4m3fn, 8, 1, 4, 3, 7, false, false, true, true, 0x7e, 0x7f, 0x7f, 0x43e00000, 0x7b000000) \
  X(float8_e5m2, float8_e5m2, 8, 1, 5, 2, 15, false, true, true, true, 0x7b, 0x7c, 0x7f, 0x47600000, 0x77800000) \
  X(float4_e2m1fn, uint8, 4, 2, 2, 1, 1, false, false, false, true, 0x7, 0x7, 0x7, 0x40c00000, 0x7e000000) \
  X(nf4, uint8, 4, 2, 0, 3, 0, true, false, false, false, 0xf, 0xf, 0xf, 0x3f800000, 0x7e800000) \
  X(nf4_bf16, uint8, 4, 2, 0, 3, 0, true, false, false, false, 0xf, 0xf, 0xf, 0x3f800000, 0x7e800000)

// X(name, the bits of the FP32 values of a code book, code by code)
#define QL_BOOKS(X) \
  X(nf4, 0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000) \
  X(nf4_bf16, 0xbf800000, 0xbf320000, 0xbf060000, 0xbeca0000, 0xbe920000, 0xbe3d0000, 0xbdba0000, 0x00000000, 0x3da30000, 0x3e250000, 0x3e7c0000, 0x3ead0000, 0x3ee20000, 0x3f100000, 0x3f390000, 0x3f800000)

// X(name, torch's dtype of its codes, bits, codes a byte, is_signed, qmin, qmax, affine_qmin,
//   affine_qmax, max, scale_max)
#define QL_INTS(X) \
  X(int8, int8, 8, 1, true, -127, 127, -128, 127, 127, 0x7b800000) \
  X(uint8, uint8, 8, 1, false, 0, 255, 0, 255, 255, 0x7b800000) \
  X(int4, uint8, 4, 2, true, -7, 7, -8, 7, 7, 0x7d800000)

#define QL_SCALE_MIN 0x0d800000
