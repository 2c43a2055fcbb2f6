// sums[m, n] = sum over k of x[m, k] * w[n, k] for few rows m of x: lanes lie along k
//
// Every sum is made in one order, whatever the other rows are: lane l of a register takes each k with its place in a
// step, a block of kBlock columns at a time; the lanes of a block are added up by a tree, the blocks in order.
#pragma once
#include "matmul.h"
#include "packed.h"
#include "pairs.h"

namespace quantlib {
namespace QL_ISA {

constexpr int64_t kWeightRows = 4;  // rows of the weight that are multiplied together
constexpr int64_t kPanel = 32;      // rows of the weight whose sums are kept while x stays in the cache
constexpr int64_t kHeight = 264;    // rows of x that meet one slab: the more, the less is decoded again
constexpr int64_t kReadOnce = 16;   // of them, at most, for which a row of the weight is read from end to end

template <class E>
constexpr int64_t kBlock = scales_sums<E> ? 4096 : 2048;  // columns of a slab: the more, the fewer lanes are added up

constexpr int64_t kMostColumns = 4096;

typedef float Quad __attribute__((vector_size(16)));

// (sum of the lanes of a, of b, of c, of d), each by the same tree
QL_FN Quad add_lanes(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
  const auto pair = [](Floats a, Floats b) {
    return __m512d(Floats(_mm512_maskz_unpacklo_ps(0xffff, a, b)) + Floats(_mm512_maskz_unpackhi_ps(0xffff, a, b)));
  };
  const __m512d ab = pair(a, b), cd = pair(c, d);
  Floats sums = Floats(_mm512_maskz_unpacklo_pd(0xff, ab, cd)) + Floats(_mm512_maskz_unpackhi_pd(0xff, ab, cd));
  sums = sums + Floats(_mm512_maskz_shuffle_f32x4(0xffff, sums, sums, 0x4e));  // lanes 8 apart
  sums = sums + Floats(_mm512_maskz_shuffle_f32x4(0xffff, sums, sums, 0xb1));  // 4 apart
#else
  using I = Ints<Floats>;
  I low, high, low_pairs, high_pairs;
  for (int l = 0; l < kLanes; ++l) {
    const int group = l & ~3, place = l & 3;
    low[l] = group + place / 2 + place % 2 * kLanes;
    high[l] = low[l] + 2;
    low_pairs[l] = group + place % 2 + place / 2 * kLanes;
    high_pairs[l] = low_pairs[l] + 2;
  }
  const Floats ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Floats cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  Floats sums = __builtin_shuffle(ab, cd, low_pairs) + __builtin_shuffle(ab, cd, high_pairs);
  for (int distance = kLanes / 2; distance >= 4; distance /= 2) {
    I other;
    for (int l = 0; l < kLanes; ++l) other[l] = l ^ distance;
    sums = sums + __builtin_shuffle(sums, other);
  }
#endif
  Quad out;
  __builtin_memcpy(&out, &sums, sizeof out);
  return out;
}

// Scales that multiply sums: parts of the columns of a slab, and the scale of each row there
constexpr int64_t kMostParts = kMostColumns / 32;
struct Parts {
  int64_t count = 0, end[kMostParts];
  float scale[kWeightRows][kMostParts];
};

// sum[r, s] += sum over k of x[r, k] * w(n0 + s, k) for R rows of x and S of the weight; k counts units of 32 bits
template <int R, int S, class E, class Part>
QL_FN void multiply_part(const float* x, int64_t stride, const Part& w, int n0, int64_t begin, int64_t end,
                         Floats (&sum)[R][S]) {
  for (int64_t k = begin; k < end; k += kLanes) {
    Floats row[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) row[s] = w(n0 + s, k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats at = load<Floats>(x + r * stride + k);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sum[r][s] = multiply_add<E>(at, row[s], sum[r][s]);
    }
  }
}

// total[r, n0 + s] = fma(sum of a part, its scale, total) of each lane, for all parts
template <int R, int S, class E, class From>
QL_FN void multiply_parts(const float* x, int64_t stride, const From& w, int n0, const Parts& parts,
                          Floats (&total)[R][kWeightRows]) {
  for (int64_t p = 0, begin = 0; p < parts.count; begin = parts.end[p++]) {
    Floats sum[R][S] = {};
    multiply_part<R, S, E>(x, stride, w.part(p), n0, begin, parts.end[p], sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s)
        total[r][n0 + s] = fma(sum[r][s], everywhere(parts.scale[n0 + s][p]), total[r][n0 + s]);
  }
}

// sums[r, n] += sum over k < count of x[r, k] * w[n, k] for R rows, of which each code is decoded once; PARTS: scales
// change along a row. Twice as many registers hold sums then: two rows of the weight at once for more than three of x.
template <int R, bool PARTS, class E, class From>
QL_FN void multiply(const float* x, int64_t stride, const From& w, int64_t count, const Parts& parts, float* sums) {
  Floats total[R][kWeightRows] = {};
  if constexpr (!PARTS) {
    multiply_part<R, kWeightRows, E>(x, stride, w.part(0), 0, 0, count, total);
  } else if constexpr (R <= 3) {
    multiply_parts<R, kWeightRows, E>(x, stride, w, 0, parts, total);
  } else {
    multiply_parts<R, kWeightRows / 2, E>(x, stride, w, 0, parts, total);
    multiply_parts<R, kWeightRows / 2, E>(x, stride, w, kWeightRows / 2, parts, total);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float* to = sums + r * kPanel;
    store(to, load<Quad>(to) + add_lanes(total[r][0], total[r][1], total[r][2], total[r][3]));
  }
}

// The same for any number of rows, at most MOST at once
template <int MOST, bool PARTS, class E, class From>
QL_FN void multiply_rows(const float* x, int64_t stride, const From& w, int64_t count, const Parts& parts, float* sums,
                         int64_t rows) {
  for (; rows >= MOST; rows -= MOST, x += MOST * stride, sums += MOST * kPanel)
    multiply<MOST, PARTS, E>(x, stride, w, count, parts, sums);
  if constexpr (MOST > 1) {
    if (rows) multiply_rows<MOST - 1, PARTS, E>(x, stride, w, count, parts, sums, rows);
  }
}

// A piece of the weight in FP32: zeros behind its columns up to a whole register.
struct Slab {
  alignas(64) float w[kWeightRows][kBlock<float>];

