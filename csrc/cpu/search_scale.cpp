// found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error
#include "../ops/search_scale.h"

#include "../fake_quantize.h"
#include "lanes.h"
#include "loops.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int kParts = 17, kSums = 16;  // scales that are tried; sums of a row of a block, whatever the instruction set
constexpr int kSumRegisters = kSums / kLanes;

// 32, 31, .., 20, 33, .., 36 of 32, then the same with the other sign
QL_FN float part(int k) {
  const int n = k % kParts;
  return float(n < 13 ? 32 - n : 20 + n) / (k < kParts ? 32.0f : -32.0f);
}

// s as a number of F: |s| within its smallest above 0 and its largest, rounded to nearest; NaN stays.
template <class F>
QL_FN float narrowed(float s) {
  if constexpr (F::bits == 32) {
    return s;
  } else {
    const float magnitude = float_of(bits_of(s) & 0x7fffffffu);
    const float clamped = min(max(magnitude, decode_float<F>(1)), float_of(F::max));
    return s == s ? decode_float<F>(encode_float<F>(s < 0 ? -clamped : clamped, true)) : s;
  }
}
QL_FN float narrowed(float s, Type kept) {
  return kept == Type::float32 ? s : kept == Type::float16 ? narrowed<float16>(s) : narrowed<bfloat16>(s);
}

// sums[l] += the errors of columns l, l + kSums, .. of n, with codes in units of 1 / r between the limits
template <class F, bool MAGNITUDE>
void add_errors(const float* x, const float* energy, int64_t n, float r, Limits q, float* sums) {
  Floats total[kSumRegisters];
  for (int k = 0; k < kSumRegisters; ++k) total[k] = load<Floats>(sums + k * kLanes);
  const Floats by = splat<Floats>(r), lowest = splat<Floats>(q.qmin), highest = splat<Floats>(q.qmax);
  for (int64_t j = 0; j < n; j += kSums)
#pragma GCC unroll 4
    for (int k = 0; k < kSumRegisters; ++k) {
      const int64_t at = j + k * kLanes;
      const Floats t = mul(load<Floats>(x + at), by);
      Floats c;
      if constexpr (F::is_float) c = decode_float<F, Floats>(encode_float<F>(t, true));
      else c = nearest(clamp(t, lowest, highest));
      const Floats u = sub(c, t);
      Floats e = mul(u, u);
      if constexpr (MAGNITUDE) e = mul(e, same_bits<Floats>(bits_of(t) & 0x7fffffffu));
      total[k] = add(total[k], mul(e, load<Floats>(energy + at)));
    }
  for (int k = 0; k < kSumRegisters; ++k) store(sums + k * kLanes, total[k]);
}

// Neighbours are added, until one is left.
QL_FN float in_pairs(float* sums) {
  for (int n = kSums / 2; n; n /= 2)
    for (int l = 0; l < n; ++l) sums[l] = add(sums[2 * l], sums[2 * l + 1]);
  return sums[0];
}

using AddErrors = void (*)(const float* x, const float* energy, int64_t n, float r, Limits q, float* sums);

AddErrors adder(Type format, bool magnitude) {
  const auto choose = [&](auto f) -> AddErrors {
    return magnitude ? add_errors<decltype(f), true> : add_errors<decltype(f), false>;
  };
  return visit(format, [&](auto f) -> AddErrors {
    using F = decltype(f);
    if constexpr (F::bits == 32) return nullptr;  // no target
    else if constexpr (F::is_float) return choose(f);
    else return choose(Integer{});
  });
}

// The lowest and the highest code less the zero point.
Limits limits(Type format, const int32_t* zero_point) {
  return visit(format, [&](auto f) -> Limits {
    using F = decltype(f);
    if constexpr (F::is_float) return {};
    else if (!zero_point) return {float(F::qmin), float(F::qmax)};
    else {
      const int32_t z = quantlib::clamp_zero_point<F, true>(*zero_point);
      return {float(F::affine_qmin - z), float(F::affine_qmax - z)};
    }
  });
}

struct Searched {
  const SearchScale& p;
  const Grid grid;
  const Row x_row = row_of(p.x_type);
  const Decode decode = decoder(p.x_type);
  const bool magnitude = p.by_magnitude;
  const int parts = p.is_signed ? 2 * kParts : kParts;
  const AddErrors add_errors = adder(p.format, magnitude);
  const float scale_max = float_of(row_of(p.format).scale_max);
  alignas(64) float x[kChunk], energy[kChunk], sums[2 * kParts][kSums];

  // x and energy of columns j .. j + n of row i, and zeros up to a multiple of kSums; that is returned.
  int64_t fill(int64_t i, int64_t j, int64_t n) {
    const char* from = static_cast<const char*>(p.x) + byte_offset(x_row, grid.K, i, j);
    if (decode) decode(from, false, x, n);
    else __builtin_memcpy(x, from, size_t(n) * sizeof *x);
    if (p.energy) __builtin_memcpy(energy, p.energy + j, size_t(n) * sizeof *energy);
    else
      for (int64_t k = 0; k < n; ++k) energy[k] = 1.0f;
    const int64_t whole = (n + kSums - 1) / kSums * kSums;
    for (int64_t k = n; k < whole; ++k) x[k] = energy[k] = 0.0f;
    return whole;
  }

  float search(int64_t I, int64_t J) {
    const int64_t b = I * grid.scale_cols() + J, j0 = J * grid.bk, j1 = least(j0 + grid.bk, grid.K);
    const Limits q = limits(p.format, p.zero_point ? p.zero_point + b : nullptr);
    const float s0 = effective_scale(p.scale[b], scale_max), r0 = reciprocal(s0);
    // 1. parts of the scale, as they will be kept
    float s[2 * kParts], r[2 * kParts], total[2 * kParts] = {};
    for (int k = 0; k < parts; ++k) {
      s[k] = effective_scale(narrowed(mul(s0, part(k)), p.kept), scale_max);
      r[k] = reciprocal(s[k]);
    }
    // 2. the errors of the codes in units of each
    for (int64_t i = I * grid.br; i < least((I + 1) * grid.br, grid.M); ++i) {
      __builtin_memset(sums, 0, sizeof sums);
      for (int64_t j = j0; j < j1; j += kChunk) {
        const int64_t n = fill(i, j, least(kChunk, j1 - j));
        for (int k = 0; k < parts; ++k) add_errors(x, energy, n, r[k], q, sums[k]);
      }
      for (int k = 0; k < parts; ++k) total[k] = add(total[k], in_pairs(sums[k]));
    }
    // 3. in units of the first scale; a later one must be better
    float best = __builtin_inff(), found = s[0];
    for (int k = 0; k < parts; ++k) {
      const float share = float_of(bits_of(mul(s[k], r0)) & 0x7fffffffu);
      float loss = mul(mul(total[k], share), share);
      if (magnitude) loss = mul(loss, share);
      if (loss < best) best = loss, found = s[k];
    }
    return found;
  }
};

}  // namespace

void search_scale(const SearchScale& p, ParallelFor run) {
  const Grid g = {p.grid.M, p.grid.K, least(p.grid.br, p.grid.M), least(p.grid.bk, p.grid.K)};
  const int64_t cols = g.scale_cols();
  parallel(run, g.scale_rows() * cols, most(1, kGrain / kParts / (g.br * g.bk)), [&](int64_t begin, int64_t end) {
    Searched blocks{p, g};
    for (int64_t b = begin; b < end; ++b) p.found[b] = blocks.search(b / cols, b % cols);
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
