// sums[m, n] = sum over k of x[m, k] * w[n, k] for few rows m of x: lanes lie along n, for AVX-512
//
// 64 bytes of each of sixteen rows of the weight are transposed in registers, which then hold four bytes of each row.
// They become units of 32 bits, a float or two BF16, and a unit meets those of all rows of x, which memory broadcasts:
// no sum has lanes to be added up, a code is decoded once for sixteen rows of x, and a scale multiplies sixteen sums.
// Each sum takes its parts in one order, which depends on how many rows of x are multiplied together.
#pragma once
#include "../activation.h"
#include "matmul.h"
#include "packed.h"
#include "quads.h"

#ifdef QL_QUADS
namespace quantlib {
namespace QL_ISA {

constexpr int64_t kColumnRows = 16;   // of x that are multiplied together, at most
constexpr int64_t kColumnPiece = 64;  // rows of the weight whose sums are kept together
constexpr int64_t kColumnLines = 4;   // of a row of the weight that are transposed before they are multiplied

// sums[r] += sum over `count` registers of x[r] * units, for R rows of x; times the scales of the rows of the weight
// where there are some. x has R values a unit. Several sums for each are made at once, so that none waits for itself.
// What lies at `ahead` is fetched meanwhile, as many lines as registers: all at once, a core would wait for them.
template <class E, class Quads, int R>
void multiply_quads(const Quads& quads, const __m512i* from, int64_t count, const char* ahead, const float* x,
                    const Floats* scale, float* sums) {
  constexpr int C = R <= 3 ? 4 : R <= 12 ? 2 : 1, together = Quads::units < C ? C / Quads::units : 1;
  Floats sum[C][R] = {};
  for (int64_t i = 0; i < count; i += together)
#pragma GCC unroll 4
    for (int t = 0; t < together; ++t) {
      __builtin_prefetch(ahead + (i + t) * 64, 0, 3);
      const auto bytes = quads.prepared(from[i + t]);
#pragma GCC unroll 8
      for (int j = 0; j < Quads::units; ++j, x += R) {
        const Floats w = quads.unit(bytes, j);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          Floats& to = sum[(t * Quads::units + j) % C][r];
          to = multiply_add<E>(everywhere(x[r]), w, to);
        }
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int half = C / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int c = 0; c < half; ++c) sum[c][r] = sum[c][r] + sum[c + half][r];
    const Floats all = sum[0][r];
    const Floats before = load<Floats>(sums + r * kLanes);
    store(sums + r * kLanes, scale ? fma(all, *scale, before) : before + all);
  }
}

// R of multiply_quads for so many rows: rows of zeros stand in for those that are missing.
constexpr int64_t column_rows(int64_t rows) { return rows <= 8 ? rows : round_up(rows, 2); }

template <class E, class Quads>
QL_FN auto quads_kernel(int64_t rows) {
  constexpr decltype(&multiply_quads<E, Quads, 1>) kernels[] = {
      multiply_quads<E, Quads, 1>,  multiply_quads<E, Quads, 2>,  multiply_quads<E, Quads, 3>,
      multiply_quads<E, Quads, 4>,  multiply_quads<E, Quads, 5>,  multiply_quads<E, Quads, 6>,
      multiply_quads<E, Quads, 7>,  multiply_quads<E, Quads, 8>,  multiply_quads<E, Quads, 10>,
      multiply_quads<E, Quads, 12>, multiply_quads<E, Quads, 14>, multiply_quads<E, Quads, 16>};
  return kernels[rows <= 8 ? rows - 1 : rows / 2 + 3];
}

// Rows m0 .. m0 + count of y, or those of a list
template <class E>
class Columns {
 public:
  Columns(const DequantMatmul& p, const int64_t* list, int64_t m0, int64_t count, const Plan& plan)
      : p_(p), parts_(plan.parts), x_{p.x, p.x_type, p.weight.grid.K, list}, m0_(m0), count_(count) {}

