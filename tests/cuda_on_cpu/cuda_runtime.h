// Stands in for CUDA's header of this name, so that g++ compiles csrc/cuda/*.cu unchanged and runs their kernels here.
// It only declares what they call: block.cpp runs threads, intrinsics.cpp instructions, memory.cpp watches each access.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
// Further apart than the 48 KiB that a shared array may have, so that what runs over its end lies in no other.
#define __shared__ static __attribute__((aligned(65536)))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t size() const { return size_t(x) * y * z; }
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---- what a kernel calls --------------------------------------------------------------------------------------------

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads(int line = __builtin_LINE());
void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE());
int32_t __shfl_sync(uint32_t mask, int32_t value, int lane, int line = __builtin_LINE());
int32_t __shfl_xor_sync(uint32_t mask, int32_t value, int distance, int line = __builtin_LINE());
int32_t __shfl_up_sync(uint32_t mask, int32_t value, unsigned distance, int line = __builtin_LINE());
int32_t __shfl_down_sync(uint32_t mask, int32_t value, unsigned distance, int line = __builtin_LINE());
uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE());
int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE());
int __all_sync(uint32_t mask, int predicate, int line = __builtin_LINE());

int32_t atomicMax(int32_t* p, int32_t value);
int32_t atomicMin(int32_t* p, int32_t value);
uint32_t atomicAdd(uint32_t* p, uint32_t value);
void __threadfence();

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

// ---- what the host calls --------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
const char* cudaGetErrorString(cudaError_t e);
cudaError_t cudaGetLastError();
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t);

namespace cuda_on_cpu {

struct Launch {
  void (*start)(const Launch&);  // one thread
  void (*kernel)();
  const void* args;
};
cudaError_t launch(const Launch& launch, dim3 grid, dim3 block);

template <class Args>
__attribute__((no_sanitize("thread"))) void start(const Launch& l) {
  reinterpret_cast<void (*)(Args)>(l.kernel)(*static_cast<const Args*>(l.args));
}

}  // namespace cuda_on_cpu

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  static_assert(sizeof(Args) <= 4096, "a kernel takes at most 4096 bytes of arguments");
  if (shared != 0)
    return cudaErrorInvalidConfiguration;  // no kernel asks for more than its arrays, so nobody is given it
  return cuda_on_cpu::launch({cuda_on_cpu::start<Args>, reinterpret_cast<void (*)()>(kernel), args[0]}, grid, block);
}
