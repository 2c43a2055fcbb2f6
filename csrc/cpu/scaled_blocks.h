// scaled_matmul in blocks: MC rows of x, packed once a call, by NC rows of w, KC columns at a time; within a block the
// micro-kernels of micro_kernel.h multiply NR rows of w by one to four panels of x.
//
// What is multiplied is x' = x_codes - x_moved and w' = codes + w_moved, in the bytes that an instruction takes. With
// the zero points moved along, x_z' = x_z - x_moved and z' = z + w_moved, and n columns in a block of the weight,
//   d = sum of (x - x_z) * (w - z) = sum of x' * w'  -  x_z' * sum of w'  -  z' * (sum of x' - n * x_z')
// modulo 2^32, which is d itself, as it fits.
#pragma once
#include "../activation.h"
#include "../ops/scaled_matmul.h"
#include "matmul.h"
#include "micro_kernel.h"

namespace quantlib {
namespace QL_ISA {
namespace {

// The instructions that multiply: of two int16, of signed bytes by codes of at most four bits, by unsigned bytes or by
// signed bytes that become unsigned where they are loaded, of tiles of bytes
enum class Engine : uint8_t { pairs, nibbles, bytes, signed_bytes, tiles };

struct Blocking {
  Engine unit;
  int64_t MC, NC, KC, NR;
  int64_t code_bytes;  // that a code takes
  int64_t depth;       // codes to a multiple of which every block of columns is padded with zeros

  int64_t padded(int64_t codes) const { return round_up(codes, depth) * code_bytes; }
};

Blocking blocking_of([[maybe_unused]] Type w_format) {
#ifdef QL_AMX
  if (has_amx()) return {Engine::tiles, 256, 128, 4096, 32, 1, 64};
#endif
#ifdef QL_SIGNED_BYTES
  if (w_format == Type::int8) return {Engine::signed_bytes, 256, 8 * kSums, 4096, kSums, 1, 4};
#endif
#ifdef QL_BYTES
#ifndef __AVX512VNNI__
  if (has_avx_vnni())
#endif
    return {Engine::bytes, 256, 4 * kSums, kLanes == 16 ? 4096 : 1024, kSums, 1, 4};
#endif
#ifdef QL_NIBBLE_BYTES
  if (row_of(w_format).bits <= 4) return {Engine::nibbles, 256, 4 * kSums, 1024, 4 * kSums, 1, 4};
#endif
  return {Engine::pairs, 256, 4 * kSums, 512, kSums, 2, 2};
}

// ---- w --------------------------------------------------------------------------------------------------------------

// The number that is added to codes of F so that no byte is negative.
template <class F>
constexpr int lift = F::is_signed ? 1 << (F::bits - 1) : 0;

// True if the codes of F are multiplied as they lie.
template <class F>
constexpr bool lies_ready(Engine unit) {
  return is_whole<F> && (F::is_signed ? unit == Engine::tiles || unit == Engine::signed_bytes : unit == Engine::bytes);
}

typedef uint16_t __attribute__((may_alias, aligned(1))) TwoBytes;

// out[k] = code k0 + k of a row, moved into an unsigned byte or less its excess in a signed one
template <class F>
void unpack_bytes(bool is_unsigned, const uint8_t* __restrict__ row, int64_t k0, int64_t n, char* __restrict__ out) {
  int64_t k = 0;
  if constexpr (is_whole<F>) {
    const uint8_t flip = F::is_signed == is_unsigned ? 128 : 0;
    for (; k < n; ++k) out[k] = char(row[k0 + k] ^ flip);
  } else if constexpr (F::per_byte == 2 && F::is_signed) {  // both nibbles of a byte at once
    const uint8_t* from = row + k0 / 2;
    auto* to = reinterpret_cast<TwoBytes*>(out);
    const int64_t bytes = k0 % 2 == 0 ? n / 2 : 0;
    if (is_unsigned) {
      for (int64_t j = 0; j < bytes; ++j) to[j] = uint16_t(((from[j] | from[j] << 4) & 0x0f0f) ^ 0x0808);
    } else {
      for (int64_t j = 0; j < bytes; ++j) {
        const auto nibbles = uint16_t((from[j] | from[j] << 4) & 0x0f0f);
        to[j] = uint16_t(nibbles | (nibbles & 0x0808) * 30);  // the sign spread
      }
    }
    k = 2 * bytes;
  }
  for (; k < n; ++k) {
    const int32_t code = unpack<F>(row[(k0 + k) / F::per_byte], int((k0 + k) % F::per_byte));
    out[k] = char(code + (is_unsigned ? lift<F> : -excess<F>));
  }
}

// The factors of codes k0 .. k0 + n of a row; z counts where pairs are
template <class F>
void unpack_row(Engine unit, const uint8_t* row, int64_t k0, int64_t n, int32_t z, char* out) {
  const bool is_unsigned = unit == Engine::bytes || unit == Engine::nibbles;
  if (unit != Engine::pairs) return unpack_bytes<F>(is_unsigned, row, k0, n, out);
  auto* __restrict__ to = reinterpret_cast<int16_t*>(out);
  if constexpr (is_whole<F>) {
    const uint8_t* __restrict__ codes = row + k0;
    for (int64_t k = 0; k < n; ++k) to[k] = int16_t((F::is_signed ? int8_t(codes[k]) : codes[k]) - z);
    return;
  }
  constexpr int64_t part = 256;
  char bytes[part];
  const auto moved = int16_t(excess<F> - z);
  for (int64_t k = 0; k < n; k += part) {
    const int64_t count = least(part, n - k);
    unpack_bytes<F>(false, row, k0 + k, count, bytes);
    for (int64_t j = 0; j < count; ++j) to[k + j] = int16_t(int8_t(bytes[j]) + moved);
  }
}

struct WeightCodes {
  void (*unpack)(Engine, const uint8_t*, int64_t, int64_t, int32_t, char*);
  bool ready;
  uint32_t moved = 0;  // w' - codes

