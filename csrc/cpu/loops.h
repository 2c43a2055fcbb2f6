// Shared by the ops: the elements of one row in chunks that stay in the first-level cache, x and codes through FP32.
// Everything here has internal linkage or lives in namespace QL_ISA, and nothing comes from the C++ library: a function
// that two instruction sets both emitted under one name would be linked once, and might be the wrong one.
#pragma once
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include "../packing.h"
#include "kernels.h"

namespace quantlib {
namespace QL_ISA {

constexpr int64_t kChunk = 1024;   // elements: x, r and zero_point of a chunk and its codes take 13 KiB
constexpr int64_t kGrain = 32768;  // elements a thread is worth waking for

// ---- one chunk: encode.cpp and decode.cpp ---------------------------------------------------------------------------

// The way in which codes are made and written.
struct Store {
  bool saturate;
  bool stream;                 // past the caches
  const char* next = nullptr;  // fetched into the second-level cache meanwhile, next_bytes for each element
  int next_bytes = 0;
};
constexpr Store kAsIs = {false, false};

// An output too large to be found in a cache later is streamed, which spares the memory a read.
static inline bool streams(int64_t bytes) { return bytes >= int64_t(16) << 20; }

// codes[j] = encode(x[j]); encode(fl(x[j] * r[j])) where scaled, zero_point[j] added where affine. Store comes by
// reference: a copy made for each row would be read while its parts are still being stored, and wait for all stores.
using Encode = void (*)(const float* x, const float* r, const int32_t* zero_point, const Store& how, void* codes,
                        int64_t n);
Encode encoder(Type format, bool scaled, bool affine);

// y[j] = the value of codes[j], exact; null for float32
using Decode = void (*)(const void* codes, bool stream, float* y, int64_t n);
Decode decoder(Type format);

static inline int32_t clamp_zero_point(int32_t z, const Row& f) {
  return z < f.qmin ? f.qmin : z > f.qmax ? f.qmax : z;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- granularity ----------------------------------------------------------------------------------------------------

// The same elements, per_byte of which share a byte, as one long row where blocks are contiguous runs of them; [M, K]
// and its blocks otherwise.
static inline Grid collapse(Grid g, int per_byte = 1) {
  g.br = least(g.br, g.M), g.bk = least(g.bk, g.K);
  const bool whole_bytes = g.K % per_byte == 0 || g.M == 1;
  if (!whole_bytes || (g.bk < g.K && (g.br > 1 || g.K % g.bk))) return g;
  return {1, g.M * g.K, 1, g.br * g.bk};
}

// out[j] = make(values[j / bk]) for the columns j .. j + n of a row, values being the row of `scale` that serves it
template <class Value, class Out, class Make>
static inline void spread(const Value* values, int64_t bk, int64_t j, int64_t n, Out* __restrict__ out, Make make) {
  for (int64_t J = j / bk, start = 0; start < n; ++J) {
    const int64_t end = least(n, (J + 1) * bk - j);
    const Out value = make(values[J]);
    for (int64_t k = start; k < end; ++k) out[k] = value;
    start = end;
  }
}

// Rows i0 .. i1 and columns j0 .. j1 chunk by chunk: worker.spread(I, j, n) before the first row of every block row I,
// then worker.row(i, j, n) for each row i. Scales that stay the same are not spread again.
template <class Worker>
static inline void walk(const Grid& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Worker& worker) {
  int64_t spread_block = -1, spread_n = 0;  // the one block that the worker's buffers hold, where it is one
  for (int64_t j = j0; j < j1; j += kChunk) {
    const int64_t n = least(kChunk, j1 - j), J = j / g.bk;
    const bool one_block = (j + n - 1) / g.bk == J;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t block = i / g.br * g.scale_cols() + J;
      if ((i == i0 || i % g.br == 0) && !(one_block && block == spread_block && n <= spread_n)) {
        worker.spread(i / g.br, j, n);
        spread_block = one_block ? block : -1, spread_n = n;
      }
      worker.row(i, j, n);
    }
  }
}

// ---- threads --------------------------------------------------------------------------------------------------------

// Gradual underflow and rounding to nearest, whatever the caller's thread is set to (C0).
class DefaultFloats {
#if defined(__x86_64__)
  const unsigned saved = _mm_getcsr();

 public:
  DefaultFloats() { _mm_setcsr(0x1f80); }
  ~DefaultFloats() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;

 public:
  DefaultFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~DefaultFloats() { asm volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

template <class Body>
static inline void parallel(ParallelFor run, int64_t n, int64_t grain, const Body& body) {
  run(
      0, n, grain,
      [](int64_t begin, int64_t end, void* context) {
        const DefaultFloats guard;
        (*static_cast<const Body*>(context))(begin, end);
#ifdef __x86_64__
        _mm_sfence();  // what was streamed is there before the threads meet
#endif
      },
      const_cast<Body*>(&body));
}

// Pieces of `step` columns by `strip` rows, numbered along the rows.
template <class Body>
static inline void parallel_pieces(ParallelFor run, const Grid& g, int64_t strip, int64_t step, const Body& body) {
  const int64_t across = (g.K + step - 1) / step, down = (g.M + strip - 1) / strip;
  parallel(run, across * down, most(1, kGrain / (strip * least(step, g.K))), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t i = piece / across * strip, j = piece % across * step;
      body(i, least(i + strip, g.M), j, least(j + step, g.K));
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
