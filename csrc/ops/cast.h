// y[n] = encode(decode(x[n]))
#pragma once
#include "../problem.h"

namespace quantlib {

struct Cast {
  const void* x;  // [n] of x_type
  Type x_type;
  void* y;  // [n] of y_type
  Type y_type;
  int64_t n;
  bool saturate;
};

}  // namespace quantlib