  WeightCodes(Type format, Engine unit) {
    visit(format, [&](auto f) {
      using F = decltype(f);
      if constexpr (!F::is_float) {
        unpack = unpack_row<F>, ready = lies_ready<F>(unit);
        moved = unit == Engine::pairs ? 0 : uint32_t(unit == Engine::tiles ? -excess<F> : lift<F>);
      }
    });
  }
};

// The sum of w' of `count` codes, behind which zeros lie up to n bytes, a multiple of four
uint32_t sum_of_bytes(Engine unit, const char* w, int64_t count, int64_t n) {
  uint32_t sum = unit == Engine::signed_bytes ? uint32_t(128 * count) : 0;
  int64_t k = 0;
#ifdef QL_BYTES
  Int32s sums = {};
  const Int32s ones = splat<Int32s>(0x01010101);
  for (; unit != Engine::nibbles && k + 4 * kLanes <= n; k += 4 * kLanes) {  // where the processor has VNNI
    const auto bytes = load<Int32s>(w + k);
    sums = unit == Engine::bytes ? Bytes::dot(sums, ones, bytes) : Bytes::dot(sums, bytes, ones);
  }
  for (int l = 0; l < kLanes; ++l) sum += uint32_t(sums[l]);
#endif
  for (; k < n; ++k) sum += unit == Engine::bytes ? uint32_t(uint8_t(w[k])) : uint32_t(int8_t(w[k]));
  return sum;
}

// ---- x --------------------------------------------------------------------------------------------------------------

// Rows m0 .. m0 + M of x in panels of kLanes, and what belongs to each.
class PackedX {
 public:
  const int64_t M, padded, row_bytes;  // of a row of a panel
  const uint32_t moved;                // x_codes - x'
  const bool sums_w, sums_x;           // whether the sums of w', or of x', count
  // Whether all rows of w have the zero point w_moved in all of their blocks: sums of x' are kept multiplied by it.
  const bool one_zero_point;

  PackedX(const ScaledMatmul& p, const Blocking& b, uint32_t w_moved, int64_t m0, int64_t M, ParallelFor run)
      : M(M),
        padded(round_up(M, kLanes)),
        row_bytes((p.weight.grid.scale_cols() - 1) * b.padded(p.weight.grid.bk) +
                  b.padded(p.weight.grid.K - (p.weight.grid.scale_cols() - 1) * p.weight.grid.bk)),
        moved(b.unit != Engine::pairs && b.unit != Engine::tiles && !row_of(p.x_format).is_signed ? 128 : 0),
        sums_w(b.unit != Engine::pairs && (p.x_zero_point || moved)),
        sums_x(b.unit != Engine::pairs && (p.weight.zero_point || w_moved)),
        one_zero_point(b.unit != Engine::tiles && p.weight.grid.scale_cols() > 1 && sums_x && !sums_w &&
                       !p.weight.zero_point),
        p_(p),
        b_(b),
        w_moved_(w_moved),
        m0_(m0),
        codes_(padded * row_bytes + 64),
        scales_(padded * 4),
        zero_points_(padded * 4),
        sums_(sums_x ? padded * p.weight.grid.scale_cols() * 4 : 0) {
    parallel(run, padded / kLanes, most(1, kGrain / most(1, kLanes * row_bytes)), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack(panel);
    });
  }

