// y[m, n] = epilogue(sum over k of (x_codes[m, k] - x_zero_point[m]) * x_scale[m] * w[n, k]), the integer sum exact
//
// By one of four ways: scaled_nibbles.h, scaled_dots.h, scaled_blocks.h, or, in this file, few rows of x and a weight
// of bytes, as they lie. There x is x_codes - 128 where no signed byte holds those, and w likewise, plus what dot.h
// adds to it, and the zero points x_z and z move along:
//   d = sum of (x - x_z) * (w - z) = sum of x * w  -  x_z * sum of w  -  z * (sum of x  -  K * x_z)
// modulo 2^32, which is d itself, as it fits. Where a row of w has several scales, each of its blocks has such a d.
#include "../ops/scaled_matmul.h"
#include "../activation.h"
#include "dot.h"
#include "matmul.h"
#include "matmul_choice.h"
#include "scaled_blocks.h"
#include "scaled_dots.h"
#include "scaled_nibbles.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kSumCols = 64;         // rows of w whose sums with kXRows rows of x are kept together
constexpr int64_t kSumDepth = 4096;      // codes of a row that are decoded at a time, at most
constexpr int64_t kFetchAhead = 8192;    // bytes of w before the one that is multiplied
constexpr int64_t kFlipGrain = 1 << 20;  // bytes to copy that a thread is worth waking for

// out[k] = in[k] ^ flip
void flip_bytes(const uint8_t* __restrict__ in, uint8_t flip, uint8_t* __restrict__ out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = in[k] ^ flip;
}

// out[k] = code k less its excess, for at least n of them
template <class F>
void to_signed_bytes(const uint8_t* __restrict__ codes, int8_t* __restrict__ out, int64_t n) {
  if constexpr (is_whole<F>) {
    flip_bytes(codes, uint8_t(excess<F>), reinterpret_cast<uint8_t*>(out), n);
  } else {
    for (int64_t j = 0; j < bytes_of<F>(n); ++j)
      for (int i = 0; i < F::per_byte; ++i) out[F::per_byte * j + i] = int8_t(unpack<F>(codes[j], i));
  }
}

// True if codes of F are signed bytes as they lie.
template <class F>
constexpr bool in_place = is_whole<F> && F::is_signed;

uint32_t sum_of(const int8_t* x, int64_t n) {
  uint32_t sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += uint32_t(int32_t(x[k]));
  return sum;
}

// x, and before every kXRows rows of it, where the sums of w count, a row of ones, whose products with w they are.
class SignedRows {
 public:
  const int64_t M, K, blocks, stride;
  const uint32_t moved;  // x - x_codes
  const int64_t ones;    // rows of ones before those of x: 1 or 0

  // is_moved: w is not the codes of the weight, but less something
  SignedRows(const ScaledMatmul& p, bool is_moved, ParallelFor run)
      : M(p.M),
        K(p.weight.grid.K),
        blocks(p.weight.grid.scale_cols()),
        stride(stride_of(K)),
        moved(row_of(p.x_format).is_signed ? 0u : -128u),
        ones(p.x_zero_point || moved),
        summed_(p.weight.zero_point || is_moved),
        bytes_((M + round_up(M, kXRows) / kXRows) * stride + 64),
        sums_(summed_ ? M * blocks * 4 : 0) {
    parallel(run, M, most(1, kFlipGrain / most(K, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        int8_t* x = row(m);
        if (ones && m % kXRows == 0) __builtin_memset(x - stride, 1, size_t(K));
        flip_bytes(static_cast<const uint8_t*>(p.x_codes) + m * K, uint8_t(moved), reinterpret_cast<uint8_t*>(x), K);
        const int64_t bk = p.weight.grid.bk;
        for (int64_t J = 0; summed_ && J < blocks; ++J) sum(m, J) = sum_of(x + J * bk, least(bk, K - J * bk));
      }
    });
  }

  int8_t* row(int64_t m) const { return static_cast<int8_t*>(bytes_.data()) + (m / kXRows + 1 + m) * stride; }
  // The sum of block J of row m, where z is not always 0.
  bool summed() const { return summed_; }
  uint32_t& sum(int64_t m, int64_t J) const { return static_cast<uint32_t*>(sums_.data())[m * blocks + J]; }

 private:
  const bool summed_;
  const Scratch bytes_, sums_;

  // At least K, and such that the rows of a tile lie in different sets of the first-level cache.
  static int64_t stride_of(int64_t K) {
    const int64_t lines = round_up(K, 64) / 64;
    return (lines + (75 - lines % 64) % 64) * 64;
  }
};

// The sums of kXRows rows of x with kSumCols rows of w, and what becomes of them.
template <class F>
class ExactSums {
 public:
  ExactSums(const ScaledMatmul& p, const SignedRows& x) : p_(p), x_(x) {
    __builtin_memset(d_, 0, kSumCols * sizeof d_[0]);  // what is there where no sums of w count
  }

