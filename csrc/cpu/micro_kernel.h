// d[n, m] = or += sum over k of w[n, k] * x[m, k], exact integers: some rows of w by some of x in registers
//
// x lies in panels of kLanes rows: 32 bits of each row, then the next 32 bits of each row. w lies in rows. So a
// register of x meets 32 bits of a row of w in every lane, and a tile of x meets a tile of w as it lies.
#pragma once
#include "amx.h"
#include "lanes.h"
#include "loops.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {

using Int32s = Ints<Floats>;

// Rows of w, `stride` bytes apart
struct RowsOfW {
  const char* data;
  int64_t stride;
};

// The bytes of some columns, and of each block of them, of which the last may be shorter
struct BlocksOfW {
  int64_t bytes, block;
};

// Lines fetched meanwhile: of the rows of w that come next as many with every 64 bytes that are multiplied as there are
// rows, one of each or, by rows, those of one row after the other; and of the rows of y that come of this one row, to
// be written.
struct Ahead {
  const char* w;
  int64_t w_stride, w_rows, w_lines;
  bool by_rows;  // memory is faster so, where whole rows are multiplied
  const char* y;
  int64_t y_stride, y_rows, y_bytes;

  QL_MEMBER void fetch(int64_t step) const {
    if (step < w_lines)
      for (int64_t r = 0; r < w_rows; ++r) __builtin_prefetch(w + r * w_stride + 64 * step, 0, 2);
    if (step < y_rows)
      for (int64_t at = 0; at < y_bytes; at += 64) __builtin_prefetch(y + step * y_stride + at, 1, 3);
  }

  // Rows of w in proportion to rows r .. r + count of `rows` that are multiplied; all for the first where not by rows
  QL_MEMBER Ahead share(int64_t r, int64_t count, int64_t rows) const {
    if (!by_rows) return r == 0 ? *this : Ahead{};
    Ahead part = *this;
    const int64_t begin = w_rows * r / rows;
    part.w += begin * w_stride, part.w_rows = w_rows * (r + count) / rows - begin;
    return part;
  }

  // The same lines of w, one row after the other
  QL_MEMBER CodesAhead rows() const { return {w, w_stride, by_rows && w_lines ? w_rows : 0, 64 * w_lines, w_rows}; }
};

// Panels of x, `stride` bytes from one to the next
struct PanelsOfX {
  const char* data;
  int64_t stride;
};

// Row n of w and row l of panel v of x: d[v * stride + n * kLanes + l]. A product is added to what is there, or takes
// its place.
struct Sums {
  uint32_t* d;
  int64_t stride;
  bool add;

  template <int R, int V>
  QL_MEMBER void start(Int32s (&sum)[R][V]) const {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = add ? load<Int32s>(at(r, v)) : Int32s{};
  }
  template <int R, int V>
  QL_MEMBER void take(const Int32s (&sum)[R][V]) const {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(at(r, v), sum[r][v]);
  }
  QL_MEMBER Sums below(int64_t n) const { return {d + n * kLanes, stride, add}; }

 private:
  QL_MEMBER uint32_t* at(int64_t n, int64_t v) const { return d + v * stride + n * kLanes; }
};

// total += fl(d * scale), where columns of w have a scale of their own. Sums start from what the zero points stand for,
// and are scaled in the registers. What belongs to row n of w is number n * step, to panel v of x from v * kLanes on.
template <bool SUMS_W, bool SUMS_X, bool ONE>
struct ScaledSums {
  float* total;
  int64_t stride;
  int64_t step;
  const float* scale;
  const uint32_t *zero_point, *w_sum;
  const uint32_t *x_zero_point, *x_sum;  // ONE: x_sum has been multiplied by the zero point of all rows
  int64_t x_step;                        // sums of x from a block of columns to the next