  struct Part {
    const Slab& slab;
    QL_MEMBER Floats operator()(int n, int64_t k) const { return load<Floats>(slab.w[n] + k); }
  };
  QL_MEMBER Part part(int64_t) const { return {*this}; }
};

static void multiply_slab(const float* x, int64_t stride, const Slab& slab, int64_t count, float* sums, int64_t rows) {
  multiply_rows<kRowTile, false, float>(x, stride, slab, count, Parts(), sums, rows);
}

#ifdef __AVX512BF16__
// Codes that are decoded where they are multiplied.
template <class F, bool AFFINE>
struct Direct {
  using Pairs = decltype(pairs_of<F, AFFINE>(0));
  const char* codes[kWeightRows];
  const int32_t (*zero_point)[kMostParts];  // of each row and part
  int64_t ahead;                            // bytes to what is read next
  const Pairs symmetric = pairs_of<F, AFFINE>(0);

  template <int COUNT>
  struct Part {
    const Direct& direct;
    Pairs pairs[COUNT];
    QL_MEMBER Floats operator()(int n, int64_t k) const {
      const char* codes = direct.codes[n] + bytes_of<F>(2 * k);
      if constexpr (F::per_byte == 1) {
        __builtin_prefetch(codes + direct.ahead);
      } else {  // the rows that come next from their first byte to their last: memory is faster so for nibbles, not
                // bytes
        constexpr int64_t bytes = bytes_of<F>(32);
        if (n * bytes % 64 == 0)
          __builtin_prefetch(direct.codes[0] + direct.ahead + kWeightRows * bytes_of<F>(2 * k) + n * bytes);
      }
      return pairs[COUNT == 1 ? 0 : n](codes);
    }
  };
  QL_MEMBER auto part(int64_t p) const {
    if constexpr (AFFINE) {
      const auto pairs = [&](int n) { return Pairs(zero_point[n][p]); };
      return Part<kWeightRows>{*this, {pairs(0), pairs(1), pairs(2), pairs(3)}};
    } else {
      return Part<1>{*this, {symmetric}};
    }
  }
};

template <class F, bool AFFINE>
void multiply_codes(const float* x, int64_t stride, const char* const (&codes)[kWeightRows], int64_t ahead,
                    const int32_t (*zero_point)[kMostParts], int64_t count, const Parts& parts, float* sums,
                    int64_t rows) {
  const Direct<F, AFFINE> direct = {{codes[0], codes[1], codes[2], codes[3]}, zero_point, ahead};
  constexpr int64_t twice = 2048;  // units of x that are read twice from the first-level cache, of kRowTile rows
  if (!parts.count) multiply_rows<kRowTile, false, uint16_t>(x, stride, direct, count, parts, sums, rows);
  else if (stride <= twice) multiply_rows<kRowTile, true, uint16_t>(x, stride, direct, count, parts, sums, rows);
  else multiply_rows<3, true, uint16_t>(x, stride, direct, count, parts, sums, rows);
}

#elif defined(QL_VALUES)
// Codes that are decoded where they are multiplied: the values of 32 of them from column k of row n on.
template <class F, bool AFFINE>
struct Direct {
  using Values = decltype(values_of<F, AFFINE>(0));
  const char* codes[kWeightRows];
  const int32_t (*zero_point)[kMostParts];  // of each row and part
  int64_t ahead;                            // bytes to the same columns of the rows that come next
  const Values symmetric = values_of<F, AFFINE>(0);

