// d[r, c] = sum over k of x[r, k] * (w[c, k] + kLift) modulo 2^32, of signed bytes: as many as registers hold
#pragma once
#include "lanes.h"
#include "loops.h"

namespace quantlib {
namespace QL_ISA {

using Int32s = Ints<Floats>;
typedef int32_t Int32x4 __attribute__((vector_size(16)));

// ---- one register ---------------------------------------------------------------------------------------------------

// kDotBytes codes of x and of w, widened to 16 bits where the instruction set multiplies no bytes; their products,
// added to the sums in place. Where it does, it wants the bytes of one factor unsigned.
#if defined(__AVX512VNNI__)
constexpr int64_t kDotBytes = 64, kLift = 128;
QL_FN __m512i load_x(const int8_t* x) { return _mm512_loadu_si512(x); }
QL_FN __m512i load_w(const int8_t* w) {
  return _mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(int8_t(kLift)));
}
QL_FN Int32s dot(Int32s d, __m512i x, __m512i w) { return Int32s(_mm512_dpbusd_epi32(__m512i(d), w, x)); }
#elif defined(__AVX512BW__)
constexpr int64_t kDotBytes = 32, kLift = 0;
QL_FN __m512i load_x(const int8_t* x) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
QL_FN __m512i load_w(const int8_t* w) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
QL_FN Int32s dot(Int32s d, __m512i x, __m512i w) { return d + Int32s(_mm512_madd_epi16(x, w)); }
#elif defined(__AVX2__)
constexpr int64_t kDotBytes = 16, kLift = 0;
QL_FN __m256i load_x(const int8_t* x) { return _mm256_cvtepi8_epi16(load<__m128i>(x)); }
QL_FN __m256i load_w(const int8_t* w) { return _mm256_cvtepi8_epi16(load<__m128i>(w)); }
QL_FN Int32s dot(Int32s d, __m256i x, __m256i w) { return d + Int32s(_mm256_madd_epi16(x, w)); }
#elif defined(__x86_64__)
constexpr int64_t kDotBytes = 8, kLift = 0;
QL_FN __m128i load_x(const int8_t* x) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
QL_FN __m128i load_w(const int8_t* w) { return load_x(w); }
QL_FN Int32s dot(Int32s d, __m128i x, __m128i w) { return d + Int32s(_mm_madd_epi16(x, w)); }
#else
constexpr int64_t kDotBytes = 4, kLift = 0;
QL_FN Int32s load_x(const int8_t* x) { return Int32s{x[0], x[1], x[2], x[3]}; }
QL_FN Int32s load_w(const int8_t* w) { return Int32s{w[0], w[1], w[2], w[3]}; }
QL_FN Int32s dot(Int32s d, Int32s x, Int32s w) { return d + x * w; }
#endif

// The last codes of w: zeros follow, so that what follows in x does not matter.
QL_FN auto load_rest(const int8_t* w, int64_t n) {
#if defined(__AVX512VNNI__)
  const __mmask64 is_code = (uint64_t(1) << n) - 1;
  const __m512i lift = _mm512_set1_epi8(int8_t(kLift));
  return _mm512_maskz_mov_epi8(is_code, _mm512_xor_si512(_mm512_maskz_loadu_epi8(is_code, w), lift));
#else
  int8_t rest[kDotBytes] = {};
  for (int64_t k = 0; k < n; ++k) rest[k] = w[k];
  return load_w(rest);
#endif
}

// The sum of the lanes of each of four registers: pairs of registers, then of lanes, then the rest of a register.
QL_FN Int32x4 lane_sums(Int32s a, Int32s b, Int32s c, Int32s d) {
#if defined(__AVX512F__)
  const auto low = [](Int32s a, Int32s b) {
    return Int32s(_mm512_maskz_unpacklo_epi32(0xffff, __m512i(a), __m512i(b)));
  };
  const auto high = [](Int32s a, Int32s b) {
    return Int32s(_mm512_maskz_unpackhi_epi32(0xffff, __m512i(a), __m512i(b)));
  };
  const __m512i ab = __m512i(low(a, b) + high(a, b)), cd = __m512i(low(c, d) + high(c, d));
  const Int32s four =
      Int32s(_mm512_maskz_unpacklo_epi64(0xff, ab, cd)) + Int32s(_mm512_maskz_unpackhi_epi64(0xff, ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_maskz_extracti64x4_epi64(0xf, __m512i(four), 0),
                                        _mm512_maskz_extracti64x4_epi64(0xf, __m512i(four), 1));
  return Int32x4(_mm256_castsi256_si128(half)) + Int32x4(_mm256_extracti128_si256(half, 1));
#elif defined(__AVX2__)
  const __m256i ab = _mm256_hadd_epi32(__m256i(a), __m256i(b)), cd = _mm256_hadd_epi32(__m256i(c), __m256i(d));
  const __m256i four = _mm256_hadd_epi32(ab, cd);
  return Int32x4(_mm256_castsi256_si128(four)) + Int32x4(_mm256_extracti128_si256(four, 1));
#else
  const auto sum = [](Int32s s) { return s[0] + s[1] + s[2] + s[3]; };
  return Int32x4{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// ---- a tile ---------------------------------------------------------------------------------------------------------

constexpr int64_t kDotCols = 4;  // rows of w

// Four rows of w, and where memory fetches meanwhile as many codes for rows `begin` to `end` of them
struct DotPanel {
  const int8_t *row[kDotCols], *ahead[kDotCols];
  int64_t begin, end;
};

// sum[r, s] = sum over k < n of x[r, k] * w[s, k], of which the lanes are still to be added up; what lies behind row r
// of x is read, not used
template <int R, int S>
QL_FN void dot_lanes(const int8_t* x, int64_t x_stride, const DotPanel& w, int64_t c, int64_t n, Int32s (&sum)[R][S]) {
  constexpr int U = S == kDotCols || R * S >= 8 ? 1 : R * S >= 3 ? 2 : 4;  // sums that do not wait for each other
  Int32s part[U][R][S] = {};
  const int64_t begin = w.begin > c ? w.begin : c, end = w.end < c + S ? w.end : c + S;
  const auto step = [&](int64_t k, int u, auto load) __attribute__((always_inline)) {
    decltype(load_x(x)) a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load_x(x + r * x_stride + k);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const auto b = load(w.row[c + s] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) part[u][r][s] = dot(part[u][r][s], a[r], b);
    }
  };
  const auto steps = [&](auto fetch) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; k + U * kDotBytes <= n; k += U * kDotBytes)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) fetch(k + u * kDotBytes), step(k + u * kDotBytes, u, load_w);
    return k;
  };
  const auto some = [&](int64_t k) __attribute__((always_inline)) {
    for (int64_t j = begin; j < end && k % 64 == 0; ++j) __builtin_prefetch(w.ahead[j] + k);
  };
  const auto all = [&](int64_t k) __attribute__((always_inline)) {
    if (kDotBytes % 64 == 0 || k % 64 == 0)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) __builtin_prefetch(w.ahead[c + s] + k);
  };
  int64_t k;
  if constexpr (S == kDotCols) k = steps(some);
  else k = begin < end ? steps(all) : steps([](int64_t) {});
  for (; k + kDotBytes <= n; k += kDotBytes) step(k, 0, load_w);
  if (k < n) step(k, 0, [&](const int8_t* from) __attribute__((always_inline)) { return load_rest(from, n - k); });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      sum[r][s] = part[0][r][s];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum[r][s] = sum[r][s] + part[u][r][s];
    }
}