  template <int R, int V>
  QL_MEMBER void start(Int32s (&sum)[R][V]) const {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Bits<Floats> from = {};
        if constexpr (SUMS_W) from -= w_sum[r * step] * load<Bits<Floats>>(x_zero_point + v * kLanes);
        if constexpr (SUMS_X && ONE) from -= load<Bits<Floats>>(x_sum + v * kLanes);
        else if constexpr (SUMS_X) from -= zero_point[r * step] * load<Bits<Floats>>(x_sum + v * kLanes);
        sum[r][v] = same_bits<Int32s>(from);
      }
  }
  template <int R, int V>
  QL_MEMBER void take(const Int32s (&sum)[R][V]) const {
    float* const to = total;  // no store changes these
    const float* const scales = scale;
    const int64_t apart = stride, rows_apart = step;
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const Floats s = same_bits<Floats>(splat<Bits<Floats>>(load<uint32_t>(scales + r * rows_apart)));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* at = to + v * apart + r * kLanes;
        store(at, add(load<Floats>(at), mul(Lanes<Floats>::of(sum[r][v]), s)));
      }
    }
  }
  // The same for totals that are in registers
  template <int R, int V>
  QL_MEMBER void add_to(Floats (&totals)[R][V], const Int32s (&sum)[R][V]) const {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const Floats s = same_bits<Floats>(splat<Bits<Floats>>(load<uint32_t>(scale + r * step)));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) totals[r][v] = add(totals[r][v], mul(Lanes<Floats>::of(sum[r][v]), s));
    }
  }
  template <int R, int V>
  QL_MEMBER void load_totals(Floats (&totals)[R][V]) const {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) totals[r][v] = load<Floats>(total + v * stride + r * kLanes);
  }
  template <int R, int V>
  QL_MEMBER void store_totals(const Floats (&totals)[R][V]) const {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(total + v * stride + r * kLanes, totals[r][v]);
  }
  QL_MEMBER ScaledSums below(int64_t n) const {
    const int64_t at = n * step;
    return {total + n * kLanes, stride, step, scale + at, zero_point + at, w_sum + at, x_zero_point, x_sum, x_step};
  }
  // Those of the block of columns that comes next
  QL_MEMBER ScaledSums next() const {
    return {total, stride, step, scale + 1, zero_point + 1, w_sum + 1, x_zero_point, x_sum + x_step, x_step};
  }
};

// ---- registers ------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kSums = 24;   // of 32 registers
constexpr int kPanels = 3;  // of x at once, at most
#else
constexpr int kSums = 12;  // of 16
constexpr int kPanels = 2;
#endif
// Whether the totals of half as many sums fit beside them: those of two panels are then kept from block to block.
constexpr bool kKeepTotals = kSums == 24;

// a + b modulo 2^32
QL_FN Int32s wrapping_add(Int32s a, Int32s b) {
  using U = Bits<Floats>;
  return same_bits<Int32s>(same_bits<U>(a) + same_bits<U>(b));
}

// The ways in which registers multiply. add<N>(sum, x, x_stride, w, w_stride) adds N bytes of V panels of x times R
// rows of w, where N is a step, or a lane for what is left; R * V is `sums`.

// Two int16 of a lane, or, of Bytes, its four bytes
template <class Dot>
struct ByLanes {
  static constexpr int64_t step = 4, lane = 4;
  static constexpr int sums = kSums;

  // 32 bits of w in every lane, as they are multiplied
  static QL_MEMBER Int32s spread(const char* w) { return splat<Int32s>(load<int32_t>(w)); }

  template <int64_t, int R, int V>
  static QL_MEMBER void add(Int32s (&sum)[R][V], const char* x, int64_t x_stride, const char* w, int64_t w_stride) {
    Int32s a[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] = load<Int32s>(x + v * x_stride);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const Int32s b = Dot::spread(w + r * w_stride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Dot::dot(sum[r][v], a[v], b);
    }
  }
};

// sum + x * w of the two int16 of a lane
struct Pairs : ByLanes<Pairs> {
  static QL_MEMBER Int32s dot(Int32s sum, Int32s x, Int32s w) {
#if defined(__AVX512BW__)
    return wrapping_add(sum, Int32s(_mm512_madd_epi16(__m512i(x), __m512i(w))));
#elif defined(__AVX2__)
    return wrapping_add(sum, Int32s(_mm256_madd_epi16(__m256i(x), __m256i(w))));
#elif defined(__x86_64__)
    return wrapping_add(sum, Int32s(_mm_madd_epi16(__m128i(x), __m128i(w))));
#else
    return wrapping_add(sum, wrapping_add((x << 16 >> 16) * (w << 16 >> 16), (x >> 16) * (w >> 16)));
#endif
  }
};

typedef int32_t __attribute__((may_alias, aligned(1))) FourBytes;