  static constexpr bool by_quarters = Values::by_quarters;
  // Rows of the weight at once, for so many of x: four sums at least, as each waits for itself
  static constexpr int together(int rows) { return rows <= 2 || (by_quarters && rows == 3) ? 4 : 2; }

  // The products of S rows from n0 on
  template <int S>
  struct Part {
    const Direct& direct;
    const int n0;
    Values values[S];
    QL_MEMBER const Values& of(int n) const { return values[n]; }
  };
  template <int S>
  struct Symmetric {
    const Direct& direct;
    const int n0;
    QL_MEMBER const Values& of(int) const { return direct.symmetric; }
  };
  template <int S>
  QL_MEMBER auto part(int64_t p, int n0) const {
    if constexpr (AFFINE) {
      const auto of = [&](int n) { return Values(zero_point[n0 + n][p]); };
      if constexpr (S == 1) return Part<1>{*this, n0, {of(0)}};
      else if constexpr (S == 2) return Part<2>{*this, n0, {of(0), of(1)}};
      else return Part<4>{*this, n0, {of(0), of(1), of(2), of(3)}};
    } else {
      return Symmetric<S>{*this, n0};
    }
  }
  // Values k .. k + 32 of row n0 + n, or a quarter of them
  template <class Part>
  static QL_MEMBER void values(const Part& part, int n, int64_t k, Floats (&v)[4]) {
    part.of(n)(fetch(part, n, k), v);
  }
  template <class Part>
  static QL_MEMBER Floats quarter(const Part& part, int n, int64_t k, int q) {
    return part.of(n).quarter(q ? part.direct.codes[part.n0 + n] + bytes_of<F>(k) : fetch(part, n, k), q);
  }

 private:
  // The place of 32 codes. The rows that come next are fetched from their first byte to their last: memory is faster so
  // than from several rows in turn.
  template <template <int> class P, int S>
  static QL_MEMBER const char* fetch(const P<S>& part, int n, int64_t k) {
    constexpr int64_t bytes = bytes_of<F>(32);
    const Direct& d = part.direct;
    const char* from = d.codes[part.n0 + n] + bytes_of<F>(k);
    if constexpr (S == 1) __builtin_prefetch(from + d.ahead);
    else if (n * bytes % 64 == 0)
      __builtin_prefetch(d.codes[0] + d.ahead + kWeightRows * bytes_of<F>(k) + (part.n0 + n) * bytes);
    return from;
  }
};

// The same, decoded before, from column k0 on: for rows of x so many that each code would be decoded many times.
struct SlabOfValues {
  static constexpr bool by_quarters = true;
  static constexpr int together(int rows) { return rows <= 3 ? 4 : 2; }
  alignas(64) float w[kWeightRows * kBlock<Value>];  // a register of each row in turn
  int64_t k0;

