// Codes that share a byte: code P j + i of a row is bits i * bits and up of byte j, P = 8 / bits
// (quantlib/reference/packing.py). What follows the last code of a row is 0.
#pragma once
#include "numerics.h"

namespace quantlib {

// The byte that code(0), code(1) .. share
template <class F, class Code>
QL_FN uint8_t pack(const Code& code) {
  uint32_t byte = code(0);
  for (int i = 1; i < F::per_byte; ++i) byte = (byte & ((1u << i * F::bits) - 1u)) | code(i) << i * F::bits;
  return uint8_t(byte);
}

// Code i of F in `byte`, its sign spread where it is a signed integer; bits that no code has do not count.
template <class F>
QL_FN int32_t unpack(uint8_t byte, int i) {
  constexpr int32_t mask = (1 << F::bits) - 1, sign = 1 << (F::bits - 1);
  const int32_t code = F::per_byte == 2 ? (i ? byte >> 4 : byte & 15) : byte >> (i * F::bits) & mask;
  if constexpr (F::is_signed) return (code ^ sign) - sign;
  else return code;
}

// Code j of a row of integers of at most eight bits, whatever the format.
QL_FN int32_t integer_of(const uint8_t* row, int64_t j, const Row& f) {
  const int32_t sign = f.is_signed ? 1 << (f.bits - 1) : 0;
  const int32_t code = row[j >> f.log_per_byte] >> (int(j & (f.per_byte - 1)) * f.bits) & ((1 << f.bits) - 1);
  return (code ^ sign) - sign;
}

}  // namespace quantlib
