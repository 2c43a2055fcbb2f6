// dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? c - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)
#include "../ops/fake_quantize_backward.h"
#include "blocks.h"
#include "fake_quantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int kAcross = kStep / kLanes;  // registers of a step
constexpr int64_t kNarrow = 128;         // blocks of fewer columns are summed down the columns first
constexpr int64_t kStrip = 64;           // as far as that goes in FP32

// The gradients of one scale and one zero point.
struct ScaleSums {
  double scale, zero_point;
};

QL_FN ScaleSums merge(ScaleSums a, ScaleSums b) { return {a.scale + b.scale, a.zero_point + b.zero_point}; }

// The same for every lane of a step or of a chunk.
struct LaneSums {
  Floats scale, zero_point;
};

template <class F, class X, bool LSQ, bool AFFINE>
struct Kernels {
  // kLanes elements: dx, and what they add to `sums`
  static QL_MEMBER void lanes(const char* dy, const char* x, const Shared<Floats>& of, Limits q, LaneSums& sums,
                              char* dx) {
    const Gradients<Floats> g = gradients<F, LSQ>(load_values<X>(dy), load_values<X>(x), of, q);
    store_bits<X>(dx, load_bits<X>(dy) & same_bits<Bits<Floats>>(g.inside));  // dy's own bits, whatever they mean
    sums.scale = add(sums.scale, g.scale);
    if (AFFINE) sums.zero_point = add(sums.zero_point, g.zero_point);
  }

  // n elements of one block
  static ScaleSums one_block(const char* __restrict__ dy, const char* __restrict__ x, const Shared<Floats>& of_block,
                             Limits q, bool past_caches, char* __restrict__ dx, int64_t n) {
    const char* const in[] = {dy, x};
    const Shared<Floats> of = of_block;
    LaneSums sums[kAcross] = {};
    in_steps<X>(in, past_caches, dx, n, [&](auto& from, int64_t offset, int64_t, char* to) QL_INLINE {
#pragma GCC unroll 4
      for (int k = 0; k < kAcross; ++k) {
        const int64_t at = k * kLanes * X::bits / 8;
        lanes(from[0] + offset + at, from[1] + offset + at, of, q, sums[k], to + at);
      }
    });
    ScaleSums total = {};
    for (const LaneSums& lane : sums)
      for (int k = 0; k < kLanes; ++k) total = merge(total, {lane.scale[k], lane.zero_point[k]});
    return total;
  }

  // n elements of several blocks, added to a sum each
  static void columns(const char* __restrict__ dy, const char* __restrict__ x, const Spread& of, Limits q,
                      bool past_caches, char* __restrict__ dx, int64_t n, LaneSums* __restrict__ sums) {
    const char* const in[] = {dy, x};
    in_steps<X>(in, past_caches, dx, n, [&](auto& from, int64_t offset, int64_t j, char* to) QL_INLINE {
      for (int64_t k = 0; k < kStep; k += kLanes) {
        const int64_t at = offset + k * X::bits / 8;
        lanes(from[0] + at, from[1] + at, of.at(j + k), q, sums[(j + k) / kLanes], to + k * X::bits / 8);
      }
    });
  }
};

struct GradientRows {
  using Partial = ScaleSums;
  const FakeQuantizeBackward& p;
  const Grid grid;
  decltype(&Kernels<Integer, float32, false, false>::one_block) one_block;
  decltype(&Kernels<Integer, float32, false, false>::columns) columns;
  const Row x_row = row_of(p.x_type);
  const bool past_caches = streams(grid.M * grid.K * x_row.bytes);

  // Compute dx and the sums of columns j .. j + n of row i, which lie in one block.
  ScaleSums row(int64_t i, int64_t j, int64_t n) const {
    const int64_t block = i / grid.br * grid.scale_cols() + j / grid.bk;
    const float s = effective_scale(p.scale[block], float_of(row_of(p.format).scale_max));
    const float z = p.zero_point ? code_of(p.zero_point[block], limits_of(p)) : 0.0f;
    const Shared<Floats> of = {splat<Floats>(reciprocal(s)), splat<Floats>(s), splat<Floats>(z)};
    ScaleSums sums = {};
    for (int64_t k = 0; k < n; k += kResident) {
      const int64_t at = byte_offset(x_row, grid.K, i, j + k);
      sums = merge(sums, one_block(dy(at), x(at), of, limits_of(p), past_caches, dx(at), least(kResident, n - k)));
    }
    return sums;
  }

  void blocks(int64_t i0, int64_t i1, int64_t J0, int64_t J1, ScaleSums* out) const {
    for (int64_t J = J0; J < J1; ++J) out[J - J0] = {};
    if (grid.bk >= kNarrow) {
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t J = J0; J < J1; ++J) {
          const int64_t j = J * grid.bk;
          out[J - J0] = merge(out[J - J0], row(i, j, least(grid.bk, grid.K - j)));
        }
      return;
    }
    Spread of = {};
    LaneSums lane[kChunk / kLanes];
    const int64_t step = kChunk / grid.bk;
    for (int64_t J = J0; J < J1; J += step) {
      const int64_t j = J * grid.bk, n = least(least(J + step, J1) * grid.bk, grid.K) - j;
      of.fill(p, grid, i0 / grid.br, j, n);
      for (int64_t top = i0; top < i1; top += kStrip) {
        for (LaneSums& sums : lane) sums = LaneSums{};
        for (int64_t i = top; i < least(top + kStrip, i1); ++i) {
          const int64_t at = byte_offset(x_row, grid.K, i, j);
          columns(dy(at), x(at), of, limits_of(p), past_caches, dx(at), n, lane);
        }
        for (int64_t k = 0; k < n; ++k) {
          ScaleSums& sums = out[J - J0 + k / grid.bk];
          const LaneSums& column = lane[k / kLanes];
          sums = merge(sums, {column.scale[k % kLanes], column.zero_point[k % kLanes]});
        }
      }
    }
  }

  void finish(int64_t I, int64_t J0, int64_t J1, const ScaleSums* sums) const {
    const int64_t at = I * grid.scale_cols();
    for (int64_t J = J0; J < J1; ++J) {
      p.dscale[at + J] = canonical(mul(float(sums[J - J0].scale), p.grad_factor));
      if (p.dzero_point) p.dzero_point[at + J] = canonical(mul(float(sums[J - J0].zero_point), p.grad_factor));
    }
  }

 private:
  const char* dy(int64_t at) const { return static_cast<const char*>(p.dy) + at; }
  const char* x(int64_t at) const { return static_cast<const char*>(p.x) + at; }
  char* dx(int64_t at) const { return static_cast<char*>(p.dx) + at; }
};

template <class F, class X, bool LSQ, bool AFFINE>
void backward(const FakeQuantizeBackward& p, ParallelFor run) {
  using K = Kernels<F, X, LSQ, AFFINE>;
  reduce_blocks(run, GradientRows{p, collapse(p.grid), K::one_block, K::columns});
}

}  // namespace

void fake_quantize_backward(const FakeQuantizeBackward& p, ParallelFor run) {
  with_types(p, [&](auto f, auto x) {
    using F = decltype(f);
    using X = decltype(x);
    if constexpr (!F::is_float)
      if (p.zero_point) return p.lsq_mask ? backward<F, X, true, true>(p, run) : backward<F, X, false, true>(p, run);
    return p.lsq_mask ? backward<F, X, true, false>(p, run) : backward<F, X, false, false>(p, run);
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