  PanelsOfX panels(int64_t m, int64_t offset) const {
    return {static_cast<const char*>(codes_.data()) + m * row_bytes + offset * kLanes, kLanes * row_bytes};
  }
  const float* scale() const { return static_cast<const float*>(scales_.data()); }
  const uint32_t* zero_point() const { return static_cast<const uint32_t*>(zero_points_.data()); }
  // sum of x' - n * x_z' of block J; times w_moved where one_zero_point
  uint32_t* sums(int64_t J) const { return static_cast<uint32_t*>(sums_.data()) + J * padded; }

 private:
  static constexpr int64_t kPart = 1024;  // bytes of a row that are packed at a time
  const ScaledMatmul& p_;
  const Blocking& b_;
  const uint32_t w_moved_;
  const int64_t m0_;
  const Scratch codes_, scales_, zero_points_, sums_;

  void pack(int64_t panel) const {
    const Grid& g = p_.weight.grid;
    const Row format = row_of(p_.x_format);
    const int64_t first = panel * kLanes;
    int32_t z[kLanes] = {};
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t m = least(first + l, M - 1), at = p_.x_per_row ? m0_ + m : 0;
      if (p_.x_zero_point) z[l] = clamp_zero_point(p_.x_zero_point[at], format);
      static_cast<float*>(scales_.data())[first + l] = effective_scale(p_.x_scale[at], float_of(format.scale_max));
      static_cast<uint32_t*>(zero_points_.data())[first + l] = uint32_t(z[l]) - moved;
    }
    alignas(64) char rows[kLanes][kPart];
    char* out = static_cast<char*>(codes_.data()) + first * row_bytes;
    const int64_t part = kPart / b_.code_bytes;
    for (int64_t J = 0, blocks = g.scale_cols(); J < blocks; ++J) {
      const int64_t k0 = J * g.bk, n = least(g.bk, g.K - k0);
      uint32_t sum[kLanes] = {};
      for (int64_t k = 0; k < n; k += part) {
        const int64_t count = least(part, n - k), bytes = b_.padded(count);
        for (int64_t l = 0; l < kLanes; ++l)
          copy(least(first + l, M - 1), k0 + k, count, bytes, z[l], format.is_signed, rows[l], sum[l]);
        for (int64_t at = 0; at < bytes; at += 4 * kLanes) {
          Bits<Floats> v[kLanes];
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) v[l] = load<Bits<Floats>>(rows[l] + at);
          transpose(v);
          const int64_t units = least(kLanes, (bytes - at) / 4);
          for (int64_t u = 0; u < units; ++u) store(out + 4 * kLanes * u, v[u]);
          out += 4 * kLanes * units;
        }
      }
      for (int64_t l = 0; sums_x && l < kLanes; ++l)
        sums(J)[first + l] = (sum[l] - uint32_t(n) * (uint32_t(z[l]) - moved)) * (one_zero_point ? w_moved_ : 1);
    }
  }

  // x' of columns k .. k + count of row m, zeros behind it
  void copy(int64_t m, int64_t k, int64_t count, int64_t bytes, int32_t z, bool is_signed, char* __restrict__ to,
            uint32_t& sum) const {
    const auto* from = static_cast<const uint8_t*>(p_.x_codes) + (m0_ + m) * p_.weight.grid.K + k;
    if (b_.unit == Engine::pairs) {
      auto* wide = reinterpret_cast<int16_t*>(to);
      if (is_signed)
        for (int64_t j = 0; j < count; ++j) wide[j] = int16_t(int8_t(from[j]) - z);
      else
        for (int64_t j = 0; j < count; ++j) wide[j] = int16_t(from[j] - z);
    } else {
      const auto flip = uint8_t(moved);
      for (int64_t j = 0; j < count; ++j) to[j] = char(from[j] ^ flip);
    }
    __builtin_memset(to + count * b_.code_bytes, 0, size_t(bytes - count * b_.code_bytes));
    if (!sums_x) return;
    uint32_t more = 0;
    if (is_signed || moved)
      for (int64_t j = 0; j < count; ++j) more += uint32_t(int32_t(int8_t(to[j])));
    else
      for (int64_t j = 0; j < count; ++j) more += uint8_t(to[j]);
    sum += more;
  }
};

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// ---- a block --------------------------------------------------------------------------------------------------------

