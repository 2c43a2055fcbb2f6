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

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memory::write_from_host(p, bytes);
  std::memset(p, value, bytes);
  return cudaSuccess;
}

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

}  // namespace cuda
}  // namespace quantlib
