// y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = (codes - zero_point) * scale
//
// Every sum is made in one order, whatever the other rows are: lane l of a register takes each k with its place in a
// step, a block of kBlock columns at a time; the lanes of a block are added up by a tree, the blocks in order.
#include "../activation.h"
#include "matmul.h"

namespace quantlib {
namespace QL_ISA {
namespace {

constexpr int64_t kSlab = 4;    // rows of the weight decoded together
constexpr int64_t kPanel = 32;  // rows of the weight whose sums are kept while x stays in the cache
#ifdef __AVX512F__
constexpr int kTile = 6;  // rows of x that meet a slab together: 24 of 32 registers are sums
#else
constexpr int kTile = 3;
#endif

// ---- elements -------------------------------------------------------------------------------------------------------

template <class E>
constexpr int64_t kWidth = 4 * kLanes / int64_t(sizeof(E));  // elements of a register
template <class E>
constexpr int64_t kBlock = 4096 / int64_t(sizeof(E));  // columns of a slab, which is half of the first-level cache

QL_FN Floats multiply_add(const float* x, Floats w, Floats sum) { return fma(load<Floats>(x), w, sum); }

#ifdef __AVX512BF16__
// Of pairs of BF16. The instruction takes subnormals for zeros: what it is given has none, nor have its sums.
QL_FN Floats multiply_add(const uint16_t* x, Floats w, Floats sum) {
  return _mm512_dpbf16_ps(sum, load<__m512bh>(x), same_bits<__m512bh>(w));
}
#endif

// ---- registers ------------------------------------------------------------------------------------------------------

typedef float Quad __attribute__((vector_size(16)));

// (sum of the lanes of a, of b, of c, of d), each by the same tree
QL_FN Quad add_lanes(Floats a, Floats b, Floats c, Floats d) {
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
  Quad out;
  __builtin_memcpy(&out, &sums, sizeof out);
  return out;
}

// A piece of the weight, decoded: zeros behind `count` columns up to a whole register, and below the last row.
template <class E>
struct Slab {
  alignas(64) E w[kSlab][kBlock<E>];
  int64_t count;
  // Where scales are for sums: parts of the columns and the scale of each row there
  int64_t parts, end[kBlock<E> / 32];
  float scale[kBlock<E> / 32][kSlab];
};

// sums[r, n] += sum over k of x[r, k] * slab.w[n, k] for R rows
template <int R, class E>
QL_FN void multiply(const E* x, int64_t stride, const Slab<E>& slab, float* sums) {
  Floats sum[R][kSlab] = {};
  for (int64_t k = 0; k < slab.count; k += kWidth<E>) {
    Floats w[kSlab];
    for (int n = 0; n < kSlab; ++n) w[n] = load<Floats>(slab.w[n] + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kSlab; ++n) sum[r][n] = multiply_add(x + r * stride + k, w[n], sum[r][n]);
  }
  for (int r = 0; r < R; ++r) {
    float* to = sums + r * kPanel;
    store(to, load<Quad>(to) + add_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
  }
}

// The same where scales change along a row: total = fma(sum of a part, its scale, total), lane by lane
template <int R, class E>
QL_FN void multiply_parts(const E* x, int64_t stride, const Slab<E>& slab, float* sums) {
  Floats total[R][kSlab] = {};
  for (int64_t part = 0, k = 0; part < slab.parts; ++part) {
    Floats sum[R][kSlab] = {};
    for (; k < slab.end[part]; k += kWidth<E>) {
      Floats w[kSlab];
      for (int n = 0; n < kSlab; ++n) w[n] = load<Floats>(slab.w[n] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < kSlab; ++n) sum[r][n] = multiply_add(x + r * stride + k, w[n], sum[r][n]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < kSlab; ++n) total[r][n] = fma(sum[r][n], splat<Floats>(slab.scale[part][n]), total[r][n]);
  }
  for (int r = 0; r < R; ++r) {
    float* to = sums + r * kPanel;
    store(to, load<Quad>(to) + add_lanes(total[r][0], total[r][1], total[r][2], total[r][3]));
  }
}

// sums[r, n] += ... for any number of rows
template <class E>
void multiply_rows(const E* x, int64_t stride, const Slab<E>& slab, float* sums, int64_t rows) {
  const int64_t most_rows = slab.parts ? 3 : kTile;
  for (int64_t r = 0; r < rows;) {
    const int64_t n = least(most_rows, rows - r);
    const E* from = x + r * stride;
    float* to = sums + r * kPanel;
    if (slab.parts) {
      if (n == 3) multiply_parts<3>(from, stride, slab, to);
      else if (n == 2) multiply_parts<2>(from, stride, slab, to);
      else multiply_parts<1>(from, stride, slab, to);
    } else {
      if (n == 6) multiply<kTile>(from, stride, slab, to);
      else if (n == 5) multiply<kTile - 1>(from, stride, slab, to);
      else if (n == 4) multiply<kTile - 2>(from, stride, slab, to);
      else if (n == 3) multiply<3>(from, stride, slab, to);
      else if (n == 2) multiply<2>(from, stride, slab, to);
      else multiply<1>(from, stride, slab, to);
    }
    r += n;
  }
}

// ---- the matmul -----------------------------------------------------------------------------------------------------

template <class E>
struct Product {
  const DequantMatmul& p;
  const Rows<E> x;
  const int64_t* rows;  // row r of x is row rows[r] of y, or m0 + r
  int64_t m0;
  const WeightRows weight = WeightRows(p.weight);
  const int64_t N = p.weight.grid.M, K = p.weight.grid.K;
  const int y_bits = row_of(p.x_type).bits;
  const Encode encode = encoder(p.x_type, false, false);
  const bool scales_sums = sizeof(E) == 2, parts = scales_sums && weight.cols > 1;

  Product(const DequantMatmul& p, Rows<E> x, const int64_t* rows, int64_t m0) : p(p), x(x), rows(rows), m0(m0) {}

  // Rows r0 .. r1, at most kRows, and columns n0 .. n1 of y, at most kPanel
  void operator()(int64_t r0, int64_t r1, int64_t n0, int64_t n1) const {
    alignas(64) float sums[kRows * kPanel];
    Slab<E> slab;
    for (int64_t at = 0; at < (r1 - r0) * kPanel; ++at) sums[at] = 0.0f;
    for (int64_t k = 0; k < K; k += kBlock<E>)
      for (int64_t n = n0; n < n1; n += kSlab) {
        decode(n, least(kSlab, n1 - n), k, least(kBlock<E>, K - k), slab);
        multiply_rows(x.data + r0 * x.stride + k, x.stride, slab, sums + (n - n0), r1 - r0);
      }
    for (int64_t r = r0; r < r1; ++r) finish(sums + (r - r0) * kPanel, rows ? rows[r] : m0 + r, n0, n1);
  }

 private:
  void decode(int64_t n0, int64_t count, int64_t k0, int64_t columns, Slab<E>& slab) const {
    slab.count = round_up(columns, kWidth<E>), slab.parts = 0;
    for (int64_t n = 0; n < kSlab; ++n) {
      E* to = slab.w[n];
      if (n < count) decode_row(n0 + n, k0, columns, to);
      for (int64_t k = n < count ? columns : 0; k < slab.count; ++k) to[k] = E(0);
    }
    if (!parts) return;
    weight.blocks(k0, columns, [&](int64_t, int64_t end, int64_t J) {
      for (int64_t n = 0; n < kSlab; ++n) slab.scale[slab.parts][n] = n < count ? weight.scale(n0 + n, J) : 0.0f;
      slab.end[slab.parts++] = end;
    });
  }

  void decode_row(int64_t n, int64_t k0, int64_t columns, float* to) const { weight.row(n, k0, columns, to); }

  void decode_row(int64_t n, int64_t k0, int64_t columns, uint16_t* to) const {
    alignas(64) float value[kBlock<E>];
    weight.decode(static_cast<const char*>(weight.w.codes) + byte_offset(weight.format.bits, K, n, k0), false, value,
                  columns);
    weight.blocks(k0, columns, [&](int64_t begin, int64_t end, int64_t J) {
      const float z = float(weight.zero_point(n, J));
      for (int64_t k = begin; k < end; ++k) to[k] = uint16_t(bits_of(sub(value[k], z)) >> 16);  // exact
    });
  }

  // y[m, n0 .. n1) from the sums of a row
  void finish(float* sums, int64_t m, int64_t n0, int64_t n1) const {
    alignas(64) float total[kPanel] = {};
    for (int64_t n = n0; n < n1; ++n) {
      float sum = sums[n - n0];
      if (scales_sums && !parts) sum = mul(sum, weight.scale(n, 0));
      sum = add(sum, 0.0f);  // a product that underflows may be -0, a sum from +0 never is
      total[n - n0] = p.epilogue.bias ? add(sum, p.epilogue.bias[n]) : sum;
    }
    for (int64_t n = 0; n < n1 - n0; n += kLanes)
      store(total + n, activate(load<Floats>(total + n), p.epilogue.activation));
    encode(total, nullptr, nullptr, {false, false}, static_cast<char*>(p.y) + byte_offset(y_bits, N, m, n0), n1 - n0);
  }
};

template <class E>
void multiply_all(ParallelFor run, const Product<E>& product, int64_t rows) {
  const int64_t panel = rows <= 16 ? kSlab : kPanel;  // few rows: the weight is read as it lies
  const int64_t across = (product.N + panel - 1) / panel, down = (rows + kRows - 1) / kRows;
  const int64_t work = panel * least(rows, kRows) * most(1, product.K);
  parallel(run, across * down, most(1, 4 * kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t r = piece / across * kRows, n = piece % across * panel;
      product(r, least(r + kRows, rows), n, least(n + panel, product.N));
    }
  });
}

// Rows of y by products in FP32.
void multiply_floats(const DequantMatmul& p, ParallelFor run, const int64_t* rows, int64_t m0, int64_t count) {
  const int64_t K = p.weight.grid.K, stride = round_up(K, kLanes);
  if (p.x_type == Type::float32 && stride == K && !rows)
    return multiply_all(run, Product<float>(p, {static_cast<const float*>(p.x) + m0 * K, K}, rows, m0), count);
  const Scratch x(count * stride * 4);
  auto* data = static_cast<float*>(x.data());
  gather_rows(run, p.x, p.x_type, K, rows, m0, count, data, stride);
  multiply_all(run, Product<float>(p, {data, stride}, rows, m0), count);
}

#ifdef __AVX512BF16__
// Whether the codes are whole BF16 values, of at most 2^16 and if not zero at least 2^-16, and scales are for sums.
bool takes_pairs(const DequantMatmul& p) {
  const Grid& g = p.weight.grid;
  const bool fits = row_of(p.weight.format).bits <= 8, whole = g.bk >= g.K || g.bk % 32 == 0;
  return p.x_type == Type::bfloat16 && fits && whole && g.K > 0;
}

// Whether a value of x is no zero and not within [2^-80, 2^80): a product or sum might underflow or overflow.
bool is_odd(const uint16_t* x, int64_t K) {
  uint32_t odd = 0;
  for (int64_t k = 0; k < K; ++k) {
    const uint16_t magnitude = x[k] & 0x7fff;
    odd |= magnitude != 0 && uint16_t(magnitude - ((127 - 80) << 7)) >= (160 << 7);
  }
  return odd;
}

// Rows of y by products of BF16 pairs; those of odd values once more, in FP32.
void multiply_pairs(const DequantMatmul& p, ParallelFor run, int64_t m0, int64_t count) {
  const int64_t K = p.weight.grid.K, stride = round_up(K, 32);
  const auto* x = static_cast<const uint16_t*>(p.x) + m0 * K;
  const Scratch list(count * 8), padded(stride == K ? 0 : count * stride * 2);
  auto* odd = static_cast<int64_t*>(list.data());
  int64_t odds = 0;
  for (int64_t r = 0; r < count; ++r)
    if (is_odd(x + r * K, K)) odd[odds++] = m0 + r;
  if (stride != K) {
    auto* to = static_cast<uint16_t*>(padded.data());
    for (int64_t r = 0; r < count; ++r) {
      __builtin_memcpy(to + r * stride, x + r * K, size_t(K) * 2);
      for (int64_t k = K; k < stride; ++k) to[r * stride + k] = 0;
    }
    x = to;
  }
  if (odds < count) multiply_all(run, Product<uint16_t>(p, {x, stride}, nullptr, m0), count);
  if (odds) multiply_floats(p, run, odd, m0, odds);
}
#endif

}  // namespace

void dequant_matmul(const DequantMatmul& p, ParallelFor run) {
  if (!p.weight.grid.M) return;
  constexpr int64_t bytes = int64_t(8) << 20;  // of x at a time, in FP32
  const int64_t chunk = round_up(bytes / (4 * most(1, p.weight.grid.K)) + 1, kRows);
  for (int64_t m = 0; m < p.M; m += chunk) {
    const int64_t count = least(chunk, p.M - m);
#ifdef __AVX512BF16__
    if (takes_pairs(p)) {
      multiply_pairs(p, run, m, count);
      continue;
    }
#endif
    multiply_floats(p, run, nullptr, m, count);
  }
}

}  // namespace QL_ISA
}  // namespace quantlib