// Blocks of NC rows of w by MC rows of x, one after the other, with the memory that they take.
class BlockOfSums {
 public:
  BlockOfSums(const ScaledMatmul& p, const Blocking& b, const WeightCodes& codes, const PackedX& x, int64_t m_first)
      : p_(p),
        b_(b),
        codes_(codes),
        x_(x),
        m_first_(m_first),
        blocks_(g_.scale_cols()),
        span_blocks_(blocks_ == 1 ? 1 : most(1, least(b.KC / g_.bk, blocks_))),
        span_(blocks_ == 1 ? b.KC : span_blocks_ * g_.bk),
        w_stride_((blocks_ == 1 ? b.padded(least(b.KC, g_.K)) : span_blocks_ * b.padded(g_.bk)) + 64),
        rows_of_d_(least(b.MC, x.padded)),
        w_(b.NR * w_stride_ + 64),
        d_((blocks_ == 1 ? b.NC * rows_of_d_ : 2 * kPanels * b.NR * kLanes) * 4),
        total_(blocks_ == 1 ? 0 : b.NC * rows_of_d_ * 4),
        scale_(b.NC * span_blocks_ * 4),
        zero_point_(b.NC * span_blocks_ * 4),
        w_sum_(b.NC * span_blocks_ * 4) {}

  // Rows m0 .. m0 + MC of x, which are of its panels, with rows n0 .. n1 of w, NC at most
  void operator()(int64_t m0, int64_t n0, int64_t n1) {
    m0_ = m0, rows_ = least(b_.MC, x_.padded - m0);
    if (blocks_ > 1) __builtin_memset(total_.data(), 0, size_t(b_.NC * rows_ * 4));
    for (int64_t k0 = 0; k0 < g_.K; k0 += span_)
      for (int64_t n = n0; n < n1; n += b_.NR) {
        const RowsOfW w = take(n, n - n0, n1, k0);
        const Ahead ahead = after(n, n0, n1, k0);
        if (blocks_ == 1) multiply_span(w, n - n0, k0, ahead);
        else multiply_blocks(w, n - n0, k0, ahead);
      }
    finish(n0, n1);
  }

 private:
  const ScaledMatmul& p_;
  const Blocking& b_;
  const WeightCodes& codes_;
  const PackedX& x_;
  const int64_t m_first_;  // of the rows that are packed
  const Grid& g_ = p_.weight.grid;
  const Row format_ = row_of(p_.weight.format), y_format_ = row_of(p_.y_type);
  const Encode encode_ = encoder(p_.y_type, false, false);
  const int64_t blocks_, span_blocks_, span_;  // of a row of w, of them at a time, and columns at a time
  const int64_t w_stride_, rows_of_d_;
  const Scratch w_, d_, total_, scale_, zero_point_, w_sum_;
  const bool is_signed_ = row_of(p_.x_format).is_signed;
  int64_t m0_, rows_;

  // Row r of w and the panel of x whose first row is m
  int64_t at(int64_t r, int64_t m) const { return m * b_.NC + r * kLanes; }
  uint32_t* d(int64_t r, int64_t m) const { return static_cast<uint32_t*>(d_.data()) + at(r, m); }
  // Sums of a block of w with a group of panels, beside those of the block before it, if a row of w has several
  uint32_t* part(int64_t i) const { return static_cast<uint32_t*>(d_.data()) + i % 2 * kPanels * b_.NR * kLanes; }
  float* total(int64_t r, int64_t m) const { return static_cast<float*>(total_.data()) + at(r, m); }
  float* scale(int64_t r) const { return static_cast<float*>(scale_.data()) + r * span_blocks_; }
  uint32_t* zero_point(int64_t r) const { return static_cast<uint32_t*>(zero_point_.data()) + r * span_blocks_; }
  uint32_t* w_sum(int64_t r) const { return static_cast<uint32_t*>(w_sum_.data()) + r * span_blocks_; }

