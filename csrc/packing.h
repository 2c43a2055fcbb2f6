// Codes of four bits, two a byte: element 2j in the low nibble of byte j, element 2j + 1 in the high one
// (quantlib/reference/packing.py). The nibble past an odd row is 0.
#pragma once
#include "numerics.h"

namespace quantlib {

QL_FN uint8_t pack(uint32_t even, uint32_t odd) { return uint8_t((even & 15u) | (odd << 4)); }

// The code of F in nibble `odd` of `byte`; the sign of an integer format is spread.
template <class F>
QL_FN int32_t unpack(uint8_t byte, int odd) {
  const int32_t nibble = odd ? byte >> 4 : byte & 15;
  if constexpr (F::is_signed) return (nibble ^ 8) - 8;
  else return nibble;
}

}  // namespace quantlib
