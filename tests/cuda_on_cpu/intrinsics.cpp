// The instructions of csrc/cuda/intrinsics.cuh. A product of a warp gathers the registers of its lanes. Harsher than a
// GPU: an fma2 that rounds is an error, for decoding a code must be exact, and sums are cut off to binary32, as tensor
// cores do it.
#include "cuda/intrinsics.cuh"

#include <algorithm>
#include <utility>

#include "block.h"
#include "memory.h"

using cuda_on_cpu::fail;
using cuda_on_cpu::ThreadBlock;
namespace memory = cuda_on_cpu::memory;

// ---- those of cuda_runtime.h ----------------------------------------------------------------------------------------

using cuda_on_cpu::Meeting;

void __syncthreads(int line) { ThreadBlock::running->wait({Meeting::block, line, 0}); }
void __syncwarp(uint32_t mask, int line) { ThreadBlock::running->wait({Meeting::warp, line, mask}); }

// The value of lane `from`, or the own one where there is no such lane.
static int32_t shuffle(uint32_t mask, int32_t value, int from, int line) {
  ThreadBlock& block = *ThreadBlock::running;
  if (from < 0 || from > 31) from = block.lane();
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask, line " + std::to_string(line));
  return int32_t(block.shown(from, block.exchange({uint32_t(value)}, mask, line))[0]);
}
static int lane() { return ThreadBlock::running->lane(); }
int32_t __shfl_sync(uint32_t mask, int32_t value, int from, int line) { return shuffle(mask, value, from & 31, line); }
int32_t __shfl_xor_sync(uint32_t mask, int32_t value, int distance, int line) {
  return shuffle(mask, value, lane() ^ distance, line);
}
int32_t __shfl_up_sync(uint32_t mask, int32_t value, unsigned distance, int line) {
  return shuffle(mask, value, lane() - int(distance), line);
}
int32_t __shfl_down_sync(uint32_t mask, int32_t value, unsigned distance, int line) {
  return shuffle(mask, value, lane() + int(distance), line);
}

uint32_t __ballot_sync(uint32_t mask, int predicate, int line) {
  ThreadBlock& block = *ThreadBlock::running;
  const int turn = block.exchange({uint32_t(predicate != 0)}, mask, line);
  uint32_t votes = 0;
  for (int from = 0; from < 32; ++from)
    if (mask >> from & 1) votes |= block.shown(from, turn)[0] << from;
  return votes;
}
int __any_sync(uint32_t mask, int predicate, int line) { return __ballot_sync(mask, predicate, line) != 0; }
int __all_sync(uint32_t mask, int predicate, int line) { return __ballot_sync(mask, predicate, line) == mask; }

template <class T, class Run>
static T atomic(T* p, const void* from, Run run) {
  memory::touch(p, sizeof *p, memory::Access::atomic, from);
  return std::exchange(*p, run(*p));
}
int32_t atomicMax(int32_t* p, int32_t value) {
  return atomic(p, __builtin_return_address(0), [&](int32_t old) { return std::max(old, value); });
}
int32_t atomicMin(int32_t* p, int32_t value) {
  return atomic(p, __builtin_return_address(0), [&](int32_t old) { return std::min(old, value); });
}
uint32_t atomicAdd(uint32_t* p, uint32_t value) {
  return atomic(p, __builtin_return_address(0), [&](uint32_t old) { return old + value; });
}
void __threadfence() { memory::fence(); }

const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "invalid configuration argument";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memory::write_from_host(p, bytes);
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// ---- those of csrc/cuda/intrinsics.cuh ------------------------------------------------------------------------------

namespace quantlib {
namespace cuda {

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15, byte = uint32_t(bytes >> (8 * (pick & 7))) & 0xff;
    y |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return y;
}

template <class X>
static float half_of(uint32_t pair, int half) {
  return decode_float<X>(pair >> (16 * half) & 0xffffu);
}

template <class X>
static uint32_t exact_fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y = 0;
  for (int half = 0; half < 2; ++half) {
    const double exact = double(half_of<X>(a, half)) * half_of<X>(b, half) + half_of<X>(c, half);
    const uint32_t code = encode_float<X>(float(exact), false);
    if (exact == exact && decode_float<X>(code) != exact) fail("a code became another value");
    y |= code << (16 * half);
  }
  return y;
}
uint32_t fma2(float16, uint32_t a, uint32_t b, uint32_t c) { return exact_fma2<float16>(a, b, c); }
uint32_t fma2(bfloat16, uint32_t a, uint32_t b, uint32_t c) { return exact_fma2<bfloat16>(a, b, c); }

// The registers of a and b that the lanes of a warp bring to c[16, 8] += a * b^T. Lane 4 g + t has rows g and g + 8 of
// a, row g of b, and of each row words t and t + 4; of c the rows of a and columns 2 t and 2 t + 1.
class Fragments {
 public:
  Fragments(const uint32_t (&a)[4], const uint32_t (&b)[2], int line) : block_(*ThreadBlock::running) {
    turn_ = block_.exchange({a[0], a[1], a[2], a[3], b[0], b[1]}, 0xffffffffu, line);
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

template <class X>
static void mma_of(float (&c)[4], const Fragments& warp) {
  warp.each([&](int row, int column, int e) {
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, half = k / 8;
      sum += double(half_of<X>(warp.a(row, t, half), k % 2)) * half_of<X>(warp.b(column, t, half), k % 2);
    }
    const float nearest = float(sum);
    c[e] = std::fabs(nearest) > std::fabs(sum) && std::fabs(sum) < 3.4e38 ? std::nextafter(nearest, 0.0f) : nearest;
  });
}
void mma(float16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  mma_of<float16>(c, Fragments(a, b, line));
}
void mma(bfloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  mma_of<bfloat16>(c, Fragments(a, b, line));
}

void mma(int8, int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  const Fragments warp(a, b, line);
  warp.each([&](int row, int column, int e) {
    const auto byte = [](uint32_t word, int k) { return int32_t(int8_t(word >> (8 * (k % 4)))); };
    uint32_t sum = uint32_t(c[e]);
    for (int k = 0; k < 32; ++k)
      sum += uint32_t(byte(warp.a(row, k % 16 / 4, k / 16), k) * byte(warp.b(column, k % 16 / 4, k / 16), k));
    c[e] = int32_t(sum);
  });
}

// What was at `to` is gone when a copy to it begins, and what comes is there when its thread has waited.
void copy_async(void* to, const void* from, int bytes) {
  const void* code = __builtin_return_address(0);
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) fail("misaligned: an asynchronous copy of 16 bytes");
  if (bytes > 0) memory::touch(from, size_t(bytes), memory::Access::read, code);
  memory::start_copy(to, 16, code);
  std::memset(to, 0xa5, 16);
  auto& copies = ThreadBlock::running->me().copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, bytes});
}

void commit_copies() {
  auto& copies = ThreadBlock::running->me().copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}

void wait_copies(int groups_left) {
  const void* code = __builtin_return_address(0);
  auto& copies = ThreadBlock::running->me().copies;
  while (int(copies.size()) - 1 > groups_left) {
    for (const cuda_on_cpu::Copy& copy : copies.front()) {
      memory::finish_copy(copy.to, 16, code);
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
    copies.erase(copies.begin());
  }
}

}  // namespace cuda
}  // namespace quantlib