  void operator()(int64_t m0, int64_t n0) {
    m0_ = m0, n0_ = n0, rows_ = least(kXRows, x_.M - m0), cols_ = least(kSumCols, g_.M - n0);
    if (x_.blocks != 1) __builtin_memset(total_, 0, sizeof total_);
    for (int64_t J = 0; J < x_.blocks; ++J) {
      const int64_t k0 = J * g_.bk, n = least(g_.bk, g_.K - k0);
      multiply(k0, n);
      scale_block(J, n);
    }
    finish();
  }

 private:
  const ScaledMatmul& p_;
  const SignedRows& x_;
  const Grid& g_ = p_.weight.grid;
  const Row format_ = row_of(p_.weight.format), x_format_ = row_of(p_.x_format), y_format_ = row_of(p_.y_type);
  const Encode encode_ = encoder(p_.y_type, false, false);
  int64_t m0_, n0_, rows_, cols_;
  alignas(64) uint32_t d_[(1 + kXRows) * kSumCols];  // row 0: the sums of w
  alignas(64) float total_[kXRows * kSumCols];
  alignas(64) int8_t decoded_[kDotCols][kSumDepth + 64];

  // d = the sums over columns k0 .. k0 + n
  void multiply(int64_t k0, int64_t n) {
    const int64_t rows = x_.ones + rows_;
    const DotShape shape = dot_shape(rows, n, in_place<F> ? g_.M * g_.K : 0);
    const int64_t parts = round_up(n, shape.columns) / shape.columns, depth = round_up(n, 64 * parts) / parts;
    const int64_t tiles = round_up(rows, shape.rows) / shape.rows, ahead = most(shape.together, kFetchAhead / depth);
    for (int64_t k = 0; k < n; k += depth)
      for (int64_t c = 0; c < cols_; c += kDotCols) {
        DotPanel w = {};
        for (int64_t j = 0; j < kDotCols; ++j)
          w.row[j] = row_of_w(least(c + j, cols_ - 1), j, k0 + k, least(depth, n - k));
        // After the last row comes the next part of the first row, or the row after it.
        const int64_t next = k + depth < n ? depth - cols_ * g_.K : -k;
        for (int64_t j = 0; in_place<F> && j < kDotCols; ++j)
          w.ahead[j] = w.row[0] + (j + ahead) * g_.K + (c + j + ahead < cols_ ? 0 : next);
        multiply_panel(shape, tiles, w, x_.row(m0_) + k0 + k, least(depth, n - k), k > 0, d_ + c);
      }
  }

  // d = or += the sums of four rows of w with all rows of x, ones included
  void multiply_panel(const DotShape& shape, int64_t tiles, DotPanel& w, const int8_t* x, int64_t n, bool add,
                      uint32_t* d) const {
    const int64_t rows = x_.ones + rows_;
    const bool four = shape.together == kDotCols;
    for (int64_t t = 0, r = 0; t < tiles; ++t) {
      // Four rows of w together: full tiles, each of which fetches its share. Else tiles of about the same size, the
      // first of which fetches all.
      const int64_t count = tiles == 1 ? rows
                            : four     ? least(shape.rows, rows - r)
                                       : (rows - r + tiles - t - 1) / (tiles - t);
      w.begin = w.end;
      w.end = !in_place<F> ? 0 : tiles == 1 || !four ? kDotCols : kDotCols * (t + 1) / tiles;
      dot_tile_of(count, shape.together)(x + (r - x_.ones) * x_.stride, x_.stride, w, n, add,
                                         d + (1 - x_.ones + r) * kSumCols, kSumCols);
      r += count;
    }
  }

  // Row n0 + c of w, columns k .. k + n: where they lie, or decoded
  const int8_t* row_of_w(int64_t c, int64_t j, int64_t k, int64_t n) {
    const int64_t before = k % F::per_byte;  // so that whole bytes are decoded
    const auto* codes = static_cast<const uint8_t*>(p_.weight.codes) + byte_offset(format_, g_.K, n0_ + c, k - before);
    if constexpr (in_place<F>) return reinterpret_cast<const int8_t*>(codes);
    to_signed_bytes<F>(codes, decoded_[j], before + n);
    return decoded_[j] + before;
  }

