// The rows of x that belong to each of E weights.
#pragma once
#include "../problem.h"

namespace quantlib {

// Rows ends[e - 1] .. ends[e] belong to expert e, from 0 on for the first; rows from the last end on belong to none.
struct Groups {
  int64_t E, T;  // weights, and rows of x
  const int32_t*
      ends;  // [E]; ascending in 0 .. T where the host may look, and nothing outside of x is touched elsewhere
};

}  // namespace quantlib