  struct Part {
    const SlabOfValues& slab;
    const int n0;
  };
  template <int S>
  QL_MEMBER Part part(int64_t, int n0) const {
    return {*this, n0};
  }
  static QL_MEMBER Floats quarter(const Part& part, int n, int64_t k, int q) {
    return load<Floats>(part.slab.w + (k - part.slab.k0) * kWeightRows + part.n0 * kLanes + at(n, q));
  }
  // Register q of 32 columns of row n
  static constexpr int64_t at(int n, int q) { return (q * kWeightRows + n) * kLanes; }
};

constexpr int64_t kChunkOfValues = 512;  // columns of x that stay in the first-level cache, of kDirectRows rows

// Pieces of the columns of a slab that have one scale, or yet none: number p begins at k.
struct Piece {
  int64_t p, k;
};
QL_FN int64_t end_of(const Piece& piece, const Parts& parts, int64_t count) {
  return parts.count ? parts.end[piece.p] : least(count, piece.k + kChunkOfValues);
}

// Decodes the pieces from `first` on, as many as fit into the first-level cache; where the next one begins.
template <class From>
QL_FN Piece decode_pieces(const From& from, const Piece& first, int64_t count, const Parts& parts, SlabOfValues& slab) {
  Piece piece = first;
  slab.k0 = first.k;
  while (piece.k < count) {
    const int64_t end = end_of(piece, parts, count);
    if (piece.k > first.k && end - first.k > kChunkOfValues) break;
    for (int n = 0; n < kWeightRows; ++n) {
      const auto part = from.template part<1>(parts.count ? piece.p : 0, n);
      for (int64_t k = piece.k; k < end; k += 32) {
        Floats v[4];
        if constexpr (From::by_quarters)
          for (int q = 0; q < 4; ++q) v[q] = From::quarter(part, 0, k, q);
        else From::values(part, 0, k, v);
        for (int q = 0; q < 4; ++q) store(slab.w + (k - first.k) * kWeightRows + SlabOfValues::at(n, q), v[q]);
      }
    }
    piece = {piece.p + 1, end};
  }
  return piece;
}

// total[r, n0 + n] += the lanes of the sum over k .. end of x[r, k] * w(n0 + n, k), for R rows of x and S of the
// weight: columns that share scales, which it is multiplied by, or that have them yet to come
template <int R, int S, class From, class Part>
QL_FN void multiply_values(const float* x, int64_t stride, const Part& part, int n0, int64_t k, int64_t end,
                           const float* scale, Floats (*total)[kWeightRows]) {
  Floats sum[R][S] = {};
  for (; k < end; k += 32) {
    if constexpr (From::by_quarters) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        Floats at[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) at[r] = load<Floats>(x + r * stride + k + q * kLanes);
#pragma GCC unroll 4
        for (int n = 0; n < S; ++n) {
          const Floats v = From::quarter(part, n, k, q);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r][n] = fma(at[r], v, sum[r][n]);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < S; ++n) {
        Floats v[4];
        From::values(part, n, k, v);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sum[r][n] = fma(load<Floats>(x + r * stride + k + q * kLanes), v[q], sum[r][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < S; ++n) {
    const Floats s = scale ? Floats(_mm256_broadcast_ss(scale + n * kMostParts)) : splat<Floats>(1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r][n0 + n] = fma(sum[r][n], s, total[r][n0 + n]);
  }
}

// The same for R rows and the pieces from `piece` to column `stop` of a slab, as many rows of the weight at once as
// registers hold
template <int R, class From>
static void multiply_values(const float* x, int64_t stride, const From& w, Piece piece, int64_t stop,
                            const Parts& parts, Floats (*total)[kWeightRows]) {
  constexpr int S = From::together(R);
  while (piece.k < stop) {
    const int64_t end = end_of(piece, parts, stop);
    for (int n = 0; n < kWeightRows; n += S)
      multiply_values<R, S, From>(x, stride, w.template part<S>(parts.count ? piece.p : 0, n), n, piece.k, end,
                                  parts.count ? &parts.scale[n][piece.p] : nullptr, total);
    piece = {piece.p + 1, end};
  }
}

template <class From>
QL_FN void multiply_all_values(const float* x, int64_t stride, const From& w, const Piece& piece, int64_t stop,
                               const Parts& parts, Floats (*total)[kWeightRows], int64_t rows) {
  for (; rows > 4; rows -= 3, x += 3 * stride, total += 3) multiply_values<3>(x, stride, w, piece, stop, parts, total);
  constexpr decltype(&multiply_values<1, From>) some[] = {multiply_values<1, From>, multiply_values<2, From>,
                                                          multiply_values<3, From>, multiply_values<4, From>};
  some[rows - 1](x, stride, w, piece, stop, parts, total);
}

constexpr int64_t kDirectRows = 4;

template <class F, bool AFFINE>
void multiply_codes(const float* x, int64_t stride, const char* const (&codes)[kWeightRows], int64_t ahead,
                    const int32_t (*zero_point)[kMostParts], int64_t count, const Parts& parts, float* sums,
                    int64_t rows) {
  const Direct<F, AFFINE> direct = {{codes[0], codes[1], codes[2], codes[3]}, zero_point, ahead};
  Floats total[kHeight][kWeightRows];
  __builtin_memset(total, 0, size_t(rows) * sizeof total[0]);
  if (rows <= kDirectRows) {
    multiply_all_values(x, stride, direct, {0, 0}, count, parts, total, rows);
  } else {
    SlabOfValues slab;
    for (Piece piece = {0, 0}; piece.k < count;) {
      const Piece next = decode_pieces(direct, piece, count, parts, slab);
      multiply_all_values(x, stride, slab, piece, next.k, parts, total, rows);
      piece = next;
    }
  }
  for (int64_t r = 0; r < rows; ++r, sums += kPanel)
    store(sums, load<Quad>(sums) + add_lanes(total[r][0], total[r][1], total[r][2], total[r][3]));
}
#endif

#ifdef QL_CODES
static inline decltype(&multiply_codes<int8, false>) dot_kernel(Type format, bool affine) {
  return visit(format, [&](auto f) -> decltype(&multiply_codes<int8, false>) {
    using F = decltype(f);
    if constexpr (!in_units<F>) return nullptr;
    else if constexpr (F::is_float) return multiply_codes<F, false>;
    else return affine ? multiply_codes<F, true> : multiply_codes<F, false>;
  });
}
#endif

// ---- the product ----------------------------------------------------------------------------------------------------

// Rows m0 .. m0 + count of y, or those of a list
template <class E>
class Dots {
 public:
  Dots(const DequantMatmul& p, const int64_t* list, int64_t m0, int64_t count, const Plan& plan)
      : p_(p), plan_(plan), x_{p.x, p.x_type, p.weight.grid.K, list}, m0_(m0), count_(count) {}

  // odd[r] of each row: whether it is to be multiplied in FP32 instead
  void operator()(ParallelFor run, uint8_t* odd) const {
    const bool in_place = !scales_sums<E> && p_.x_type == Type::float32 && K_ % kLanes == 0 && !x_.list;
    const int64_t stride = stride_of(K_), rows = count_ * plan_.parts, height = kHeight / plan_.parts;
    const Scratch packed(in_place ? 0 : rows * stride * 4);
    auto* data = static_cast<float*>(packed.data());
    if (!in_place)
      parallel(run, count_, most(1, kGrain / most(1, K_)), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
#ifdef __AVX512BF16__
          if constexpr (scales_sums<E>) {
            float* high = data + (r / height * height * plan_.parts + r % height) * stride;
            float* low = high + least(height, count_ - r / height * height) * stride;  // where there are parts
            odd[r] = pack_row(x_, m0_ + r, plan_.codes.order, high, low);
            continue;
          }
#elif defined(QL_VALUES)
          if constexpr (scales_sums<E>) {
            odd[r] = pack_row(x_, m0_ + r, plan_.codes.order, data + r * stride);
            continue;
          }
#endif
          x_.floats(m0_ + r, 0, K_, stride, data + r * stride);
        }
      });
    const float* x = in_place ? static_cast<const float*>(p_.x) + m0_ * K_ : data;
    const int64_t x_stride = in_place ? K_ : stride;
    const int64_t panel = rows <= kReadOnce && N_ < 8 * kPanel ? kWeightRows : kPanel;
    const int64_t across = (N_ + panel - 1) / panel, down = (count_ + height - 1) / height;
    const int64_t work = panel * least(rows, kHeight) * most(1, K_);
    parallel(run, across * down, most(1, 4 * kGrain / work), [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t r = piece / across * height, n = piece % across * panel;
        multiply_piece(x, x_stride, r, least(r + height, count_), n, least(n + panel, N_));
      }
    });
  }

