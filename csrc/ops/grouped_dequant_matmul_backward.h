// dx[t, k] = sum over n of dy[t, n] * w[e, n, k], e the expert that row t belongs to
#pragma once
#include "dequant_matmul_backward.h"
#include "groups.h"

namespace quantlib {

struct GroupedDequantMatmulBackward {
  DequantMatmulBackward first;  // of all T rows of dy, with the weight of expert 0
  Groups groups;
};

}  // namespace quantlib
