// y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block
#pragma once
#include "../problem.h"

namespace quantlib {

constexpr int64_t kMostHadamard = 1024;  // of a block

struct Hadamard {
  const void* x;  // [n] of `type`, block after block
  void* y;        // the same
  Type type;
  int64_t n, block;
  float factor;  // 1 / sqrt(block)
};

}  // namespace quantlib
