// scaled_matmul of few rows of int8 with int4 of several scales a row: rows of w are read once, from beginning to end
//
// A line of 64 bytes holds 128 codes. The low nibbles are those of even columns, the high ones those of odd columns, so
// x is kept as its even and its odd columns, and no nibble has to move to another byte. w' = codes + 8 is unsigned:
//   d = sum of x * (w - z) = sum of x * w'  -  (z + 8) * sum of x
#pragma once
#include "scaled_blocks.h"

namespace quantlib {
namespace QL_ISA {
namespace {

#ifdef __AVX512VNNI__
#define QL_NIBBLES
constexpr int64_t kNibbleRows = 8;
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define QL_NIBBLES
constexpr int64_t kNibbleRows = 16;
#endif

// Tiles multiply two rows and more in less time, AVX-512 VNNI more than eight in blocks, AVX2 more than sixteen.
bool in_nibbles([[maybe_unused]] const ScaledMatmul& p) {
#ifdef QL_NIBBLES
  const Grid& g = p.weight.grid;
#ifdef __AVX512VNNI__
  const bool faster = p.M <= (has_amx() ? 1 : kNibbleRows);
#else
  const bool faster = !has_avx_vnni() && p.M <= kNibbleRows;
#endif
  return faster && p.weight.format == Type::int4 && p.x_format == Type::int8 && !p.x_zero_point && g.bk < g.K &&
         g.bk % 128 == 0 && g.K % 128 == 0;
#else
  return false;
#endif
}

#ifdef QL_NIBBLES
class NibbleRows {
  static constexpr int64_t kFetchAhead = 4096;  // bytes: processors fetch by themselves only to the end of a page
#ifdef __AVX512VNNI__
  using Register = __m512i;
#else
  using Register = __m256i;
#endif

 public:
  NibbleRows(const ScaledMatmul& p)
      : p_(p),
        blocks_(g_.scale_cols()),
        padded_(round_up(blocks_, kLanes)),
        x_(p.M * stride_),
        sums_(p.M * padded_ * 4) {
    for (int64_t m = 0; m < p.M; ++m) {
      const int8_t* from = static_cast<const int8_t*>(p.x_codes) + m * g_.K;
      for (int64_t k = 0; k < g_.K; k += 128)
        for (int64_t i = 0; i < 64; ++i) x(m)[k + i] = from[k + 2 * i], x(m)[k + 64 + i] = from[k + 2 * i + 1];
      for (int64_t J = 0; J < padded_; ++J) {
        int32_t sum = 0;
        for (int64_t k = J * g_.bk; k < least((J + 1) * g_.bk, g_.K); ++k) sum += from[k];
        sums(m)[J] = uint32_t(sum);
      }
    }
  }

  // Columns n0 .. n0 + kLanes of y; terms[m * padded_ + J, r] = d * scale of block J of row n0 + r, of rows J and r
  // that are transposed once all rows are read
  void operator()(int64_t n0, Bits<Floats>* terms) const {
    const int64_t count = least(kLanes, g_.M - n0);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t J0 = 0; J0 < blocks_; J0 += kLanes) {
        const Floats s = scales(n0 + r, J0);
        const Bits<Floats> z = zero_points(n0 + r, J0);
        Bits<Floats> totals[kNibbleRows];
        sums_of_blocks(n0 + r, J0, totals);
        for (int64_t m = 0; m < p_.M; ++m) {
          const Bits<Floats> d = totals[m] - z * load<Bits<Floats>>(sums(m) + J0);
          terms[m * padded_ + J0 + r] = bits_of(mul(Lanes<Floats>::of(same_bits<Ints<Floats>>(d)), s));
        }
      }
    for (int64_t m = 0; m < p_.M; ++m) {
      Floats total = {};
      for (int64_t J0 = 0; J0 < blocks_; J0 += kLanes) {
        Bits<Floats> square[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) square[r] = r < count ? terms[m * padded_ + J0 + r] : Bits<Floats>{};
        transpose(square);
        for (int64_t i = 0; i < least(kLanes, blocks_ - J0); ++i) total = add(total, same_bits<Floats>(square[i]));
      }
      finish(m, n0, count, total);
    }
  }
  int64_t terms() const { return p_.M * padded_; }

 private:
  const ScaledMatmul& p_;
  const Grid& g_ = p_.weight.grid;
  const Row format_ = row_of(p_.weight.format), x_format_ = row_of(p_.x_format), y_format_ = row_of(p_.y_type);
  const Encode encode_ = encoder(p_.y_type, false, false);
  const int64_t blocks_, padded_;
  const int64_t stride_ = round_up(g_.K, 4096) + 1088;  // so that rows lie in different sets of the first-level cache
  const Scratch x_, sums_;

  int8_t* x(int64_t m) const { return static_cast<int8_t*>(x_.data()) + m * stride_; }
  uint32_t* sums(int64_t m) const { return static_cast<uint32_t*>(sums_.data()) + m * padded_; }

