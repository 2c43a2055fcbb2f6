// Arguments of every kernel launcher of this folder beside its problem. It puts its kernels on the stream and returns:
// nothing waits, so a call can be captured in a CUDA graph. Neither torch nor the CUDA runtime is needed to read this.
#pragma once
#include "../problem.h"

struct CUstream_st;  // what cudaStream_t points to

namespace quantlib {
namespace cuda {

// A matrix in memory that something else owns: element (i, j) lies at data[i * strides[0] + j * strides[1]].
struct Matrix {
  const void* data;
  int64_t rows, columns, strides[2];
};

// Services of torch that one call may ask for.
class Torch {
 public:
  // Memory that is the call's until it returns.
  virtual void* allocate(int64_t bytes) = 0;
  // sums [M, N] = x [M, L] * w [L, N], both of one 16-bit type, in float32 that is never rounded to it: the vendor's
  // product, in the caller's current stream
  virtual void multiply(const Matrix& x, const Matrix& w, Type type, float* sums) = 0;

 protected:
  ~Torch() = default;
};

struct Stream {
  CUstream_st* handle = nullptr;
  Torch* torch = nullptr;
};

}  // namespace cuda
}  // namespace quantlib
