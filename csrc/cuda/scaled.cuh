// Shared by the two kernels of scaled_matmul: its problem, and codes as int8, which matrix instructions take.
#pragma once
#include "intrinsics.cuh"
#include "matmul.cuh"

namespace quantlib {
namespace cuda {

constexpr uint32_t kOnes = 0x01010101;

// Codes [rows, K] of an integer format.
struct CodesArgs {
  const uint8_t* codes;
  int64_t rows, row_bytes;
  bool packed, vector;          // packed: signed ones of half a byte; vector: 16 codes may be read at once
  uint8_t flip;                 // turns an unsigned byte into a signed one
  uint8_t bits, in_byte, sign;  // in_byte: log2 of how many share a byte; sign: the bit that is spread, or 0

  // Code k of the row at p, as a signed byte
  QL_DEVICE uint32_t code(const uint8_t* p, int64_t k) const {
    const uint32_t place = uint32_t(k) & ((1u << in_byte) - 1u), byte = p[k >> in_byte] >> (place * bits);
    return (((byte & ((1u << bits) - 1u)) ^ sign) - sign) ^ flip;
  }
};

QL_DEVICE int32_t clamp(int32_t z, int lowest, int highest) { return z < lowest ? lowest : z > highest ? highest : z; }

struct ScaledArgs {
  CodesArgs x, w;
  const float *x_scale, *scale;
  const int32_t *x_zero_point, *zero_point;
  bool x_per_row;
  int x_lowest, lowest, highest;  // of zero points; that of x has 8 bits
  float x_scale_max, scale_max;
  int64_t K, bk, groups;
  Divisor br;
  Epilogue epilogue;
  void* y;
  Type y_type;
  int64_t row_blocks;

  QL_DEVICE float scale_of_x(int64_t m) const { return effective_scale(x_scale[x_per_row ? m : 0], x_scale_max); }
  QL_DEVICE float scale_of(int64_t block) const { return effective_scale(scale[block], scale_max); }
  // Less what the codes are less, too.
  QL_DEVICE int32_t zero_of_x(int64_t m) const {
    return clamp(x_zero_point ? x_zero_point[x_per_row ? m : 0] : 0, x_lowest, x_lowest + 255) - x.flip;
  }
  QL_DEVICE int32_t zero_of(int64_t block) const {
    return clamp(zero_point ? zero_point[block] : 0, lowest, highest) - w.flip;
  }
};

// Four codes of four bits, in the low halves of bytes, to int8.
QL_DEVICE uint32_t widen(uint32_t nibbles) { return nibbles | (nibbles & 0x08080808u) * 30; }

}  // namespace cuda
}  // namespace quantlib
