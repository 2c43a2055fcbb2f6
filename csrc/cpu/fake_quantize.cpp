// y[i, j] = c[i, j] * scale[i // br, j // bk], c the value of x's code in units of the scale
#include "../ops/fake_quantize.h"
#include "fake_quantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// y[0 .. n), past the caches where that is asked for
template <class F, class X>
void forward(const char* __restrict__ x, const Spread& of, Limits q, bool past_caches, char* __restrict__ y,
             int64_t n) {
  const char* const in[] = {x};
  in_steps<X>(in, past_caches, y, n, [&](auto& from, int64_t offset, int64_t j, char* to) QL_INLINE {
    for (int64_t k = 0; k < kStep; k += kLanes) {
      const int64_t at = k * X::bits / 8;
      store_values<X>(to + at, fake_quantized<F>(load_values<X>(from[0] + offset + at), of.at(j + k), q));
    }
  });
}

using Forward = void (*)(const char* x, const Spread& of, Limits q, bool past_caches, char* y, int64_t n);

struct ForwardRows {
  const FakeQuantize& p;
  const Grid& grid;
  const Forward forward;
  const Row x_row = row_of(p.x_type);
  const bool past_caches = streams(grid.M * grid.K * x_row.bytes);
  Spread of = {};

  void spread(int64_t I, int64_t j, int64_t n) { of.fill(p, grid, I, j, n); }

  void row(int64_t i, int64_t j, int64_t n) {
    const int64_t at = byte_offset(x_row, grid.K, i, j);
    forward(static_cast<const char*>(p.x) + at, of, limits_of(p), past_caches, static_cast<char*>(p.y) + at, n);
  }
};

}  // namespace

void fake_quantize(const FakeQuantize& p, ParallelFor run) {
  const Grid grid = collapse(p.grid);
  const Forward kernel = with_types(p, [](auto f, auto x) -> Forward { return forward<decltype(f), decltype(x)>; });
  const bool flat = grid.M == 1;
  parallel_pieces(run, grid, flat ? 1 : 64, flat ? kGrain : kChunk,
                  [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
                    ForwardRows rows{p, grid, kernel};
                    walk(grid, i0, i1, j0, j1, rows);
                  });
}

}  // namespace QL_ISA
}  // namespace quantlib