  // odd[r] of each row: whether it is to be multiplied in FP32 instead
  void operator()(ParallelFor run, uint8_t* odd) const {
    visit(p_.weight.format, [&](auto f) {
      using F = decltype(f);
      if constexpr (multiplies<F>) {
        if constexpr (!F::is_float)
          if (p_.weight.is_affine()) return multiply<F, true>(run, odd);
        multiply<F, false>(run, odd);
      }
    });
  }

 private:
  const DequantMatmul& p_;
  const int64_t parts_;
  const Source x_;
  const int64_t m0_, count_;
  const WeightRows weight_ = WeightRows(p_.weight);
  const int64_t N_ = p_.weight.grid.M, K_ = p_.weight.grid.K;
  const Row y_row_ = row_of(p_.x_type);
  const Encode encode_ = encoder(p_.x_type, false, false);
  // Chunks of rows of x that are multiplied together: `height_` of each, but for the last; so many in all.
  const int64_t most_ = kColumnRows / parts_, chunks_ = (count_ + most_ - 1) / most_;
  const int64_t height_ = (count_ + chunks_ - 1) / chunks_;
  const int64_t units_ = round_up(K_, 32) * int64_t(sizeof(E)) / 4;               // of a row of x
  const int64_t chunk_floats_ = units_ * column_rows(height_ * parts_) + kLanes;  // `pack` writes beyond the last unit
  const bool scales_parts_ = !scales_sums<E> || weight_.cols > 1;

  template <class F>
  static constexpr bool multiplies = in_quads<F> && (!scales_sums<E> || in_units<F>);

  int64_t rows_of(int64_t c) const { return least(height_, count_ - c * height_); }