// sum + x * w of the four bytes of a lane, x signed and w unsigned
#if defined(__AVX512VNNI__)
#define QL_BYTES
// In assembly, or g++ 12 copies sums from one register to another in every step of some loops.
struct Bytes : ByLanes<Bytes> {
  static QL_MEMBER Int32s dot(Int32s sum, Int32s x, Int32s w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

// The same for signed bytes of w, to which 128 is added by the instruction that loads them. In assembly, or g++ 12 adds
// it in a register of 32 bits before it fills the lanes.
#define QL_SIGNED_BYTES
struct SignedBytes : ByLanes<SignedBytes> {
  static QL_MEMBER Int32s spread(const char* w) {
    Int32s lanes;
    asm("vpxord %1%{1to16%}, %2, %0"
        : "=v"(lanes)
        : "m"(*reinterpret_cast<const FourBytes*>(w)), "v"(splat<Int32s>(int32_t(0x80808080))));
    return lanes;
  }
  static QL_MEMBER Int32s dot(Int32s sum, Int32s x, Int32s w) { return Bytes::dot(sum, x, w); }
};
#elif defined(__AVX2__) && !defined(__AVX512F__) && defined(__has_include)
#if __has_include(<avxvnniintrin.h>)  // a sign that the assembler knows it
#define QL_BYTES
struct Bytes : ByLanes<Bytes> {
  static QL_MEMBER Int32s dot(Int32s sum, Int32s x, Int32s w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
  }
};
#endif
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define QL_NIBBLE_BYTES
// Signed bytes of x times unsigned codes of at most four bits: an int16 holds eight sums of two products, each of which
// is at most 2 * 128 * 15 in magnitude. In assembly, or g++ 12 multiplies for all sums before it adds to the first, and
// has no registers for that.
struct Nibbles {
  static constexpr int64_t step = 32, lane = 4;
  static constexpr int sums = 12;

  template <int64_t N, int R, int V>
  static QL_MEMBER void add(Int32s (&sum)[R][V], const char* x, int64_t x_stride, const char* w, int64_t w_stride) {
    __m256i part[R][V];
    multiply<R, V, true>(part, x, x_stride, w, w_stride);
#pragma GCC unroll 1
    for (int64_t k = 4; k < N; k += 4) multiply<R, V, false>(part, x + k * kLanes, x_stride, w + k, w_stride);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = wrapping_add(sum[r][v], Int32s(_mm256_madd_epi16(part[r][v], ones)));
  }

 private:
  // part = or += the products of four bytes of each row
  template <int R, int V, bool FIRST>
  static QL_MEMBER void multiply(__m256i (&part)[R][V], const char* x, int64_t x_stride, const char* w,
                                 int64_t w_stride) {
    __m256i a[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] = load<__m256i>(x + v * x_stride);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m256i b = _mm256_set1_epi32(load<int32_t>(w + r * w_stride));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        __m256i products;
        if constexpr (FIRST) asm("vpmaddubsw %2, %1, %0" : "=x"(part[r][v]) : "x"(b), "x"(a[v]));
        else asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(part[r][v]), "=&x"(products) : "x"(b), "x"(a[v]));
      }
    }
  }
};
#endif

// V panels of x by Way::sums / V rows of w, of which `bytes` are multiplied, a multiple of four
template <class Way, class To, int V>
static void multiply_registers(const RowsOfW& w, PanelsOfX x, int64_t bytes, const Ahead& ahead, const To& to) {
  constexpr int R = Way::sums / V;
  Int32s sum[R][V];
  to.start(sum);
  CodesAhead rows = ahead.rows();
  int64_t k = 0;
  for (; k + Way::step <= bytes; k += Way::step) {
    if (k % 64 == 0) ahead.by_rows ? rows.fetch() : ahead.fetch(k / 64);
    Way::template add<Way::step>(sum, x.data + k * kLanes, x.stride, w.data + k, w.stride);
  }
  for (; Way::lane < Way::step && k < bytes; k += Way::lane)
    Way::template add<Way::lane>(sum, x.data + k * kLanes, x.stride, w.data + k, w.stride);
  to.take(sum);
}

template <class Way, class To>
static void multiply_registers(int64_t panels, int64_t rows, RowsOfW w, PanelsOfX x, int64_t bytes, const Ahead& ahead,
                               const To& to) {
  constexpr decltype(&multiply_registers<Way, To, 1>) kernels[] = {
      multiply_registers<Way, To, 1>, multiply_registers<Way, To, 2>, multiply_registers<Way, To, 3>};
  const int64_t step = Way::sums / panels;
  for (int64_t r = 0; r < rows; r += step) {
    kernels[panels - 1](w, x, bytes, ahead.share(r, step, rows), to.below(r));
    w.data += step * w.stride;
  }
}

