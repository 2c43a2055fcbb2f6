// y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block
#include "../ops/hadamard.h"

#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

static_assert(kMostHadamard <= kChunk, "a block fits a chunk");

// a + b and a - b of the elements a and b of x [n] that are H apart
template <int64_t H>
void butterflies(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * H) {
    float* __restrict__ first = x + i;
    float* __restrict__ second = x + i + H;
    for (int64_t j = 0; j < H; ++j) {
      const float a = first[j], b = second[j];
      first[j] = a + b;
      second[j] = a - b;
    }
  }
}

template <int64_t H = 1>
void transform(float* x, int64_t n, int64_t block) {
  if constexpr (H < kMostHadamard) {
    if (H >= block) return;
    butterflies<H>(x, n);
    transform<2 * H>(x, n, block);
  }
}

}  // namespace

void hadamard(const Hadamard& p, ParallelFor run) {
  const Encode encode = encoder(p.type, false, false);
  const Decode decode = decoder(p.type);
  const int64_t bytes = row_of(p.type).bytes;
  parallel(run, (p.n + kChunk - 1) / kChunk, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kChunk];
    for (int64_t j = begin * kChunk; j < least(end * kChunk, p.n); j += kChunk) {
      const int64_t n = least(kChunk, p.n - j);
      const char* x = static_cast<const char*>(p.x) + j * bytes;
      if (decode) decode(x, false, buffer, n);
      else __builtin_memcpy(buffer, x, size_t(n * bytes));
      transform(buffer, n, p.block);
      for (int64_t i = 0; i < n; ++i) buffer[i] *= p.factor;
      encode(buffer, nullptr, nullptr, kAsIs, static_cast<char*>(p.y) + j * bytes, n);
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
