// y[t, n] = epilogue(sum over k of x[t, k] * w[e, n, k]), e the expert that row t belongs to
#pragma once
#include "dequant_matmul.h"
#include "groups.h"

namespace quantlib {

struct GroupedDequantMatmul {
  DequantMatmul first;  // of all T rows of x, with the weight and the bias of expert 0
  Groups groups;
};

}  // namespace quantlib