  // Lane i of d[m]: the sum of x * w' over block J0 + i of row n
  QL_MEMBER void sums_of_blocks(int64_t n, int64_t J0, Bits<Floats> (&d)[kNibbleRows]) const {
#ifdef __AVX512VNNI__
    if (g_.bk == 128) return sums_of_lines(n, J0, d);
#endif
    alignas(64) Register sums_of[kNibbleRows][kLanes];
    sums_of_lanes(n, J0, sums_of);
    for (int64_t m = 0; m < p_.M; ++m) d[m] = lane_totals(sums_of[m]);
  }

#ifdef __AVX512VNNI__
  // w' of a line: of the even columns, then of the odd ones
  static QL_MEMBER void unpack_line(const uint8_t* codes, __m512i (&w)[2]) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i lifted = _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(int8_t(0x88)));
    w[0] = _mm512_and_si512(lifted, low);
    w[1] = _mm512_and_si512(_mm512_maskz_srli_epi16(0xffffffff, lifted, 4), low);
  }
  static QL_MEMBER __m512i multiply_line(__m512i sum, const __m512i (&w)[2], const int8_t* x) {
    sum = _mm512_dpbusd_epi32(sum, w[0], _mm512_loadu_si512(x));
    return _mm512_dpbusd_epi32(sum, w[1], _mm512_loadu_si512(x + 64));
  }

  // Blocks of one line: four lines stay in registers while every row of x meets them. A lane holds eight products, each
  // at most 15 * 128 in magnitude, so lanes, and sums of two, fit an int16.
  QL_MEMBER void sums_of_lines(int64_t n, int64_t J0, Bits<Floats> (&d)[kNibbleRows]) const {
    const auto* row = static_cast<const uint8_t*>(p_.weight.codes) + n * (g_.K / 2);
    const auto pairs = [](__m512i a, __m512i b) {
      return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
    };
    __m512i fours[4][kNibbleRows];
    for (int64_t q = 0; q < 4; ++q) {
      __m512i w[4][2] = {};
      for (int64_t i = 0; i < 4; ++i)
        if (J0 + 4 * q + i < blocks_) unpack_line(row + (J0 + 4 * q + i) * 64, w[i]);
      const int8_t* from = x(0) + (J0 + 4 * q) * 128;  // of blocks behind the last too, times 0
      for (int64_t m = 0; m < p_.M; ++m, from += stride_) {
        __m512i sum[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] = multiply_line(_mm512_setzero_si512(), w[i], from + 128 * i);
        fours[q][m] = pairs(pairs(sum[0], sum[1]), pairs(sum[2], sum[3]));
      }
    }
    for (int64_t m = 0; m < p_.M; ++m)
      d[m] = Bits<Floats>(quarters(quarters(fours[0][m], fours[1][m]), quarters(fours[2][m], fours[3][m])));
  }
  // The quarters of a, then of b, added up in pairs
  static QL_MEMBER __m512i quarters(__m512i a, __m512i b) {
    return __m512i(Int32s(_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88)) +
                   Int32s(_mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd)));
  }

  // Register i of d[m], of which the lanes are still to be added up: the sum over block J0 + i, with every row m
  QL_MEMBER void sums_of_lanes(int64_t n, int64_t J0, Register (&d)[kNibbleRows][kLanes]) const {
    const auto* row = static_cast<const uint8_t*>(p_.weight.codes) + n * (g_.K / 2);
    for (int64_t i = 0, k0 = J0 * g_.bk; i < kLanes; ++i, k0 += g_.bk) {
      for (int64_t m = 0; m < p_.M; ++m) d[m][i] = _mm512_setzero_si512();
      for (int64_t k = k0; k < least(k0 + g_.bk, g_.K); k += 128) {
        __m512i w[2];
        unpack_line(row + k / 2, w);
        for (int64_t m = 0; m < p_.M; ++m) d[m][i] = multiply_line(d[m][i], w, x(m) + k);
      }
    }
  }