 private:
  const DequantMatmul& p_;
  const Plan& plan_;
  const Source x_;
  const int64_t m0_, count_;
  const WeightRows weight_ = WeightRows(p_.weight);
  const int64_t N_ = p_.weight.grid.M, K_ = p_.weight.grid.K;
  const Row y_row_ = row_of(p_.x_type);
  const Encode encode_ = encoder(p_.x_type, false, false);
  const bool scales_parts_ = scales_sums<E> && weight_.cols > 1;

  // Floats from a row of x to the next: chunks of those that are multiplied together lie in different sets of the
  // first-level cache.
  static int64_t stride_of(int64_t K) {
#ifdef QL_VALUES
    if (scales_sums<E> && K > kChunkOfValues) return round_up(K, 1024) + kChunkOfValues + kUnits;
#endif
    return round_up(K, kWhole<E>) * int64_t(sizeof(E)) / 4;
  }

  // Rows r0 .. r1 and columns n0 .. n1 of y, at most kPanel
  void multiply_piece(const float* x, int64_t stride, int64_t r0, int64_t r1, int64_t n0, int64_t n1) const {
    alignas(64) float sums[kHeight * kPanel];
    const int64_t rows = r1 - r0, all = rows * plan_.parts;  // first parts, then second ones
    for (int64_t at = 0; at < all * kPanel; ++at) sums[at] = 0.0f;
    const auto multiply = [&](int64_t n, int64_t k) {
      multiply_block(x + r0 * plan_.parts * stride + k * int64_t(sizeof(E)) / 4, stride, n, k, least(kBlock<E>, K_ - k),
                     sums + (n - n0), all);
    };
    if (all <= kReadOnce)  // the weight is read as it lies
      for (int64_t n = n0; n < n1; n += kWeightRows)
        for (int64_t k = 0; k < K_; k += kBlock<E>) multiply(n, k);
    else  // a part of x stays in the cache
      for (int64_t k = 0; k < K_; k += kBlock<E>)
        for (int64_t n = n0; n < n1; n += kWeightRows) multiply(n, k);
    float scale[kPanel];
    if (scales_sums<E> && !scales_parts_)
      for (int64_t n = n0; n < n1; ++n) scale[n - n0] = weight_.scale(n, 0);
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = sums + r * kPanel;
      if (plan_.parts == 2)
        for (int64_t n = 0; n < kPanel; ++n) sum[n] = add(sum[n], sum[rows * kPanel + n]);
      const int64_t m = m0_ + r0 + r;
      finish(sum, scale, x_.list ? x_.list[m] : m, n0, n1);
    }
  }

