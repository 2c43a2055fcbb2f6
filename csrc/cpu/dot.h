// d[r, c] = sum over k of x[r, k] * w[c, k] modulo 2^32, x unsigned bytes, w signed ones: as many as registers hold
#pragma once
#include "lanes.h"
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

using Sums = Ints<Floats>;
typedef int32_t Four __attribute__((vector_size(16)));

// ---- one register ---------------------------------------------------------------------------------------------------

// kBytes codes of x and of w, widened to 16 bits where the instruction set multiplies no bytes; their products, added
// to the sums in place.
#if defined(__AVX512VNNI__)
constexpr int64_t kBytes = 64;
QL_FN __m512i load_x(const uint8_t* x) { return _mm512_loadu_si512(x); }
QL_FN __m512i load_w(const int8_t* w) { return _mm512_loadu_si512(w); }
QL_FN Sums dot(Sums d, __m512i x, __m512i w) { return Sums(_mm512_dpbusd_epi32(__m512i(d), x, w)); }
#elif defined(__AVX512BW__)
constexpr int64_t kBytes = 32;
QL_FN __m512i load_x(const uint8_t* x) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
QL_FN __m512i load_w(const int8_t* w) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
QL_FN Sums dot(Sums d, __m512i x, __m512i w) { return d + Sums(_mm512_madd_epi16(x, w)); }
#elif defined(__AVX2__)
constexpr int64_t kBytes = 16;
QL_FN __m256i load_x(const uint8_t* x) { return _mm256_cvtepu8_epi16(load<__m128i>(x)); }
QL_FN __m256i load_w(const int8_t* w) { return _mm256_cvtepi8_epi16(load<__m128i>(w)); }
QL_FN Sums dot(Sums d, __m256i x, __m256i w) { return d + Sums(_mm256_madd_epi16(x, w)); }
#elif defined(__x86_64__)
constexpr int64_t kBytes = 8;
QL_FN __m128i load_x(const uint8_t* x) {
  return _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)), _mm_setzero_si128());
}
QL_FN __m128i load_w(const int8_t* w) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
QL_FN Sums dot(Sums d, __m128i x, __m128i w) { return d + Sums(_mm_madd_epi16(x, w)); }
#else
constexpr int64_t kBytes = 4;
QL_FN Sums load_x(const uint8_t* x) { return Sums{x[0], x[1], x[2], x[3]}; }
QL_FN Sums load_w(const int8_t* w) { return Sums{w[0], w[1], w[2], w[3]}; }
QL_FN Sums dot(Sums d, Sums x, Sums w) { return d + x * w; }
#endif

// The last codes of w: zeros follow, so that what follows in x does not matter.
QL_FN auto load_rest(const int8_t* w, int64_t n) {
#if defined(__AVX512VNNI__)
  return _mm512_maskz_loadu_epi8((uint64_t(1) << n) - 1, w);
#else
  int8_t rest[kBytes] = {};
  for (int64_t k = 0; k < n; ++k) rest[k] = w[k];
  return load_w(rest);
#endif
}

// The sum of the lanes of each of four registers: pairs of registers, then of lanes, then the rest of a register.
QL_FN Four lane_sums(Sums a, Sums b, Sums c, Sums d) {
#if defined(__AVX512F__)
  const auto low = [](Sums a, Sums b) { return Sums(_mm512_maskz_unpacklo_epi32(0xffff, __m512i(a), __m512i(b))); };
  const auto high = [](Sums a, Sums b) { return Sums(_mm512_maskz_unpackhi_epi32(0xffff, __m512i(a), __m512i(b))); };
  const __m512i ab = __m512i(low(a, b) + high(a, b)), cd = __m512i(low(c, d) + high(c, d));
  const Sums four = Sums(_mm512_maskz_unpacklo_epi64(0xff, ab, cd)) + Sums(_mm512_maskz_unpackhi_epi64(0xff, ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_maskz_extracti64x4_epi64(0xf, __m512i(four), 0),
                                        _mm512_maskz_extracti64x4_epi64(0xf, __m512i(four), 1));
  return Four(_mm256_castsi256_si128(half)) + Four(_mm256_extracti128_si256(half, 1));
#elif defined(__AVX2__)
  const __m256i ab = _mm256_hadd_epi32(__m256i(a), __m256i(b)), cd = _mm256_hadd_epi32(__m256i(c), __m256i(d));
  const __m256i four = _mm256_hadd_epi32(ab, cd);
  return Four(_mm256_castsi256_si128(four)) + Four(_mm256_extracti128_si256(four, 1));
#else
  const auto sum = [](Sums s) { return s[0] + s[1] + s[2] + s[3]; };
  return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// ---- a tile ---------------------------------------------------------------------------------------------------------

constexpr int64_t kTileCols = 4;  // rows of w
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 6;  // of x: 24 sums and 7 operands in 32 registers
#else
constexpr int64_t kTileRows = 2;
#endif

// Four rows of w, and those which memory fetches meanwhile.
struct Panel {
  const int8_t* row[kTileCols];
  const int8_t* ahead;  // the first of the rows to fetch, of as many codes
  int64_t ahead_stride;
  int ahead_rows;  // 0: none
};

// d[r, c] = or += sum over k < n of x[r, k] * w[c, k] for r < R, c < 4
template <int R>
static void dot_tile(const uint8_t* x, int64_t stride, const Panel& w, int64_t n, bool add, int32_t* d,
                     int64_t d_stride) {
  Sums sum[R][kTileCols] = {};
  const auto step = [&](int64_t k, auto load_w) __attribute__((always_inline)) {
    decltype(load_x(x)) a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load_x(x + r * stride + k);
#pragma GCC unroll 8
    for (int c = 0; c < kTileCols; ++c) {
      const auto b = load_w(w.row[c] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = dot(sum[r][c], a[r], b);
    }
  };
  int64_t k = 0;
  for (; k + kBytes <= n; k += kBytes) {
    if (k % 64 == 0)
      for (int c = 0; c < w.ahead_rows; ++c) __builtin_prefetch(w.ahead + c * w.ahead_stride + k, 0, 2);
    step(k, load_w);
  }
  if (k < n) step(k, [&](const int8_t* w) __attribute__((always_inline)) { return load_rest(w, n - k); });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    int32_t* out = d + r * d_stride;
    const Four sums = lane_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    store(out, add ? load<Four>(out) + sums : sums);
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