  // Rows n .. n + NR of w, columns k0 .. k0 + span: where they lie, or unpacked. r0 is n within the block.
  RowsOfW take(int64_t n, int64_t r0, int64_t n1, int64_t k0) {
    const int64_t columns = least(span_, g_.K - k0), count = least(b_.NR, n1 - n), J0 = k0 / g_.bk;
    const int64_t parts = blocks_ == 1 ? 1 : (columns + g_.bk - 1) / g_.bk;
    const bool whole = columns % b_.depth == 0 && (blocks_ == 1 || g_.bk % b_.depth == 0);  // no zeros between blocks
    // So many rows that lie 4096 bytes apart do not stay in the first-level cache together.
    const bool apart = b_.unit != Engine::signed_bytes || rows_ > kLanes || g_.K % 4096 != 0;
    const bool in_place = codes_.ready && whole && count == b_.NR && apart;
    const auto* codes = static_cast<const uint8_t*>(p_.weight.codes);
    RowsOfW w = {static_cast<const char*>(w_.data()), w_stride_};
    if (in_place) w = {reinterpret_cast<const char*>(codes) + n * g_.K + k0, g_.K};
    const bool known = in_place && blocks_ == 1 && k0 > 0 && !x_.sums_w;
    for (int64_t r = 0; r < count && !known; ++r) {
      const int64_t at = (g_.br == 1 ? n + r : (n + r) / g_.br) * blocks_ + J0;
      const float* s = p_.weight.scale + at;
      const int32_t* z = p_.weight.zero_point ? p_.weight.zero_point + at : nullptr;
      for (int64_t i = 0; i < parts; ++i) scale(r0 + r)[i] = effective_scale(s[i], float_of(format_.scale_max));
      for (int64_t i = 0; i < parts && !x_.one_zero_point; ++i)
        zero_point(r0 + r)[i] = uint32_t(z ? clamp_zero_point(z[i], format_) : 0) + codes_.moved;
      if (!in_place) {
        char* to = static_cast<char*>(w_.data()) + r * w_stride_;
        unpack(codes + byte_offset(format_, g_.K, n + r, 0), k0, columns, whole && !z, zero_point(r0 + r), to);
      }
      for (int64_t i = 0, k = 0; x_.sums_w && i < parts; ++i, k += g_.bk) {
        const int64_t length = blocks_ == 1 ? columns : least(g_.bk, columns - k);
        const uint32_t before = blocks_ == 1 && k0 ? w_sum(r0 + r)[i] : 0;
        const char* from = w.data + r * w.stride + i * b_.padded(g_.bk);
        w_sum(r0 + r)[i] = before + sum_of_bytes(b_.unit, from, length, b_.padded(length));
      }
    }
    return w;
  }

  // Columns k0 .. k0 + columns of a row as they are multiplied: at once, or block by block with zeros behind each
  void unpack(const uint8_t* row, int64_t k0, int64_t columns, bool at_once, const uint32_t* zero_point,
              char* to) const {
    if (at_once) return codes_.unpack(b_.unit, row, k0, columns, 0, to);
    for (int64_t k = 0, i = 0; k < columns; ++i) {
      const int64_t length = blocks_ == 1 ? columns : least(g_.bk, columns - k);
      char* out = to + i * b_.padded(g_.bk);
      codes_.unpack(b_.unit, row, k0 + k, length, int32_t(zero_point[i]), out);
      __builtin_memset(out + length * b_.code_bytes, 0, size_t(b_.padded(length) - length * b_.code_bytes));
      k += length;
    }
  }

  // What is taken after rows n of w and columns k0, and y where this span is the last
  Ahead after(int64_t n, int64_t n0, int64_t n1, int64_t k0) const {
    Ahead ahead = {};
    int64_t next = n + b_.NR, k = k0;
    if (next >= n1) k = k0 + span_ < g_.K ? k0 + span_ : 0, next = k ? n0 : n1;
    if (next < g_.M) {
      ahead.w = static_cast<const char*>(p_.weight.codes) + byte_offset(format_, g_.K, next, k - k % format_.per_byte);
      ahead.by_rows = b_.unit == Engine::signed_bytes;
      ahead.w_stride = row_bytes(format_, g_.K), ahead.w_rows = least(b_.NR, g_.M - next);
    }
    if (b_.unit == Engine::tiles && k0 + span_ >= g_.K) {
      ahead.y = static_cast<const char*>(p_.y) + byte_offset(y_format_, g_.M, m_first_ + m0_, n);
      ahead.y_stride = row_bytes(y_format_, g_.M), ahead.y_rows = least(rows_, x_.M - m0_);
      ahead.y_bytes = row_bytes(y_format_, least(b_.NR, n1 - n));
    }
    return ahead;
  }

  // Calls body(m, panels) for all panels of x in groups of about the same size.
  template <class Body>
  void groups(const Body& body) const {
    const int64_t most_panels = b_.unit == Engine::tiles ? 2 : kPanels;
    int64_t left = rows_ / kLanes, groups = (left + most_panels - 1) / most_panels;
    for (int64_t m = 0; left; --groups) {
      const int64_t panels = (left + groups - 1) / groups;
      body(m, panels);
      m += panels * kLanes, left -= panels;
    }
  }

  // The same in pairs where their totals stay in registers, and three where one would be left alone
  template <class Body>
  void pairs(const Body& body) const {
    if (!kKeepTotals) return groups(body);
    for (int64_t m = 0, left = rows_ / kLanes; left;) {
      const int64_t panels = left == 3 ? 3 : least(2, left);
      body(m, panels);
      m += panels * kLanes, left -= panels;
    }
  }

#ifdef QL_AMX
  void multiply_by_tiles(int64_t panels, RowsOfW w, PanelsOfX x, int64_t bytes, const Ahead& ahead, Sums to) const {
    if (panels == 2) (is_signed_ ? multiply_tiles<2, true> : multiply_tiles<2, false>)(w, x, bytes, ahead, to);
    else (is_signed_ ? multiply_tiles<1, true> : multiply_tiles<1, false>)(w, x, bytes, ahead, to);
  }
#endif