  // The last row stands in for those below it: their sums are not used.
  int64_t row_at(int64_t n) const { return least(n, N_ - 1); }

#ifdef QL_CODES
  const decltype(dot_kernel(Type::int8, false)) kernel_ = dot_kernel(p_.weight.format, p_.weight.is_affine());
#endif

  // sums += of rows n .. n + kWeightRows of the weight, columns k .. k + columns
  void multiply_block(const float* x, int64_t stride, int64_t n0, int64_t k, int64_t columns, float* sums,
                      int64_t rows) const {
#ifdef QL_CODES
    if constexpr (scales_sums<E>) {
      const char* codes[kWeightRows];
      for (int64_t n = 0; n < kWeightRows; ++n) codes[n] = codes_at(row_at(n0 + n), k);
      const bool in_turn = weight_.format.per_byte > 1 && rows <= kReadOnce;  // rows are read one after the other
      const int64_t whole = columns / 32 * 32, rest = columns - whole,
                    ahead = codes_at(kWeightRows, in_turn ? (kWeightRows - 1) * k : 0) - codes_at(0, 0);
      if (whole) multiply_direct(x, stride, codes, ahead, n0, k, whole, sums, rows);
      if (!rest) return;
      char last[kWeightRows][32] = {};
      for (int64_t n = 0; n < kWeightRows; ++n) {
        __builtin_memcpy(last[n], codes_at(row_at(n0 + n), k + whole), size_t(row_bytes(weight_.format, rest)));
        codes[n] = last[n];
      }
      return multiply_direct(x + whole * int64_t(sizeof(E)) / 4, stride, codes, 0, n0, k + whole, rest, sums, rows);
    }
#endif
    Slab slab;
    for (int64_t n = 0; n < kWeightRows; ++n) {
      weight_.row(row_at(n0 + n), k, columns, slab.w[n]);
      for (int64_t j = columns; j % kLanes; ++j) slab.w[n][j] = 0.0f;
    }
    multiply_slab(x, stride, slab, round_up(columns, kLanes), sums, rows);
  }

#ifdef QL_CODES
  const char* codes_at(int64_t n, int64_t k) const {
    return static_cast<const char*>(weight_.w.codes) + byte_offset(weight_.format, K_, n, k);
  }