  // total = fl(fl(d * x_scale) * scale), or total += fl(d * scale) of block J where there are several
  void scale_block(int64_t J, int64_t n) {
    using U = Bits<Floats>;
    alignas(64) float s[kSumCols] = {};
    alignas(64) uint32_t z[kSumCols] = {};
    for (int64_t c = 0; c < cols_; ++c) {
      const int64_t at = (n0_ + c) / g_.br * x_.blocks + J;
      s[c] = effective_scale(p_.weight.scale[at], float_of(format_.scale_max));
      if (p_.weight.zero_point) z[c] = uint32_t(clamp_zero_point(p_.weight.zero_point[at], format_));
      z[c] += uint32_t(kLift) - uint32_t(excess<F>);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const uint32_t x_z = x_zero_point(m0_ + r), x_sum = x_.summed() ? x_.sum(m0_ + r, J) - uint32_t(n) * x_z : 0;
      const Floats s_x = splat<Floats>(x_scale(m0_ + r));
      const uint32_t* d = d_ + (1 + r) * kSumCols;
      float* total = total_ + r * kSumCols;
      for (int64_t c = 0; c < kSumCols; c += kLanes) {
        const U exact = load<U>(d + c) - load<U>(d_ + c) * x_z - load<U>(z + c) * x_sum;
        const Floats f = Lanes<Floats>::of(same_bits<Ints<Floats>>(exact)), s_w = load<Floats>(s + c);
        store(total + c, x_.blocks == 1 ? mul(mul(f, s_x), s_w) : add(load<Floats>(total + c), mul(f, s_w)));
      }
    }
  }

  // y = activation(total + bias), total times x_scale first where that is still to come
  void finish() {
    alignas(64) float bias[kSumCols] = {};
    for (int64_t c = 0; p_.epilogue.bias && c < cols_; ++c) bias[c] = p_.epilogue.bias[n0_ + c];
    for (int64_t r = 0; r < rows_; ++r) {
      float* total = total_ + r * kSumCols;
      const Floats s_x = splat<Floats>(x_scale(m0_ + r));
      for (int64_t c = 0; c < kSumCols; c += kLanes) {
        Floats v = load<Floats>(total + c);
        if (x_.blocks != 1) v = mul(v, s_x);
        if (p_.epilogue.bias) v = add(v, load<Floats>(bias + c));
        store(total + c, activate(v, p_.epilogue.activation));
      }
      encode_(total, nullptr, nullptr, kAsIs, static_cast<char*>(p_.y) + byte_offset(y_format_, g_.M, m0_ + r, n0_),
              cols_);
    }
  }

  float x_scale(int64_t m) const {
    return effective_scale(p_.x_scale[p_.x_per_row ? m : 0], float_of(x_format_.scale_max));
  }
  uint32_t x_zero_point(int64_t m) const {
    const int32_t* z = p_.x_zero_point;
    return (z ? uint32_t(clamp_zero_point(z[p_.x_per_row ? m : 0], x_format_)) : 0) + x_.moved;
  }
};

enum class Way { nibbles, wide_dots, blocks, dots };

Way choose(const ScaledMatmul& p) {
  return in_nibbles(p) ? Way::nibbles : in_wide_dots(p) ? Way::wide_dots : in_blocks(p) ? Way::blocks : Way::dots;
}

}  // namespace

void scaled_matmul_choice(const ScaledMatmulChoice& c, ParallelFor) {
  const Weight weight = {c.grid, nullptr, c.format, nullptr, c.is_affine ? &kSomeZeroPoint : nullptr};
  const Way way = choose({c.M, nullptr, c.x_type, nullptr, nullptr, true, weight, {}, nullptr, Type::float32});
  const Engine unit = blocking_of(c.format).unit;
  *c.kernel = way == Way::nibbles     ? "nibbles: codes of four bits as they lie, times bytes"
              : way == Way::wide_dots ? "dots: bytes as they lie, times int16"
              : way == Way::dots      ? "dots: bytes as they lie"
              : unit == Engine::tiles ? "blocks: tiles of AMX, bytes"
              : unit == Engine::bytes || unit == Engine::signed_bytes ? "blocks: bytes, by VNNI"
              : unit == Engine::nibbles ? "blocks: bytes times codes of four bits, summed in int16"
                                        : "blocks: pairs of int16";
  *c.why = way == Way::nibbles  ? "int4 in groups of whole lines, x without zero points"
           : way == Way::blocks ? "rows enough, or codes to unpack, or several scales a row"
                                : "few rows of x, one scale a row";
}

void scaled_matmul(const ScaledMatmul& p, ParallelFor run) {
  const Way way = choose(p);
  if (way == Way::nibbles) return multiply_nibbles(p, run);
  if (way == Way::wide_dots) return multiply_wide_dots(p, run);
  if (way == Way::blocks) return multiply_in_blocks(p, run);
  const int64_t down = round_up(p.M, kXRows) / kXRows, across = round_up(p.weight.grid.M, kSumCols) / kSumCols;
  const int64_t products = least(p.M, kXRows) * kSumCols * most(p.weight.grid.K, 1);
  visit(p.weight.format, [&](auto f) {
    using F = decltype(f);
    if constexpr (!F::is_float) {
      const SignedRows x(p, excess<F> != 0 || kLift != 0, run);
      parallel(run, across * down, most(1, 8 * kGrain / products), [&](int64_t begin, int64_t end) {
        ExactSums<F> sums(p, x);
        for (int64_t piece = begin; piece < end; ++piece) sums(piece % down * kXRows, piece / down * kSumCols);
      });
    }
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