// sum = the products of `bytes` of R rows of w and V panels of x, from where `to` says
template <class Way, class To, int R, int V>
QL_FN void multiply_block(const char* w, int64_t w_stride, const char* x, int64_t x_stride, int64_t bytes, const To& to,
                          Int32s (&sum)[R][V]) {
  to.start(sum);
  int64_t k = 0;
  for (; k + Way::step <= bytes; k += Way::step)
    Way::template add<Way::step>(sum, x + k * kLanes, x_stride, w + k, w_stride);
  for (; Way::lane < Way::step && k < bytes; k += Way::lane)
    Way::template add<Way::lane>(sum, x + k * kLanes, x_stride, w + k, w_stride);
}

// Blocks of columns that have scales of their own, V panels of x by `rows` rows of w: one call for all of them, since
// what a tile of one block needs to begin takes as long as a tenth of its products. Some codes are fetched with each.
template <class Way, class To, int V>
static void multiply_blocks(int64_t rows, RowsOfW w, PanelsOfX x, const BlocksOfW& blocks, CodesAhead& ahead, To to) {
  if constexpr (kKeepTotals && V == 2) {
    constexpr int R = Way::sums / V / 2;
    for (int64_t r = 0; r < rows; r += R, w.data += R * w.stride) {
      To of = to.below(r);
      const char *from = w.data, *with = x.data;
      Floats totals[R][V];
      of.load_totals(totals);
      for (int64_t left = blocks.bytes; left > 0; left -= blocks.block) {
        if (r == 0) ahead.fetch();
        Int32s sum[R][V];
        multiply_block<Way>(from, w.stride, with, x.stride, least(blocks.block, left), of, sum);
        of.add_to(totals, sum);
        from += blocks.block, with += blocks.block * kLanes, of = of.next();
      }
      to.below(r).store_totals(totals);
    }
    return;
  }
  constexpr int R = Way::sums / V;
  for (int64_t left = blocks.bytes; left > 0; left -= blocks.block) {
    ahead.fetch();
    for (int64_t r = 0; r < rows; r += R) {
      const To of = to.below(r);
      Int32s sum[R][V];
      multiply_block<Way>(w.data + r * w.stride, w.stride, x.data, x.stride, least(blocks.block, left), of, sum);
      of.take(sum);
    }
    w.data += blocks.block, x.data += blocks.block * kLanes, to = to.next();
  }
}

template <class Way, class To>
static void multiply_blocks(int64_t panels, int64_t rows, RowsOfW w, PanelsOfX x, const BlocksOfW& blocks,
                            CodesAhead& ahead, const To& to) {
  constexpr decltype(&multiply_blocks<Way, To, 1>) kernels[] = {
      multiply_blocks<Way, To, 1>, multiply_blocks<Way, To, 2>, multiply_blocks<Way, To, 3>};
  kernels[panels - 1](rows, w, x, blocks, ahead, to);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

#ifdef QL_AMX
// V <= 2 panels of x by 32 rows of w, signed; `bytes` is a multiple of 64
template <int V, bool SIGNED>
QL_TILES static void multiply_tiles(const RowsOfW& w, PanelsOfX x, int64_t bytes, const Ahead& ahead, Sums to) {
  uint32_t *d = to.d, *second = to.d + to.stride;
  QL_TILE_MEMORY();
  if (to.add) {
    _tile_loadd(0, d, 64);
    _tile_loadd(2, d + 256, 64);
    if constexpr (V == 2) {
      _tile_loadd(1, second, 64);
      _tile_loadd(3, second + 256, 64);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char *a = w.data, *b = x.data;
  for (int64_t k = 0; k < bytes; k += 64, a += 64, b += 1024) {
    _tile_loadd(4, a, w.stride);
    _tile_loadd(6, b, 64);
    if constexpr (SIGNED) _tile_dpbssd(0, 4, 6);
    else _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, a + 16 * w.stride, w.stride);
    if constexpr (SIGNED) _tile_dpbssd(2, 5, 6);
    else _tile_dpbsud(2, 5, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, b + x.stride, 64);
      if constexpr (SIGNED) _tile_dpbssd(1, 4, 7);
      else _tile_dpbsud(1, 4, 7);
      if constexpr (SIGNED) _tile_dpbssd(3, 5, 7);
      else _tile_dpbsud(3, 5, 7);
    }
    ahead.fetch(k / 64);
  }
  _tile_stored(0, d, 64);
  _tile_stored(2, d + 256, 64);
  if constexpr (V == 2) {
    _tile_stored(1, second, 64);
    _tile_stored(3, second + 256, 64);
  }
  QL_TILE_MEMORY();
}
#endif

}  // namespace QL_ISA
}  // namespace quantlib
