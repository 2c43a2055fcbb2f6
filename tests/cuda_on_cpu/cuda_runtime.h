// Stands in for CUDA's header of this name, so that g++ compiles csrc/cuda/*.cu unchanged and runs their kernels here.
//
// The launch configuration is the real one. Thread blocks run one after another in a random order; the threads of one
// are fibers that run in a random order between barriers, so what a missing barrier leaves to chance comes out wrong. A
// thread keeps its stack only if it waits: a kernel without barriers costs one switch a thread.
//
// Stricter than a GPU: threads that meet at a barrier, a shuffle or a product of matrices must have come from the same
// line, and a shuffle names no thread that has left. Nothing else is checked here: that is what
// -fsanitize=address,undefined is for.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

inline std::mt19937 random_order;  // seeded by the test

// A place where threads wait for each other: the block's barrier, or a shuffle of the lanes in `mask`.
struct Meeting {
  enum Kind { none, block, warp } kind = none;
  int line = 0;
  uint32_t mask = 0;
  bool operator==(const Meeting& o) const { return kind == o.kind && line == o.line && mask == o.mask; }
};

struct Thread {
  std::unique_ptr<Fiber> fiber;  // null before it starts and after it has left
  bool left = false;
  Meeting at;
  int exchanges = 0;
  uint32_t shown[2][6];  // what this lane gave to its last two shuffles or products
};

class ThreadBlock {
 public:
  ThreadBlock(std::function<void()> kernel) : kernel_(std::move(kernel)), threads_(blockDim.size()) {}

  void run() {
    std::vector<unsigned> ready(threads_.size());
    for (unsigned t = 0; t < ready.size(); ++t) ready[t] = t;
    while (!ready.empty()) {
      std::shuffle(ready.begin(), ready.end(), random_order);
      for (unsigned t : ready) resume(t);
      ready = release();
    }
  }

  void wait(Meeting at) {
    threads_[current_].at = at;
    threads_[current_].fiber->suspend();
  }

  // Shows `values` to the lanes in `mask` and waits for theirs; the turn at which they lie.
  template <size_t N>
  int exchange(const uint32_t (&values)[N], uint32_t mask, int line) {
    Thread& me = threads_[current_];
    const int turn = me.exchanges++ % 2;  // a lane is at most one exchange ahead of the others
    std::copy_n(values, N, me.shown[turn]);
    wait({Meeting::warp, line, mask});
    return turn;
  }

  uint32_t shuffle(uint32_t value, unsigned distance, uint32_t mask, int line) {
    const unsigned from = current_ ^ distance;
    if (!(mask >> (from % 32) & 1))
      fail("a shuffle reads a lane that is not in its mask, line " + std::to_string(line));
    return threads_[from].shown[exchange({value}, mask, line)][0];
  }

  // What lane `lane` of this thread's warp showed at `turn`.
  const uint32_t* shown(int lane, int turn) const { return threads_[current_ / 32 * 32 + unsigned(lane)].shown[turn]; }
  int lane() const { return int(current_ % 32); }

  static inline ThreadBlock* running = nullptr;

 private:
  void resume(unsigned t) {
    Thread& thread = threads_[t];
    thread.at = {};
    current_ = t;
    threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    if (!thread.fiber) thread.fiber = spare_.empty() ? std::make_unique<Fiber>() : take_spare();
    if (!thread.fiber->run(kernel_)) return;
    thread.left = true;
    spare_.push_back(std::move(thread.fiber));
  }

  std::unique_ptr<Fiber> take_spare() {
    std::unique_ptr<Fiber> fiber = std::move(spare_.back());
    spare_.pop_back();
    return fiber;
  }

  // The threads that may go on: of the meetings that are complete, some.
  std::vector<unsigned> release() {
    std::vector<std::vector<unsigned>> complete;
    std::vector<unsigned> present;
    for (unsigned t = 0; t < threads_.size(); ++t)
      if (!threads_[t].left) present.push_back(t);
    if (present.empty()) return {};
    if (meet(present, Meeting::block)) complete.push_back(present);
    for (unsigned first = 0; first < threads_.size(); first += 32) {
      const Thread* lane = nullptr;
      for (unsigned t = first; t < std::min<size_t>(first + 32, threads_.size()); ++t)
        if (threads_[t].at.kind == Meeting::warp) lane = &threads_[t];
      if (!lane) continue;
      std::vector<unsigned> named;
      for (unsigned t = first; t < first + 32; ++t)
        if (lane->at.mask >> (t % 32) & 1) {
          if (t >= threads_.size() || threads_[t].left)
            fail("a shuffle names a lane that has left, line " + std::to_string(lane->at.line));
          named.push_back(t);
        }
      if (meet(named, Meeting::warp)) complete.push_back(named);
    }
    if (complete.empty()) fail("deadlock: " + waiting(present));
    if (hurry_) {
      std::swap(complete[0], complete[favourite_ % complete.size()]);
      complete.resize(1);
    } else {
      std::shuffle(complete.begin(), complete.end(), random_order);
      complete.resize(1 + random_order() % complete.size());  // the others are late
    }
    std::vector<unsigned> ready;
    for (const auto& threads : complete) ready.insert(ready.end(), threads.begin(), threads.end());
    return ready;
  }