  template <class To>
  void multiply(int64_t panels, RowsOfW w, PanelsOfX x, int64_t bytes, const Ahead& ahead, const To& to) const {
#ifdef QL_SIGNED_BYTES
    if (b_.unit == Engine::signed_bytes) return multiply_registers<SignedBytes>(panels, b_.NR, w, x, bytes, ahead, to);
#endif
#ifdef QL_BYTES
    if (b_.unit == Engine::bytes) return multiply_registers<Bytes>(panels, b_.NR, w, x, bytes, ahead, to);
#endif
#ifdef QL_NIBBLE_BYTES
    if (b_.unit == Engine::nibbles) return multiply_registers<Nibbles>(panels, b_.NR, w, x, bytes, ahead, to);
#endif
    multiply_registers<Pairs>(panels, b_.NR, w, x, bytes, ahead, to);
  }

  template <class To>
  void multiply_scaled(int64_t panels, RowsOfW w, PanelsOfX x, const BlocksOfW& blocks, CodesAhead& ahead,
                       const To& to) const {
#ifdef QL_SIGNED_BYTES
    if (b_.unit == Engine::signed_bytes)
      return quantlib::QL_ISA::multiply_blocks<SignedBytes>(panels, b_.NR, w, x, blocks, ahead, to);
#endif
#ifdef QL_BYTES
    if (b_.unit == Engine::bytes)
      return quantlib::QL_ISA::multiply_blocks<Bytes>(panels, b_.NR, w, x, blocks, ahead, to);
#endif
#ifdef QL_NIBBLE_BYTES
    if (b_.unit == Engine::nibbles)
      return quantlib::QL_ISA::multiply_blocks<Nibbles>(panels, b_.NR, w, x, blocks, ahead, to);
#endif
    quantlib::QL_ISA::multiply_blocks<Pairs>(panels, b_.NR, w, x, blocks, ahead, to);
  }

  // The share of the group of panels at m, which multiplies the columns from k on
  Ahead share(Ahead all, int64_t m, int64_t panels, int64_t k, int64_t columns) const {
    const int64_t begin = all.w_rows * m / rows_, end = all.w_rows * (m + panels * kLanes) / rows_;
    all.w += begin * all.w_stride + (k >> format_.log_per_byte);
    all.w_rows = end - begin, all.w_lines = ((columns >> format_.log_per_byte) + 63) / 64;
    all.y += m * all.y_stride, all.y_rows = k ? 0 : least(panels * kLanes, all.y_rows - m);
    return all;
  }

  void multiply_span(const RowsOfW& w, int64_t r0, int64_t k0, const Ahead& ahead) const {
    const int64_t columns = least(span_, g_.K - k0);
    groups([&](int64_t m, int64_t panels) {
      const PanelsOfX x = x_.panels(m0_ + m, k0 * b_.code_bytes);
      const Ahead part = share(ahead, m, panels, 0, columns);
      const Sums to = {d(r0, m), b_.NC * kLanes, k0 > 0};
#ifdef QL_AMX
      if (b_.unit == Engine::tiles) return multiply_by_tiles(panels, w, x, b_.padded(columns), part, to);
#endif
      multiply(panels, w, x, b_.padded(columns), part, to);
    });
  }

  // The codes of `columns` columns that lie ahead, a part of them for every product of a block with a group of panels:
  // fetched within one, they would end loops that are as short as it at another place each time.
  CodesAhead in_parts(const Ahead& ahead, int64_t columns) const {
    const int64_t panels = rows_ / kLanes;
    const int64_t groups = kKeepTotals ? most(1, panels / 2) : (panels + kPanels - 1) / kPanels;
    const int64_t products = groups * ((columns - 1) / g_.bk + 1);
    const int64_t bytes = row_bytes(format_, columns), lines = ahead.w_rows * ((bytes + 63) / 64);
    return {ahead.w, ahead.w_stride, ahead.w_rows, bytes, (lines + products - 1) / products};
  }

