// The host's part: run-time types become template arguments, and every kernel of this folder is started here.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../numerics.h"
#include "kernels.h"

namespace quantlib {
namespace cuda {

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told here, so the next call must not tell it again
  throw std::runtime_error("quantlib::" + std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(status));
}

inline int64_t ceil_div(int64_t n, int64_t d) { return n / d + (n % d != 0); }

// Starts kernel(args) with `blocks` thread blocks; no blocks, no launch.
template <class Args>
void launch(const char* op, void (*kernel)(Args), int64_t blocks, int threads, Stream stream, Args args) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error("quantlib::" + std::string(op) + ": a CUDA grid must be at most 2147483647 blocks, got " +
                             std::to_string(blocks));
  void* pointers[] = {&args};
  check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0, stream.handle), op);
}

// p[0 .. n) = 0, four bytes each.
inline void clear(const char* op, void* p, int64_t n, Stream stream) {
  check(cudaMemsetAsync(p, 0, size_t(n) * 4, stream.handle), op);
}

[[noreturn]] inline void unknown_type() { throw std::logic_error("quantlib: a type that no CUDA kernel serves"); }

// The largest scale of a format.
inline float scale_max(Type format) { return float_of(row_of(format).scale_max); }

// run(X{}) with the row of the table that x or y has.
template <class Run>
void visit_x(Type type, Run run) {
  visit(type, [&](auto f) {
    if constexpr (is_input<decltype(f)>) run(f);
    else unknown_type();
  });
}

// run(F{}) with a float format of whole bytes.
template <class Run>
void visit_float(Type type, Run run) {
  visit(type, [&](auto f) {
    if constexpr (decltype(f)::is_float && is_whole<decltype(f)>) run(f);
    else unknown_type();
  });
}

// run(F{}, AFFINE) with the row of the codes; only integer formats have a zero point.
template <class Run>
void visit_format(Type format, bool affine, Run run) {
  visit(format, [&](auto f) {
    using F = decltype(f);
    if constexpr (F::bits == 32) unknown_type();
    else if constexpr (F::is_float) run(f, std::false_type{});
    else affine ? run(f, std::true_type{}) : run(f, std::false_type{});
  });
}

}  // namespace cuda
}  // namespace quantlib
