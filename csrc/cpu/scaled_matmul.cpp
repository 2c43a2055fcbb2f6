// y[m, n] = epilogue(sum over k of (x_codes[m, k] - x_zero_point[m]) * x_scale[m] * w[n, k]), the integer sum exact
//
// The product of bytes wants x unsigned and w signed. So x is x_codes + 128 where those are signed, w is codes - 128
// where those are not, and the zero points x_z and z move along:
//   d = sum of (x - x_z) * (w - z) = sum of x * w  -  x_z * sum of w  -  z * (sum of x  -  K * x_z)
// modulo 2^32, which is d itself, as it fits. Where a row of w has several scales, each of its blocks has such a d.
#include "../activation.h"
#include "dot.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kCols = 64;     // rows of w whose sums are kept together
constexpr int64_t kRows = 128;    // rows of x
constexpr int64_t kDepth = 2560;  // codes of a row: four of w stay in the first-level cache while all of x pass

using Tile = void (*)(const uint8_t*, int64_t, const Panel&, int64_t, bool, int32_t*, int64_t);
#if defined(__AVX512F__)
constexpr Tile kTiles[kTileRows] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>, dot_tile<5>, dot_tile<6>};
#else
constexpr Tile kTiles[kTileRows] = {dot_tile<1>, dot_tile<2>};
#endif

// Row 0 is all ones, so that its product with w is the sum of w; row 1 + m is that of x_codes.
class UnsignedRows {
 public:
  const int64_t M, K, stride, blocks;
  const int32_t moved;  // x - x_codes

  UnsignedRows(const ScaledMatmul& p, ParallelFor run)
      : M(p.M),
        K(p.weight.grid.K),
        stride(stride_of(K)),
        blocks(p.weight.grid.scale_cols()),
        moved(p.x_format == Type::int8 ? 128 : 0),
        bytes_(new uint8_t[(M + 1) * stride + kBytes]),
        sums_(p.weight.zero_point || p.weight.format == Type::uint8 ? new int32_t[M * blocks + 1] : nullptr) {
    for (int64_t k = 0; k < K; ++k) bytes_[k] = 1;
    parallel(run, M, most(1, kGrain / most(K, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const auto* in = static_cast<const uint8_t*>(p.x_codes) + m * K;
        auto* out = bytes_ + (1 + m) * stride;
        const uint8_t flip = uint8_t(moved);
        for (int64_t k = 0; k < K; ++k) out[k] = in[k] ^ flip;
        if (!sums_) continue;
        const int64_t bk = p.weight.grid.bk;
        for (int64_t J = 0; J < blocks; ++J) {
          uint32_t sum = 0;
          for (int64_t k = J * bk; k < least((J + 1) * bk, K); ++k) sum += out[k];
          sums_[m * blocks + J] = int32_t(sum);
        }
      }
    });
  }
  UnsignedRows(const UnsignedRows&) = delete;
  ~UnsignedRows() {
    delete[] bytes_;
    delete[] sums_;
  }

  const uint8_t* ones() const { return bytes_; }
  const uint8_t* row(int64_t m) const { return bytes_ + (1 + m) * stride; }
  // Of block J of row m; asked for only where z may differ from 0.
  int32_t sum(int64_t m, int64_t J) const { return sums_ ? sums_[m * blocks + J] : 0; }

 private:
  uint8_t* const bytes_;
  int32_t* const sums_;

  // At least K, such that the rows of a tile lie in different sets of the first-level cache.
  static int64_t stride_of(int64_t K) {
    const int64_t lines = (K + 63) / 64;
    return (lines + (75 - lines % 64) % 64) * 64;
  }
};

// The sums of kRows rows of x with kCols rows of w, and what becomes of them.
class Piece {
 public:
  Piece(const ScaledMatmul& p, const UnsignedRows& x) : p_(p), x_(x), g_(p.weight.grid), f_(row_of(p.weight.format)) {}

  void operator()(int64_t m0, int64_t n0) {
    m0_ = m0, n0_ = n0, rows_ = least(kRows, x_.M - m0), cols_ = least(kCols, g_.M - n0);
    if (x_.blocks != 1)
      for (float& total : total_) total = 0.0f;
    for (int64_t J = 0; J < x_.blocks; ++J) {
      const int64_t k0 = J * g_.bk, n = least(g_.bk, g_.K - k0);
      multiply(k0, n);
      scale_block(J, n);
    }
    finish();
  }

 private:
  const ScaledMatmul& p_;
  const UnsignedRows& x_;
  const Grid& g_;
  const Row f_;
  const bool in_place_ = p_.weight.format == Type::int8;
  int64_t m0_, n0_, rows_, cols_;
  alignas(64) int32_t d_[(1 + kRows) * kCols];  // row 0: the sums of w
  alignas(64) float total_[kRows * kCols];
  alignas(64) int8_t decoded_[kTileCols * (kDepth + 64)];

  // d = the sums over columns k0 .. k0 + n
  void multiply(int64_t k0, int64_t n) {
    const bool streams = in_place_ && rows_ <= kTileRows;  // w passes once
    const int64_t parts = streams ? 1 : (n + kDepth - 1) / kDepth, depth = ((n + parts - 1) / parts + 63) / 64 * 64;
    for (int64_t k = 0; k < n; k += depth)
      for (int64_t c = 0; c < cols_; c += kTileCols) multiply_panel(k0 + k, least(depth, n - k), c, k > 0);
  }