  bool meet(const std::vector<unsigned>& threads, Meeting::Kind kind) const {
    return std::all_of(threads.begin(), threads.end(), [&](unsigned t) {
      return threads_[t].at.kind == kind && threads_[t].at == threads_[threads[0]].at;
    });
  }

  std::string waiting(const std::vector<unsigned>& present) const {
    std::string text;
    for (size_t k = 0; k < present.size(); ++k) {
      const Meeting& at = threads_[present[k]].at;
      size_t same = 1;
      while (k + 1 < present.size() && threads_[present[k + 1]].at == at) ++same, ++k;
      if (text.size() > 200) return text + "...";
      text += std::to_string(same) + " threads at the " + (at.kind == Meeting::block ? "barrier" : "shuffle") +
              " of line " + std::to_string(at.line) + "; ";
    }
    return text;
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("block " + std::to_string(blockIdx.x) + ": " + why);
  }

  std::function<void()> kernel_;
  std::vector<Thread> threads_;
  static inline std::vector<std::unique_ptr<Fiber>> spare_;
  unsigned current_ = 0;
  // In every other block one warp at a time goes as far as it gets: what overtakes by a step must be seen, and by a
  // lap.
  const bool hurry_ = random_order() % 2;
  const unsigned favourite_ = unsigned(random_order());
};

// The registers of a and b that the lanes of a warp bring to c[16, 8] += a * b^T. Lane 4 g + t has rows g and g + 8 of
// a, row g of b, and of each row words t and t + 4; of c the rows of a and columns 2 t and 2 t + 1.
class Fragments {
 public:
  Fragments(const uint32_t (&a)[4], const uint32_t (&b)[2], int line) : block_(*ThreadBlock::running) {
    const dim3 me = threadIdx;
    turn_ = block_.exchange({a[0], a[1], a[2], a[3], b[0], b[1]}, 0xffffffffu, line);
    threadIdx = me;
  }
  uint32_t a(int row, int t, int half) const { return word(row, t, 2 * half + row / 8); }
  uint32_t b(int row, int t, int half) const { return word(row, t, 4 + half); }
  // run(row, column, e) for the four elements of c that this lane has
  template <class Run>
  void each(Run run) const {
    const int g = block_.lane() / 4, t = block_.lane() % 4;
    for (int e = 0; e < 4; ++e) run(g + e / 2 * 8, 2 * t + e % 2, e);
  }

 private:
  uint32_t word(int row, int t, int k) const { return block_.shown(row % 8 * 4 + t, turn_)[k]; }
  ThreadBlock& block_;
  int turn_;
};

}  // namespace cuda_on_cpu

// ---- what a kernel calls --------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  const dim3 me = threadIdx;
  cuda_on_cpu::ThreadBlock::running->wait({cuda_on_cpu::Meeting::block, line, 0});
  threadIdx = me;
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE()) {
  const dim3 me = threadIdx;
  cuda_on_cpu::ThreadBlock::running->wait({cuda_on_cpu::Meeting::warp, line, mask});
  threadIdx = me;
}

inline int32_t __shfl_xor_sync(uint32_t mask, int32_t value, int distance, int line = __builtin_LINE()) {
  const dim3 me = threadIdx;
  const uint32_t other = cuda_on_cpu::ThreadBlock::running->shuffle(uint32_t(value), unsigned(distance), mask, line);
  threadIdx = me;
  return int32_t(other);
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int32_t atomicMax(int32_t* p, int32_t value) { return std::exchange(*p, std::max(*p, value)); }
inline int32_t atomicMin(int32_t* p, int32_t value) { return std::exchange(*p, std::min(*p, value)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }

// ---- what the host calls --------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  static_assert(sizeof(Args) <= 4096, "a kernel takes at most 4096 bytes of arguments");
  if (grid.size() == 0 || block.size() == 0 || block.size() > 1024 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  gridDim = grid, blockDim = block;
  std::vector<size_t> order(grid.size());
  for (size_t b = 0; b < order.size(); ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), cuda_on_cpu::random_order);
  for (size_t b : order) {
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    cuda_on_cpu::ThreadBlock thread_block([&] { kernel(*static_cast<const Args*>(args[0])); });
    cuda_on_cpu::ThreadBlock::running = &thread_block;
    thread_block.run();
  }
  return cudaSuccess;
}
