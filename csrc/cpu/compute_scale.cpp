// scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or the affine scale
// and zero_point of its range
#include "range.h"

namespace quantlib {
namespace QL_ISA {
namespace {

template <class Bits, class Signed>
Range range_of(const Bits* x, int64_t n) {
  Signed highest = 0;
  Bits lowest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const Signed bits = Signed(x[j]);
    highest = bits > highest ? bits : highest;
    lowest = x[j] > lowest ? x[j] : lowest;
  }
  return {highest, lowest};
}

template <class Bits, class Signed>
void widen_columns(const Bits* x, int64_t n, int32_t* __restrict__ highest, uint32_t* __restrict__ lowest) {
  for (int64_t j = 0; j < n; ++j) {
    const int32_t bits = Signed(x[j]);
    highest[j] = bits > highest[j] ? bits : highest[j];
    lowest[j] = x[j] > lowest[j] ? x[j] : lowest[j];
  }
}

// The bits of x_type as a value; 16 bits or 32.
float value(Type x_type, uint32_t bits) {
  return x_type == Type::float32   ? float_of(bits)
         : x_type == Type::float16 ? decode_float<float16>(bits)
                                   : decode_float<bfloat16>(bits);
}

template <class F>
void scales_of(const float* lowest, const float* highest, int64_t n, float* scale, int32_t* zero_point) {
  if constexpr (!F::is_float)
    if (zero_point) {
      for (int64_t k = 0; k < n; ++k) {
        const Affine affine = affine_scale<F>(lowest[k], highest[k]);
        scale[k] = affine.scale, zero_point[k] = affine.zero_point;
      }
      return;
    }
  for (int64_t k = 0; k < n; ++k) {
    const uint32_t a = bits_of(lowest[k]) & 0x7fffffffu, b = bits_of(highest[k]) & 0x7fffffffu;
    scale[k] = symmetric_scale<F>(a > b ? a : b);
  }
}

}  // namespace

Range RangeRows::row(int64_t i, int64_t j, int64_t n) const {
  const int64_t at = i * grid.K + j;
  return p.x_type == Type::float32 ? range_of<uint32_t, int32_t>(static_cast<const uint32_t*>(p.x) + at, n)
                                   : range_of<uint16_t, int16_t>(static_cast<const uint16_t*>(p.x) + at, n);
}

void RangeRows::blocks(int64_t i0, int64_t i1, int64_t J0, int64_t J1, Range* out) const {
  if (i1 - i0 == 1 || grid.bk >= 64) {
    const int64_t bytes = row_of(p.x_type).bytes;
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t J = J0; J < J1; ++J) {
        const int64_t j = J * grid.bk, n = least(grid.bk, grid.K - j);
        const char* below = static_cast<const char*>(p.x) + ((i + 1) * grid.K + j) * bytes;
        if (i + 1 < i1)
          for (int64_t k = 0; k < n * bytes; k += 64) __builtin_prefetch(below + k, 0, 2);
        const Range range = row(i, j, n);
        out[J - J0] = i == i0 ? range : merge(out[J - J0], range);
      }
    return;
  }
  // Narrow blocks of many rows: down the columns first, across each block once.
  int32_t highest[kChunk];
  uint32_t lowest[kChunk];
  const int64_t step = kChunk / grid.bk;
  for (int64_t J = J0; J < J1; J += step) {
    const int64_t j0 = J * grid.bk, n = least(least(J + step, J1) * grid.bk, grid.K) - j0;
    for (int64_t j = 0; j < n; ++j) highest[j] = 0, lowest[j] = 0;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t at = i * grid.K + j0;
      if (p.x_type == Type::float32)
        widen_columns<uint32_t, int32_t>(static_cast<const uint32_t*>(p.x) + at, n, highest, lowest);
      else widen_columns<uint16_t, int16_t>(static_cast<const uint16_t*>(p.x) + at, n, highest, lowest);
    }
    for (int64_t j = 0; j < n; ++j) {
      Range& range = out[J - J0 + j / grid.bk];
      if (j % grid.bk == 0) range = {0, 0};
      range = merge(range, {highest[j], lowest[j]});
    }
  }
}

void RangeRows::finish(int64_t I, int64_t J0, int64_t J1, const Range* range) const {
  const uint32_t sign = p.x_type == Type::float32 ? 0x80000000u : 0x8000u;
  float lowest[kBlocks], highest[kBlocks];
  const int64_t n = J1 - J0, at = I * grid.scale_cols() + J0;
  for (int64_t k = 0; k < n; ++k) {
    const float high = value(p.x_type, uint32_t(range[k].highest));
    const float low = range[k].lowest & sign ? value(p.x_type, range[k].lowest) : 0.0f;
    const bool is_nan = high != high || low != low;
    highest[k] = is_nan ? float_of(kNaN) : high, lowest[k] = is_nan ? float_of(kNaN) : low;
  }
  visit(p.format, [&](auto f) {
    using F = decltype(f);
    if constexpr (F::bits < 32)
      scales_of<F>(lowest, highest, n, p.scale + at, p.zero_point ? p.zero_point + at : nullptr);
  });
}

void compute_scale(const ComputeScale& p, ParallelFor run) { reduce_blocks(run, RangeRows{p, collapse(p.grid)}); }

}  // namespace QL_ISA
}  // namespace quantlib