  void multiply_blocks(const RowsOfW& w, int64_t r0, int64_t k0, const Ahead& ahead) const {
    const int64_t columns = least(span_, g_.K - k0), J0 = k0 / g_.bk, block = b_.padded(g_.bk);
#ifdef QL_AMX
    if (b_.unit == Engine::tiles) return multiply_blocks_by_tiles(w, r0, k0, ahead);
#endif
    const int64_t last = columns - (columns - 1) / g_.bk * g_.bk;
    const BlocksOfW parts = {(columns - last) / g_.bk * block + b_.padded(last), block};
    with_sums([&](auto sums_w, auto sums_x) {
      const auto by = [&](auto one) {
        CodesAhead codes = in_parts(ahead, columns);
        pairs([&](int64_t m, int64_t panels) {
          const ScaledSums<sums_w.value, sums_x.value, one.value> to = {total(r0, m),
                                                                        b_.NC * kLanes,
                                                                        span_blocks_,
                                                                        scale(r0),
                                                                        zero_point(r0),
                                                                        w_sum(r0),
                                                                        x_.zero_point() + m0_ + m,
                                                                        x_.sums(J0) + m0_ + m,
                                                                        x_.padded};
          multiply_scaled(panels, w, x_.panels(m0_ + m, J0 * block), parts, codes, to);
        });
      };
      if constexpr (sums_x.value && !sums_w.value)
        if (x_.one_zero_point) return by(Yes{});
      by(No{});
    });
  }

#ifdef QL_AMX
  // The sums of a block are added up while the next block is multiplied.
  void multiply_blocks_by_tiles(const RowsOfW& w, int64_t r0, int64_t k0, const Ahead& ahead) const {
    const int64_t columns = least(span_, g_.K - k0), J0 = k0 / g_.bk, block = b_.padded(g_.bk);
    groups([&](int64_t m, int64_t panels) {
      int64_t i = 0;
      for (int64_t k = 0; k < columns; k += g_.bk, ++i) {
        const int64_t length = least(g_.bk, columns - k);
        multiply_by_tiles(panels, {w.data + i * block, w.stride}, x_.panels(m0_ + m, (J0 + i) * block),
                          b_.padded(length), share(ahead, m, panels, k, length), {part(i), b_.NR * kLanes, false});
        if (i) add_block(r0, m, panels, J0, i - 1);
      }
      add_block(r0, m, panels, J0, i - 1);
    });
  }
#endif

  // d of a row of w and one panel of x, exact: what the registers summed, less what the zero points stand for
  template <bool SUMS_W, bool SUMS_X>
  static QL_MEMBER Floats exact(const uint32_t* d, uint32_t w_sum, uint32_t zero_point, Bits<Floats> x_zero_point,
                                Bits<Floats> x_sum) {
    auto sum = load<Bits<Floats>>(d);
    if constexpr (SUMS_W) sum -= w_sum * x_zero_point;
    if constexpr (SUMS_X) sum -= zero_point * x_sum;
    return Lanes<Floats>::of(same_bits<Ints<Floats>>(sum));
  }

  template <class Run>
  void with_sums(const Run& run) const {
    if (x_.sums_w && x_.sums_x) run(Yes{}, Yes{});
    else if (x_.sums_w) run(Yes{}, No{});
    else if (x_.sums_x) run(No{}, Yes{});
    else run(No{}, No{});
  }

#ifdef QL_AMX
  // total = or += fl(d * scale) of block i of the span, J0 + i of the row
  void add_block(int64_t r0, int64_t m0, int64_t panels, int64_t J0, int64_t i) const {
    const float* s = scale(r0) + i;
    const uint32_t *z = zero_point(r0) + i, *w = w_sum(r0) + i;
    const int64_t rows = b_.NR, step = span_blocks_;
    with_sums([&](auto sums_w, auto sums_x) {
      for (int64_t m = m0, v = 0; v < panels; m += kLanes, ++v) {
        const auto x_z = sums_w.value ? load<Bits<Floats>>(x_.zero_point() + m0_ + m) : Bits<Floats>{};
        const auto x_s = sums_x.value ? load<Bits<Floats>>(x_.sums(J0 + i) + m0_ + m) : Bits<Floats>{};
        const uint32_t* from = part(i) + v * rows * kLanes;
        float* to = total(r0, m);
        for (int64_t r = 0; r < rows; ++r, from += kLanes, to += kLanes) {
          const Floats f = exact<sums_w.value, sums_x.value>(from, w[r * step], z[r * step], x_z, x_s) * s[r * step];
          store(to, J0 + i ? add(load<Floats>(to), f) : add(Floats{}, f));
        }
      }
    });
  }
#endif

  // y = activation(total + bias), total = fl(fl(d * x_scale) * scale), or times x_scale where it is a sum of blocks
  void finish(int64_t n0, int64_t n1) const {
    with_sums([&](auto sums_w, auto sums_x) { finish_sums<sums_w.value, sums_x.value>(n0, n1); });
  }