// d[r, c] = or += sum over k < n of x[r, k] * w[c, k] for r < R, c < 4, S rows of w at a time
template <int R, int S>
static void dot_tile(const int8_t* x, int64_t x_stride, const DotPanel& w, int64_t n, bool add, uint32_t* d,
                     int64_t d_stride) {
  Int32s sum[kDotCols / S][R][S];
#pragma GCC unroll 1
  for (int64_t c = 0; c < kDotCols; c += S) dot_lanes<R, S>(x, x_stride, w, c, n, sum[c / S]);
  const auto at = [&](int r, int c) { return sum[c / S][r][c % S]; };
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    uint32_t* out = d + r * d_stride;
    const Int32x4 sums = lane_sums(at(r, 0), at(r, 1), at(r, 2), at(r, 3));
    store(out, add ? load<Int32x4>(out) + sums : sums);
  }
}

using DotTile = decltype(&dot_tile<1, 4>);

// The tile of so many rows of x, with 1, 2 or 4 rows of w together; registers hold all sums
static inline DotTile dot_tile_of(int64_t rows, [[maybe_unused]] int64_t together) {
#if defined(__AVX512F__)
  constexpr DotTile one[] = {dot_tile<1, 1>, dot_tile<2, 1>, dot_tile<3, 1>,
                             dot_tile<4, 1>, dot_tile<5, 1>, dot_tile<6, 1>};
  constexpr DotTile two[] = {dot_tile<1, 2>, dot_tile<2, 2>, dot_tile<3, 2>, dot_tile<4, 2>,
                             dot_tile<5, 2>, dot_tile<6, 2>, dot_tile<7, 2>, dot_tile<8, 2>};
  constexpr DotTile four[] = {dot_tile<1, 4>, dot_tile<2, 4>, dot_tile<3, 4>,
                              dot_tile<4, 4>, dot_tile<5, 4>, dot_tile<6, 4>};
  return (together == 1 ? one : together == 2 ? two : four)[rows - 1];
#else
  constexpr DotTile four[] = {dot_tile<1, 4>, dot_tile<2, 4>};
  return four[rows - 1];
#endif
}

// How rows of x meet rows of w: so many of w together, tiles of so many of x at most, so many columns at a time
struct DotShape {
  int64_t together, rows, columns;
};

// Four rows of w together take the fewest loads of x, so they are fastest while w is in a cache. Memory is fastest for
// one row of w after the other, each from end to end, as long as all of x stays in the first-level cache; where it does
// not, two rows and few columns keep it there.
static inline DotShape dot_shape(int64_t rows, int64_t n, [[maybe_unused]] int64_t w_bytes) {
#if defined(__AVX512F__)
  constexpr int64_t kCached = int64_t(3) << 20, kWholeRows = 36864, kPart = 8192;
  if (w_bytes >= kCached && rows <= 6 && rows * n <= kWholeRows) return {1, 6, most(n, 1)};
  if (kDotBytes == 64 && w_bytes >= kCached && rows < 16) return {2, 8, most(512, kPart / rows / 64 * 64)};
  return {4, 6, 4096};
#else
  return {4, 2, 4096};
#endif
}

}  // namespace QL_ISA
}  // namespace quantlib