  static int64_t units(int64_t columns) { return round_up(columns, 32) * int64_t(sizeof(E)) / 4; }

  void multiply_direct(const float* x, int64_t stride, const char* const (&codes)[kWeightRows], int64_t ahead,
                       int64_t n0, int64_t k, int64_t columns, float* sums, int64_t rows) const {
    Parts parts;
    int32_t zero_point[kWeightRows][kMostParts];
    const int64_t J = k / weight_.bk, count = (k + columns - 1) / weight_.bk + 1 - J;
    if (scales_parts_) {
      parts.count = count;
      for (int64_t n = 0; n < kWeightRows; ++n) weight_.row_scales(row_at(n0 + n), J, count, parts.scale[n]);
      for (int64_t p = 0; p < count; ++p) parts.end[p] = units(least(columns, (J + p + 1) * weight_.bk - k));
    }
    if (weight_.w.is_affine())
      for (int64_t n = 0; n < kWeightRows; ++n) weight_.row_zero_points(row_at(n0 + n), J, count, zero_point[n]);
    kernel_(x, stride, codes, ahead, zero_point, units(columns), parts, sums, rows);
  }
#endif

  // y[m, n0 .. n1) from the sums of a row
  void finish(const float* sums, const float* scale, int64_t m, int64_t n0, int64_t n1) const {
    alignas(64) float total[kPanel] = {};
    for (int64_t n = n0; n < n1; ++n) {
      float sum = sums[n - n0];
      if (scales_sums<E> && !scales_parts_) sum = mul(sum, scale[n - n0]);
      sum = add(sum, 0.0f);  // a product that underflows may be -0, a sum from +0 never is
      total[n - n0] = p_.epilogue.bias ? add(sum, p_.epilogue.bias[n]) : sum;
    }
    for (int64_t n = 0; n < n1 - n0; n += kLanes)
      store(total + n, activate(load<Floats>(total + n), p_.epilogue.activation));
    encode_(total, nullptr, nullptr, kAsIs, static_cast<char*>(p_.y) + byte_offset(y_row_, N_, m, n0), n1 - n0);
  }
};

}  // namespace QL_ISA
}  // namespace quantlib