  void multiply_panel(int64_t k, int64_t n, int64_t c, bool add) {
    Panel w;
    for (int64_t j = 0; j < kTileCols; ++j) w.row[j] = row_of_w(least(c + j, cols_ - 1), j, k, n);
    const int64_t tiles = (rows_ + kTileRows - 1) / kTileRows;
    int64_t fetched = 0;
    w.ahead_stride = g_.K;
    for (int64_t t = 0; t < tiles; ++t) {
      // The four rows that follow, some with each tile.
      const int64_t until = in_place_ ? least(kTileCols, (t + 1) * kTileCols / tiles + (tiles > 4)) : 0;
      w.ahead = w.row[0] + (kTileCols + fetched) * g_.K, w.ahead_rows = int(until - fetched), fetched = until;
      const int64_t r = t * kTileRows, R = least(kTileRows, rows_ - r);
      kTiles[R - 1](x_.row(m0_ + r) + k, x_.stride, w, n, add, d_ + (1 + r) * kCols + c, kCols);
    }
    w.ahead_rows = 0;
    dot_tile<1>(x_.ones() + k, 0, w, n, add, d_ + c, kCols);
  }

  // Columns k .. k + n of row n0 + c of w: where they lie, or decoded into buffer j
  const int8_t* row_of_w(int64_t c, int64_t j, int64_t k, int64_t n) {
    const auto* codes =
        static_cast<const uint8_t*>(p_.weight.codes) + byte_offset(f_.bits, g_.K, n0_ + c, k & ~int64_t(1));
    if (in_place_) return reinterpret_cast<const int8_t*>(codes + (k & 1));
    int8_t* out = decoded_ + j * (kDepth + 64);
    n += k & 1;
    if (f_.bits == 8)
      for (int64_t i = 0; i < n; ++i) out[i] = int8_t(codes[i] ^ 0x80);
    else
      for (int64_t i = 0; i < (n + 1) / 2; ++i) {
        out[2 * i] = int8_t(unpack<int4>(codes[i], 0));
        out[2 * i + 1] = int8_t(unpack<int4>(codes[i], 1));
      }
    return out + (k & 1);
  }

  // total = fl(d * x_scale) * scale where a row of w has one scale, total += d * scale of block J where it has several
  void scale_block(int64_t J, int64_t n) {
    alignas(64) float s[kCols] = {};
    alignas(64) uint32_t z[kCols] = {};
    for (int64_t c = 0; c < cols_; ++c) {
      const int64_t at = (n0_ + c) / g_.br * x_.blocks + J;
      s[c] = effective_scale(p_.weight.scale[at], float_of(f_.scale_max));
      if (p_.weight.zero_point) z[c] = uint32_t(clamp_zero_point(p_.weight.zero_point[at], f_));
      if (p_.weight.format == Type::uint8) z[c] -= 128;
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t m = m0_ + r;
      const uint32_t x_z = uint32_t(x_zero_point(m)), x_sum = uint32_t(x_.sum(m, J)) - uint32_t(n) * x_z;
      const Floats s_x = splat<Floats>(x_scale(m));
      for (int64_t c = 0; c < cols_; c += kLanes) {
        using U = Bits<Floats>;
        const U d = load<U>(d_ + (1 + r) * kCols + c) - load<U>(d_ + c) * x_z - load<U>(z + c) * x_sum;
        const Floats f = Lanes<Floats>::of(Sums(d)), s_w = load<Floats>(s + c);
        float* total = total_ + r * kCols + c;
        store(total, x_.blocks == 1 ? mul(mul(f, s_x), s_w) : add(load<Floats>(total), mul(f, s_w)));
      }
    }
  }

  // y = activation(total + bias)
  void finish() {
    alignas(64) float bias[kCols] = {};
    if (p_.epilogue.bias)
      for (int64_t c = 0; c < cols_; ++c) bias[c] = p_.epilogue.bias[n0_ + c];
    const int y_bits = row_of(p_.y_type).bits;
    const Encode encode = encoder(p_.y_type, false, false);
    for (int64_t r = 0; r < rows_; ++r) {
      float* total = total_ + r * kCols;
      const Floats s_x = splat<Floats>(x_scale(m0_ + r));
      for (int64_t c = 0; c < cols_; c += kLanes) {
        Floats v = load<Floats>(total + c);
        if (x_.blocks != 1) v = mul(v, s_x);
        if (p_.epilogue.bias) v = add(v, load<Floats>(bias + c));
        store(total + c, activate(v, p_.epilogue.activation));
      }
      encode(total, nullptr, nullptr, {false, false},
             static_cast<char*>(p_.y) + byte_offset(y_bits, g_.M, m0_ + r, n0_), cols_);
    }
  }

  float x_scale(int64_t m) const {
    return effective_scale(p_.x_scale[p_.x_per_row ? m : 0], float_of(row_of(p_.x_format).scale_max));
  }
  int32_t x_zero_point(int64_t m) const {
    const int32_t* z = p_.x_zero_point;
    return (z ? clamp_zero_point(z[p_.x_per_row ? m : 0], row_of(p_.x_format)) : 0) + x_.moved;
  }
};

}  // namespace

void scaled_matmul(const ScaledMatmul& p, ParallelFor run) {
  const UnsignedRows x(p, run);
  const int64_t down = (p.M + kRows - 1) / kRows, across = (p.weight.grid.M + kCols - 1) / kCols;
  const int64_t work = least(p.M, kRows) * kCols * most(p.weight.grid.K, 1);
  parallel(run, across * down, most(1, 4 * kGrain / work), [&](int64_t begin, int64_t end) {
    Piece piece(p, x);
    for (int64_t i = begin; i < end; ++i) piece(i % down * kRows, i / down * kCols);
  });
}

}  // namespace QL_ISA
}  // namespace quantlib
