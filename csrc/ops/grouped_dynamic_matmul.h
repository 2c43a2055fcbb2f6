// y[t, n] = dynamic_matmul(x[t], codes[e], scale[e])[n], e the expert that row t belongs to
#pragma once
#include "dynamic_matmul.h"
#include "groups.h"

namespace quantlib {

struct GroupedDynamicMatmul {
  DynamicMatmul first;  // of all T rows of x, with the weight and the bias of expert 0
  Groups groups;
};

}  // namespace quantlib