  template <class F, bool AFFINE>
  void multiply(ParallelFor run, uint8_t* odd) const {
    using Quads = decltype(quads_of<E, F, AFFINE>());
    const Scratch packed(chunks_ * chunk_floats_ * 4);
    auto* x = static_cast<float*>(packed.data());
    parallel(run, chunks_, most(1, kGrain / most(1, K_ * kColumnRows)), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) pack<Quads>(c, x + c * chunk_floats_, odd);
    });
    const int64_t pieces = (N_ + kColumnPiece - 1) / kColumnPiece, parts = weight_.cols;
    parallel(run, pieces, most(1, 4 * kGrain / (kColumnPiece * count_ * K_)), [&](int64_t begin, int64_t end) {
      const Scratch sums(chunks_ * kColumnRows * kColumnPiece * 4), shared(parts * int64_t(sizeof(RowsShare)));
      const Scratch row(kLanes * round_up(parts, kLanes) * 4);
      auto quads = quads_of<E, F, AFFINE>();
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t n0 = piece * kColumnPiece, n1 = least(N_, n0 + kColumnPiece);
        auto* to = static_cast<float*>(sums.data());
        __builtin_memset(to, 0, size_t(chunks_ * kColumnRows * kColumnPiece * 4));
        for (int64_t n = n0; n < n1; n += kLanes, to += kColumnRows * kLanes) {
          auto* of_parts = static_cast<RowsShare*>(shared.data());
          if (scales_parts_) share_scales(n, of_parts, static_cast<float*>(row.data()));
          if constexpr (AFFINE) share_zero_points(n, of_parts, static_cast<int32_t*>(row.data()));
          multiply_sixteen<F>(quads, n, x, of_parts, to);
        }
        finish(n0, n1, static_cast<const float*>(sums.data()));
      }
    });
  }

  // ---- x ----

  // Chunk c: unit u of lane r is to[u * rows + r]; lanes are rows of x, then their second parts, then zeros.
  template <class Quads>
  void pack(int64_t c, float* to, uint8_t* odd) const {
    constexpr int64_t columns = 256;
    const int64_t rows = rows_of(c), m = m0_ + c * height_, R = column_rows(rows * parts_);
    alignas(64) float x[kLanes][columns] = {};
    for (int64_t k = 0; k < K_; k += columns) {
      const int64_t n = least(columns, K_ - k), whole = round_up(n, 32), units = whole * int64_t(sizeof(E)) / 4;
      for (int64_t r = 0; r < rows; ++r)
        read_row<Quads>(m + r, k, n, whole, x[r], x[(parts_ - 1) * rows + r], odd, c * height_ + r);
      if (R == 1) {
        __builtin_memcpy(to, x[0], size_t(units) * 4);
        to += units;
        continue;
      }
      for (int64_t u = 0; u < units; u += kLanes) {
        Floats square[kLanes];
        for (int l = 0; l < kLanes; ++l) square[l] = load<Floats>(x[l] + u);
        transpose(square);
        for (int l = 0; l < kLanes; ++l, to += R) store(to, square[l]);  // the next one lies over what is too much
      }
    }
  }

  // Columns k .. k + n of row m as units, zeros up to `whole`; odd[r] says whether the row is, from its first column on
  template <class Quads>
  void read_row(int64_t m, int64_t k, int64_t n, int64_t whole, float* high, [[maybe_unused]] float* low,
                [[maybe_unused]] uint8_t* odd, [[maybe_unused]] int64_t r) const {
#ifdef __AVX512BF16__
    if constexpr (scales_sums<E>) {
      uint16_t order[32];
      for (int p = 0; p < 32; ++p) order[p] = uint16_t(Quads::order(p));
      alignas(64) float x[256];
      const __m512i places = load_words(order);
      bool is = false;
      if (x_.type == Type::bfloat16) {
        auto* words = reinterpret_cast<uint16_t*>(x);
        __builtin_memcpy(words, x_.at(m, k), size_t(n) * 2);
        for (int64_t j = n; j < whole; ++j) words[j] = 0;
        is = is_odd(words, n);
        for (int64_t u = 0; u < whole / 2; u += kLanes)
          store(high + u, _mm512_maskz_permutexvar_epi16(0xffffffff, places, load<__m512i>(x + u)));
      } else {
        x_.floats(m, k, n, whole, x);
        is = is_odd(reinterpret_cast<const uint32_t*>(x), n);
        for (int64_t u = 0; u < whole / 2; u += kLanes) {
          store(high + u, _mm512_maskz_permutexvar_epi16(0xffffffff, places, part_of(x + 2 * u, 0)));
          store(low + u, _mm512_maskz_permutexvar_epi16(0xffffffff, places, part_of(x + 2 * u, 1)));
        }
      }
      odd[r] = uint8_t(k ? odd[r] | is : is);
      return;
    }
#endif
    x_.floats(m, k, n, whole, high);
  }

  // ---- the weight ----

  // The last row stands in for those below it: their sums are not used.
  int64_t row_at(int64_t n) const { return least(n, N_ - 1); }

  // Lane l of part J: what row n + l has there; rows: a place for them
  void share_scales(int64_t n, RowsShare* parts, float* rows) const {
    share(
        rows, parts, [](RowsShare& part) { return &part.scale; },
        [&](int64_t l, float* row) { weight_.row_scales(row_at(n + l), 0, weight_.cols, row); });
  }
  void share_zero_points(int64_t n, RowsShare* parts, int32_t* rows) const {
    share(
        rows, parts, [](RowsShare& part) { return &part.zero_point; },
        [&](int64_t l, int32_t* row) { weight_.row_zero_points(row_at(n + l), 0, weight_.cols, row); });
  }
  template <class T, class Place, class Read>
  void share(T* rows, RowsShare* parts, const Place& place, const Read& read) const {
    using V = __typeof__(*place(*parts));
    const int64_t stride = round_up(weight_.cols, kLanes);
    for (int64_t l = 0; l < kLanes; ++l) read(l, rows + l * stride);
    for (int64_t J = 0; J < weight_.cols; J += kLanes) {
      V square[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) square[l] = load<V>(rows + l * stride + J);
      transpose(square);
      for (int64_t l = 0; l < least(kLanes, weight_.cols - J); ++l) *place(parts[J + l]) = square[l];
    }
  }

  // sums += of rows n .. n + 16 of the weight. Meanwhile memory fetches the rows that come next, from their first byte
  // to their last.
  template <class F, class Quads>
  QL_MEMBER void multiply_sixteen(Quads& quads, int64_t n, const float* x, const RowsShare* parts, float* sums) const {
    constexpr int64_t line = 64 * F::per_byte, quad = kQuadCodes<F>, most = kColumnLines * line;
    int64_t offset[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) offset[l] = row_at(n + l) * row_bytes(weight_.format, K_);
    const char* ahead = codes_at(n + kLanes);
    for (int64_t k = 0, J = 0; k < K_; k += most) {
      const int64_t end = least(k + most, K_);
      alignas(64) __m512i bytes[kColumnLines * kLanes];
      for (int64_t j = k; j < end; j += line) {
        const char* codes = static_cast<const char*>(weight_.w.codes) + bytes_of<F>(j);
        transpose_line(codes, offset, bytes_of<F>(least(line, end - j)), bytes + (j - k) / quad);
      }
      for (int64_t begin = k; begin < end;) {
        const int64_t stop = least(end, (J + 1) * weight_.bk), count = round_up(stop - begin, 32) / quad;
        quads.begin(parts[J]);
        for (int64_t c = 0; c < chunks_; ++c) {
          const int64_t R = column_rows(rows_of(c) * parts_);
          quads_kernel<E, Quads>(R)(quads, bytes + (begin - k) / quad, count, ahead,
                                    x + c * chunk_floats_ + begin * int64_t(sizeof(E)) / 4 * R,
                                    scales_sums<E> && scales_parts_ ? &parts[J].scale : nullptr,
                                    sums + c * kColumnRows * kColumnPiece);
        }
        ahead += count * 64;
        begin = stop;
        J += begin == (J + 1) * weight_.bk;
      }
    }
  }

  const char* codes_at(int64_t n) const {
    return static_cast<const char*>(weight_.w.codes) + n * row_bytes(weight_.format, K_);
  }

  // Register i holds bytes 4 i .. 4 i + 4 of the line at codes + offset[l] of each row l, zeros behind `count` of them.
  static QL_MEMBER void transpose_line(const char* codes, const int64_t (&offset)[kLanes], int64_t count,
                                       __m512i* out) {
    Ints<Floats> square[kLanes];
    if (count == 64) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) square[l] = load<Ints<Floats>>(codes + offset[l]);
    } else {
      const __mmask64 is_code = (uint64_t(1) << count) - 1;
      for (int l = 0; l < kLanes; ++l) square[l] = Ints<Floats>(_mm512_maskz_loadu_epi8(is_code, codes + offset[l]));
    }
    transpose(square);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) out[l] = __m512i(square[l]);
  }

  // y = activation(sums * scale + bias) for columns n0 .. n1
  void finish(int64_t n0, int64_t n1, const float* sums) const {
    alignas(64) float scale[kColumnPiece] = {}, bias[kColumnPiece] = {}, y[kColumnPiece];
    for (int64_t n = n0; n < n1; ++n) {
      if (!scales_parts_) scale[n - n0] = weight_.scale(n, 0);
      if (p_.epilogue.bias) bias[n - n0] = p_.epilogue.bias[n];
    }
    for (int64_t r = 0; r < count_; ++r) {
      const int64_t c = r / height_, rows = rows_of(c);
      const float* from = sums + c * kColumnRows * kColumnPiece + r % height_ * kLanes;
      for (int64_t n = 0; n < n1 - n0; n += kLanes, from += kColumnRows * kLanes) {
        Floats sum = load<Floats>(from);
        if (parts_ == 2) sum = add(sum, load<Floats>(from + rows * kLanes));
        if (!scales_parts_) sum = mul(sum, load<Floats>(scale + n));
        sum = add(sum, Floats{});  // a product that underflows may be -0, a sum from +0 never is
        if (p_.epilogue.bias) sum = add(sum, load<Floats>(bias + n));
        store(y + n, activate(sum, p_.epilogue.activation));
      }
      const int64_t m = x_.list ? x_.list[m0_ + r] : m0_ + r;
      encode_(y, nullptr, nullptr, kAsIs, static_cast<char*>(p_.y) + byte_offset(y_row_, N_, m, n0), n1 - n0);
    }
  }
};

}  // namespace QL_ISA
}  // namespace quantlib
#endif
