// scaled_matmul of few rows of x with a weight of bytes of one scale a row, for AVX2: rows of w are read as they lie
//
// x' = x_codes - x_zero_point is an int16, made once, and codes are widened where they are multiplied:
//   d = sum of x' * (codes - z) = sum of x' * codes  -  z * sum of x'
// modulo 2^32, which is d itself, as it fits.
#pragma once
#include "../activation.h"
#include "../ops/scaled_matmul.h"
#include "dot.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kWideRows = 24;  // of x, at most: more are faster in blocks

// AVX-VNNI multiplies bytes in less time.
bool in_wide_dots([[maybe_unused]] const ScaledMatmul& p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const Grid& g = p.weight.grid;
  return !has_avx_vnni() && p.M <= kWideRows && row_of(p.weight.format).bits == 8 && g.K > 0 && g.bk >= g.K;
#else
  return false;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class F>
class WideDots {
  static constexpr int64_t kPanel = 32, kStep = 16;  // sums that are kept, columns of a register

  // Rows of w and columns at a time, while x and the sums lie in the first-level cache: the more rows, the less often x
  // comes there from the second
  template <int64_t ROWS>
  static constexpr int64_t kColumns = ROWS == 4 ? 1024 : 512;

 public:
  explicit WideDots(const ScaledMatmul& p) : p_(p), x_(p.M * stride_ * 2) {
    for (int64_t m = 0; m < p.M; ++m) {
      const auto* from = static_cast<const uint8_t*>(p.x_codes) + m * g_.K;
      const int32_t z = p.x_zero_point ? clamp_zero_point(p.x_zero_point[p.x_per_row ? m : 0], x_format_) : 0;
      int16_t* to = x(m);
      if (x_format_.is_signed)
        for (int64_t k = 0; k < g_.K; ++k) to[k] = int16_t(int8_t(from[k]) - z);
      else
        for (int64_t k = 0; k < g_.K; ++k) to[k] = int16_t(from[k] - z);
      for (int64_t k = g_.K; k < round_up(g_.K, kStep); ++k) to[k] = 0;
      uint32_t sum = 0;
      for (int64_t k = 0; k < g_.K; ++k) sum += uint32_t(int32_t(to[k]));
      x_sum_[m] = sum;
      x_scale_[m] = effective_scale(p.x_scale[p.x_per_row ? m : 0], float_of(x_format_.scale_max));
    }
  }

  // Columns n0 .. n0 + kPanel of y
  void operator()(int64_t n0) const {
    const int64_t count = least(kPanel, g_.M - n0);
    alignas(64) uint32_t d[kWideRows][kPanel];
    if (p_.M < 4)
      for (int64_t n = 0; n < count; n += 4) multiply_slab<4>(n0 + n, &d[0][n]);
    else
      for (int64_t n = 0; n < count; n += 16) multiply_slab<16>(n0 + n, &d[0][n]);
    finish(n0, count, d);
  }
  static constexpr int64_t panel = kPanel;

 private:
  const ScaledMatmul& p_;
  const Grid& g_ = p_.weight.grid;
  const Row format_ = row_of(p_.weight.format), x_format_ = row_of(p_.x_format), y_format_ = row_of(p_.y_type);
  const Encode encode_ = encoder(p_.y_type, false, false);
  const int64_t stride_ = round_up(g_.K, 2048) + 1056;  // rows lie in different sets of the first-level cache
  const Scratch x_;
  uint32_t x_sum_[kWideRows];
  float x_scale_[kWideRows];

  int16_t* x(int64_t m) const { return static_cast<int16_t*>(x_.data()) + m * stride_; }

  static QL_MEMBER __m256i widen_codes(const char* codes) {
    const auto bytes = load<__m128i>(codes);
    return F::is_signed ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
  }

  // total[r, s] += the lanes of the sum over `columns` of x'[r] * codes[s], for R rows of x and S of w. What lies at
  // `ahead`, where that is not null, is fetched from its first byte on, a line of each row of w in turn.
  template <int R, int S, int64_t ROWS>
  static void multiply(const int16_t* x, int64_t stride, const char* const* w, const char* ahead, int64_t columns,
                       Int32s (*total)[S]) {
    Int32s sum[R][S];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[r][s] = total[r][s];
    for (int64_t k = 0; k < columns; k += kStep) {
      if (ahead && k % 64 == 0)
        for (int s = 0; s < S; ++s) __builtin_prefetch(ahead + ROWS * k + 64 * s);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const __m256i codes = widen_codes(w[s] + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[r][s] = sum[r][s] + Int32s(_mm256_madd_epi16(codes, load<__m256i>(x + r * stride + k)));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) total[r][s] = sum[r][s];
  }

  // The same for R rows and a whole slab, as many rows of w at once as registers hold
  template <int R, int64_t ROWS>
  static void multiply_rows(const int16_t* x, int64_t stride, const char* const* w, const char* ahead, int64_t columns,
                            Int32s (*total)[ROWS]) {
    constexpr int S = R == 4 ? 2 : 4;
    for (int s = 0; s < ROWS; s += S) {
      Int32s part[R][S];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < S; ++i) part[r][i] = total[r][s + i];
      multiply<R, S, ROWS>(x, stride, w + s, ahead ? ahead + 64 * s : nullptr, columns, part);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < S; ++i) total[r][s + i] = part[r][i];
    }
  }

  template <int64_t ROWS>
  void multiply_all(int64_t k, const char* const* w, const char* ahead, int64_t columns, Int32s (*total)[ROWS]) const {
    constexpr decltype(&multiply_rows<1, ROWS>) some[] = {multiply_rows<1, ROWS>, multiply_rows<2, ROWS>,
                                                          multiply_rows<3, ROWS>, multiply_rows<4, ROWS>};
    for (int64_t m = 0; m < p_.M; m += 4)
      some[least(4, p_.M - m) - 1](x(m) + k, stride_, w, m ? nullptr : ahead, columns, total + m);
  }

  // d[m, 0 .. ROWS) of rows n0 .. n0 + ROWS of w; the last row stands in for those below it
  template <int64_t ROWS>
  void multiply_slab(int64_t n0, uint32_t* d) const {
    Int32s total[kWideRows][ROWS];
    __builtin_memset(total, 0, size_t(p_.M) * sizeof total[0]);
    const char *row[ROWS], *w[ROWS];
    for (int64_t s = 0; s < ROWS; ++s)
      row[s] = static_cast<const char*>(p_.weight.codes) + least(n0 + s, g_.M - 1) * g_.K;
    const int64_t whole = g_.K / kStep * kStep;
    for (int64_t k = 0; k < whole; k += kColumns<ROWS>) {
      for (int64_t s = 0; s < ROWS; ++s) w[s] = row[s] + k;
      multiply_all<ROWS>(k, w, row[0] + ROWS * (g_.K + k), least(kColumns<ROWS>, whole - k), total);
    }
    if (whole < g_.K) {
      char rest[ROWS][kStep] = {};
      for (int64_t s = 0; s < ROWS; ++s) {
        __builtin_memcpy(rest[s], row[s] + whole, size_t(g_.K - whole));
        w[s] = rest[s];
      }
      multiply_all<ROWS>(whole, w, nullptr, kStep, total);
    }
    for (int64_t m = 0; m < p_.M; ++m)
      for (int64_t s = 0; s < ROWS; s += 4)
        store(d + m * kPanel + s, lane_sums(total[m][s], total[m][s + 1], total[m][s + 2], total[m][s + 3]));
  }

  // y = activation(fl(fl(d * x_scale) * scale) + bias)
  void finish(int64_t n0, int64_t count, const uint32_t (&d)[kWideRows][kPanel]) const {
    alignas(64) float s[kPanel] = {}, bias[kPanel] = {}, y[kPanel];
    alignas(64) uint32_t z[kPanel] = {};
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = (n0 + c) / g_.br;
      s[c] = effective_scale(p_.weight.scale[at], float_of(format_.scale_max));
      if (p_.weight.zero_point) z[c] = uint32_t(clamp_zero_point(p_.weight.zero_point[at], format_));
      if (p_.epilogue.bias) bias[c] = p_.epilogue.bias[n0 + c];
    }
    for (int64_t m = 0; m < p_.M; ++m) {
      for (int64_t c = 0; c < count; c += kLanes) {
        const Bits<Floats> exact = load<Bits<Floats>>(d[m] + c) - load<Bits<Floats>>(z + c) * x_sum_[m];
        const Floats f = Lanes<Floats>::of(same_bits<Ints<Floats>>(exact));
        Floats v = mul(mul(f, splat<Floats>(x_scale_[m])), load<Floats>(s + c));
        if (p_.epilogue.bias) v = add(v, load<Floats>(bias + c));
        store(y + c, activate(v, p_.epilogue.activation));
      }
      encode_(y, nullptr, nullptr, kAsIs, static_cast<char*>(p_.y) + byte_offset(y_format_, g_.M, m, n0), count);
    }
  }
};
#endif

void multiply_wide_dots([[maybe_unused]] const ScaledMatmul& p, [[maybe_unused]] ParallelFor run) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  visit(p.weight.format, [&](auto f) {
    using F = decltype(f);
    if constexpr (!F::is_float && is_whole<F>) {
      using Kernel = WideDots<F>;
      const Kernel dots(p);
      const int64_t panels = (p.weight.grid.M + Kernel::panel - 1) / Kernel::panel;
      parallel(run, panels, most(1, 8 * kGrain / (Kernel::panel * p.M * p.weight.grid.K)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t piece = begin; piece < end; ++piece) dots(piece * Kernel::panel);
               });
    }
  });
#endif
}

}  // namespace
}  // namespace QL_ISA
}  // namespace quantlib
