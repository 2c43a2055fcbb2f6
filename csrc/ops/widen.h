// out[i, j] = the int32 of code j in row i of the codes: zero points that are kept as codes; or the float32 of n scales
// of E8M0
#pragma once
#include "../problem.h"

namespace quantlib {

struct Widen {
  int64_t M, K;       // K codes in each of M rows
  const void* codes;  // of `format`; of E8M0 where it is float32
  Type format;
  void* out;  // [M, K] int32, or float32
};

}  // namespace quantlib