#else
  // Register i of d[m], of which the lanes are still to be added up: the sum over block J0 + i, with every row m. An
  // int16 holds the sum of eight products, each at most 15 * 128 in magnitude: those of 128 codes.
  QL_MEMBER void sums_of_lanes(int64_t n, int64_t J0, Register (&d)[kNibbleRows][kLanes]) const {
    const auto* row = static_cast<const uint8_t*>(p_.weight.codes) + n * (g_.K / 2);
    const __m256i low = _mm256_set1_epi8(15), lift = _mm256_set1_epi8(int8_t(0x88)), ones = _mm256_set1_epi16(1);
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t k0 = (J0 + i) * g_.bk, k1 = least(k0 + g_.bk, g_.K);
      if (k0 >= k1)
        for (int64_t m = 0; m < p_.M; ++m) d[m][i] = _mm256_setzero_si256();
      for (int64_t k = k0; k < k1; k += 128) {
        __builtin_prefetch(row + k / 2 + kFetchAhead, 0, 3);
        const __m256i first = _mm256_xor_si256(load<__m256i>(row + k / 2), lift);
        const __m256i second = _mm256_xor_si256(load<__m256i>(row + k / 2 + 32), lift);
        const __m256i codes[4] = {_mm256_and_si256(first, low), _mm256_and_si256(second, low),
                                  _mm256_and_si256(_mm256_srli_epi16(first, 4), low),
                                  _mm256_and_si256(_mm256_srli_epi16(second, 4), low)};
        const int8_t* from = x(0) + k;
        for (int64_t m = 0; m < p_.M; ++m, from += stride_) {
          __m256i products[4];
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) products[q] = _mm256_maddubs_epi16(codes[q], load<__m256i>(from + 32 * q));
          const __m256i sum =
              _mm256_add_epi16(_mm256_add_epi16(products[0], products[1]), _mm256_add_epi16(products[2], products[3]));
          const __m256i wide = _mm256_madd_epi16(sum, ones);
          d[m][i] = k == k0 ? wide : _mm256_add_epi32(d[m][i], wide);
        }
      }
    }
  }
#endif

  // Lane i: the sum of the lanes of register i
  static QL_MEMBER Bits<Floats> lane_totals(Register (&v)[kLanes]) {
#ifndef __AVX512VNNI__
    const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return Bits<Floats>(
        _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)));
#else
    const auto add = [](__m512i a, __m512i b) { return __m512i(Int32s(a) + Int32s(b)); };
    const auto fours = [&](const Register* v) {
      const auto pair = [&](__m512i a, __m512i b) {
        return add(_mm512_maskz_unpacklo_epi32(0xffff, a, b), _mm512_maskz_unpackhi_epi32(0xffff, a, b));
      };
      const __m512i ab = pair(v[0], v[1]), cd = pair(v[2], v[3]);
      return add(_mm512_maskz_unpacklo_epi64(0xff, ab, cd), _mm512_maskz_unpackhi_epi64(0xff, ab, cd));
    };
    return Bits<Floats>(quarters(quarters(fours(v), fours(v + 4)), quarters(fours(v + 8), fours(v + 12))));
#endif
  }

  // The scales of blocks J0 .. J0 + kLanes of row n, 0 where there are none
  QL_MEMBER Floats scales(int64_t n, int64_t J0) const {
    alignas(64) float s[kLanes] = {};
    const float* from = p_.weight.scale + n / g_.br * blocks_ + J0;
    if (J0 + kLanes <= blocks_) {  // as many as lanes, which the compiler takes at once
      for (int64_t i = 0; i < kLanes; ++i) s[i] = effective_scale(from[i], float_of(format_.scale_max));
      return load<Floats>(s);
    }
    for (int64_t i = 0; i < blocks_ - J0; ++i) s[i] = effective_scale(from[i], float_of(format_.scale_max));
    return load<Floats>(s);
  }
  QL_MEMBER Bits<Floats> zero_points(int64_t n, int64_t J0) const {
    if (!p_.weight.zero_point) return splat<Bits<Floats>>(8u);
    alignas(64) uint32_t z[kLanes] = {};
    const int32_t* from = p_.weight.zero_point + n / g_.br * blocks_ + J0;
    for (int64_t i = 0; i < least(kLanes, blocks_ - J0); ++i) z[i] = uint32_t(clamp_zero_point(from[i], format_)) + 8;
    return load<Bits<Floats>>(z);
  }

  // y = activation(total * x_scale + bias)
  void finish(int64_t m, int64_t n0, int64_t count, Floats total) const {
    alignas(64) float y[kLanes], bias[kLanes] = {};
    for (int64_t c = 0; p_.epilogue.bias && c < count; ++c) bias[c] = p_.epilogue.bias[n0 + c];
    const float s_x = effective_scale(p_.x_scale[p_.x_per_row ? m : 0], float_of(x_format_.scale_max));
    Floats v = mul(total, splat<Floats>(s_x));
    if (p_.epilogue.bias) v = add(v, load<Floats>(bias));
    store(y, activate(v, p_.epilogue.activation));
    encode_(y, nullptr, nullptr, kAsIs, static_cast<char*>(p_.y) + byte_offset(y_format_, g_.M, m, n0), count);
  }
};
#endif

void multiply_nibbles([[maybe_unused]] const ScaledMatmul& p, [[maybe_unused]] ParallelFor run) {
#ifdef QL_NIBBLES
  const int64_t N = p.weight.grid.M;
  const NibbleRows rows(p);
  parallel(run, (N + kLanes - 1) / kLanes, most(1, 8 * kGrain / (kLanes * p.weight.grid.K)),
           [&](int64_t begin, int64_t end) {
             const Scratch terms(rows.terms() * int64_t(sizeof(Floats)));
             for (int64_t piece = begin; piece < end; ++piece)
               rows(piece * kLanes, static_cast<Bits<Floats>*>(terms.data()));
           });
#endif
}

}  // namespace
}  // namespace QL_ISA
}  // namespace quantlib
