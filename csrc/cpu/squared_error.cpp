// signal[i] = sum over j of x[i, j]^2, noise[i] = sum over j of (x[i, j] - decode(codes[i, j]) * scale[i / br, j /
// bk])^2
#include "fake_quantize.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int kChains = kStep / kLanes;  // sums of a register that do not wait for one another

struct Sums {
  double signal = 0.0, noise = 0.0;
};

// Add n elements, at most kChunk: few enough to be summed in FP32. `value(j)` is the register of values from element j
// on; `one(j)` is the value of one.
template <class X, class Value, class One>
QL_FN Sums squares(const char* x, int64_t n, const Value& value, const One& one) {
  Floats signal[kChains] = {}, noise[kChains] = {};
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const int64_t k = j + c * kLanes;
      const Floats a = load_values<X>(x + bytes_of<X>(k)), error = sub(a, value(k));
      signal[c] = add(signal[c], mul(a, a));
      noise[c] = add(noise[c], mul(error, error));
    }
  }
  Sums total;
  for (int c = 0; c < kChains; ++c)
    for (int l = 0; l < kLanes; ++l) total.signal += signal[c][l], total.noise += noise[c][l];
  if (j == n) return total;
  char rest[kStep * 4] = {};
  alignas(64) float floats[kStep];
  __builtin_memcpy(rest, x + bytes_of<X>(j), size_t(bytes_of<X>(n - j)));
  for (int64_t k = 0; k < kStep; k += kLanes) store(floats + k, load_values<X>(rest + bytes_of<X>(k)));
  for (int64_t k = 0; j + k < n; ++k) {
    const float a = floats[k], error = sub(a, one(j + k));
    total.signal += mul(a, a), total.noise += mul(error, error);
  }
  return total;
}

// Codes of eight bits and of one block meet their scale in a register.
template <class F, class X>
Sums of_block(const char* x, const char* codes, float scale, float zero_point, int64_t n) {
  const Floats s = splat<Floats>(scale), z = splat<Floats>(zero_point);
  return squares<X>(
      x, n, [&](int64_t j) QL_INLINE { return mul(sub(Lanes<Floats>::of(widen<F::is_signed>(codes + j)), z), s); },
      [&](int64_t j) QL_INLINE {
        const float code = F::is_signed ? float(int8_t(codes[j])) : float(uint8_t(codes[j]));
        return mul(sub(code, zero_point), scale);
      });
}

// Others lie in memory as floats before they are scaled.
template <class X>
Sums of_chunk(const char* x, const float* value, const float* s, int64_t n) {
  return squares<X>(
      x, n, [&](int64_t j) QL_INLINE { return mul(load<Floats>(value + j), load<Floats>(s + j)); },
      [&](int64_t j) QL_INLINE { return mul(value[j], s[j]); });
}

using OfBlock = Sums (*)(const char* x, const char* codes, float scale, float zero_point, int64_t n);
using OfChunk = Sums (*)(const char* x, const float* value, const float* s, int64_t n);

template <class X>
OfBlock block_of(Type format) {
  return visit(format, [](auto f) -> OfBlock {
    using F = decltype(f);
    if constexpr (!F::is_float && is_whole<F>) return of_block<F, X>;
    else return nullptr;
  });
}

struct ErrorRows {
  const SquaredError& p;
  const Row format = row_of(p.format);
  const Row x_row = row_of(p.x_type);
  const Decode decode = decoder(p.format);
  OfBlock of_block;
  OfChunk of_chunk;
  alignas(64) float value[kChunk], s_eff[kChunk], zero_point[kChunk];

  template <class X>
  ErrorRows(const SquaredError& p, X) : p(p), of_block(block_of<X>(p.format)), of_chunk(QL_ISA::of_chunk<X>) {}

  void spread(int64_t I, int64_t j, int64_t n) {
    const int64_t row = I * p.grid.scale_cols();
    const Row f = format;
    QL_ISA::spread(p.scale + row, p.grid.bk, j, n, s_eff,
                   [=](float s) { return effective_scale(s, float_of(f.scale_max)); });
    if (p.zero_point)
      QL_ISA::spread(p.zero_point + row, p.grid.bk, j, n, zero_point,
                     [=](int32_t z) { return float(clamp_zero_point(z, f)); });
  }

  void row(int64_t i, int64_t j, int64_t n) {
    const char* x = static_cast<const char*>(p.x) + byte_offset(x_row, p.grid.K, i, j);
    const char* codes = static_cast<const char*>(p.codes) + byte_offset(format, p.grid.K, i, j);
    Sums sums;
    if (of_block && j / p.grid.bk == (j + n - 1) / p.grid.bk) {
      sums = of_block(x, codes, s_eff[0], p.zero_point ? zero_point[0] : 0.0f, n);
    } else {
      decode(codes, false, value, n);
      if (p.zero_point)
        for (int64_t k = 0; k < n; ++k) value[k] = sub(value[k], zero_point[k]);
      sums = of_chunk(x, value, s_eff, n);
    }
    p.signal[i] += sums.signal, p.noise[i] += sums.noise;
  }
};

}  // namespace

void squared_error(const SquaredError& p, ParallelFor run) {
  parallel(run, p.grid.M, most(1, kGrain / most(1, p.grid.K)), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) p.signal[i] = p.noise[i] = 0.0;
    visit(p.x_type, [&](auto x) {
      using X = decltype(x);
      if constexpr (is_input<X>) {
        ErrorRows rows(p, x);
        walk(p.grid, i0, i1, 0, p.grid.K, rows);
      }
    });
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