  template <bool SUMS_W, bool SUMS_X>
  void finish_sums(int64_t n0, int64_t n1) const {
    constexpr int64_t kMost = 192;
    alignas(64) float y[kLanes][kMost], bias[kMost] = {};
    const int64_t cols = n1 - n0;
    const float* s = scale(0);
    const uint32_t *z = zero_point(0), *w = w_sum(0);
    for (int64_t c = 0; p_.epilogue.bias && c < cols; ++c) bias[c] = p_.epilogue.bias[n0 + c];
    for (int64_t m = 0; m < rows_; m += kLanes) {
      // The rows of y that are written next: those of all panels may lie in so few sets of a cache that they would push
      // each other out.
      for (int64_t r = m + kLanes; b_.unit != Engine::tiles && r < least(m + 2 * kLanes, x_.M - m0_); ++r) {
        const char* to = static_cast<const char*>(p_.y) + byte_offset(y_format_, g_.M, m_first_ + m0_ + r, n0);
        for (int64_t at = 0; at < row_bytes(y_format_, cols); at += 64) __builtin_prefetch(to + at, 1);
      }
      const Floats s_x = load<Floats>(x_.scale() + m0_ + m);
      const auto x_z = SUMS_W ? load<Bits<Floats>>(x_.zero_point() + m0_ + m) : Bits<Floats>{};
      const auto x_s = SUMS_X ? load<Bits<Floats>>(x_.sums(0) + m0_ + m) : Bits<Floats>{};
      for (int64_t c = 0; c < cols; c += kLanes) {
        Bits<Floats> v[kLanes];
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) {
          const int64_t r = c + l;
          if (blocks_ == 1)
            v[l] = bits_of(mul(mul(exact<SUMS_W, SUMS_X>(d(r, m), w[r], z[r], x_z, x_s), s_x), splat<Floats>(s[r])));
          else v[l] = bits_of(mul(load<Floats>(total(r, m)), s_x));
        }
        transpose(v);
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) store(y[l] + c, v[l]);
      }
      for (int64_t r = 0; r < least(kLanes, x_.M - m0_ - m); ++r) {
        for (int64_t c = 0; c < cols; c += kLanes) {
          Floats v = load<Floats>(y[r] + c);
          if (p_.epilogue.bias) v = add(v, load<Floats>(bias + c));
          store(y[r] + c, activate(v, p_.epilogue.activation));
        }
        encode_(y[r], nullptr, nullptr, kAsIs,
                static_cast<char*>(p_.y) + byte_offset(y_format_, g_.M, m_first_ + m0_ + m + r, n0), cols);
      }
    }
  }
};

// True if blocks are worth packing x for them. A panel of x is multiplied whole, however few rows it has: few rows with
// codes that need no unpacking and no sums of blocks are dot products of rows as they lie, in dot.h.
bool in_blocks(const ScaledMatmul& p) {
  const Grid& g = p.weight.grid;
  if (g.bk < 16) return false;
  const bool packed = row_of(p.weight.format).per_byte > 1 || g.scale_cols() > 1;
  const bool faster = has_amx() || has_avx_vnni();  // than the instructions of dot.h
  return packed || p.M >= (faster ? 4 : kLanes);
}

void multiply_in_blocks(const ScaledMatmul& p, ParallelFor run) {
  const Grid& g = p.weight.grid;
  Blocking b = blocking_of(p.weight.format);
  const WeightCodes codes(p.weight.format, b.unit);
  const int64_t highest = b.MC;
  constexpr int64_t bytes = int64_t(16) << 20;  // of x that are packed at a time
  const int64_t chunk = round_up(bytes / (b.code_bytes * g.K) + 1, highest);
  for (int64_t m = 0; m < p.M; m += chunk) {
    const int64_t count = least(chunk, p.M - m), down = (count + highest - 1) / highest;
    // Of about the same size: threads have the same number of pieces.
    b.MC = round_up((count + down - 1) / down, b.unit == Engine::tiles ? 2 * kLanes : kLanes);
    const PackedX x(p, b, codes.moved, m, count, run);
    // A piece is NR rows of w; a thread takes NC rows of those it has at a time.
    const int64_t across = (g.M + b.NR - 1) / b.NR;
    const int64_t products = least(b.MC, x.M) * b.NR * g.K;
    parallel(run, across * down, most(1, 8 * kGrain / products), [&](int64_t begin, int64_t end) {
      BlockOfSums block(p, b, codes, x, m);
      const auto pieces = [&] {
        for (int64_t piece = begin, count; piece < end; piece += count) {
          const int64_t n = piece % across;
          count = least(least(b.NC / b.NR, across - n), end - piece);
          block(piece / across * b.MC, n * b.NR, least((n + count) * b.NR, g.M));
        }
      };
#ifdef QL_AMX
      if (b.unit == Engine::tiles) {
        const Tiles tiles;
        return pieces();
      }
#endif
      pieces();
    });
  }
}

}  // namespace
}  // namespace QL_ISA
}  // namespace quantlib
